"""The report of the security figures: one table of all, then a table for each part."""

from __future__ import annotations

from collections import Counter
from typing import Any

from report import table

__all__ = ["page"]

BOMB_LIMIT_MIB = 64


def page(result: dict[str, Any]) -> str:
    """Markdown; parts that were not run are left out."""
    lines = [
        "# Security figures",
        "",
        "What was tried against parsers, service, command line and pages, and what came of it. "
        "Every part can be run alone: `--parts`.",
        "",
        *table(["id", "what", "result"], _figures(result)),
        "",
        "F22, load and the slope of memory over 10 GB served, is measured with the service's "
        "speed: [http.md](http.md).",
        "",
    ]
    for part, told in _PARTS.items():
        if part in result:
            lines += [*told(result[part]), ""]
    return "\n".join(lines)


def _figures(result: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []

    def add(part: str, id_: str, what: str, said: Any) -> None:
        if part in result:
            rows.append([id_, what, said(result[part])])

    add(
        "fuzz",
        "F13",
        "fuzz executions / crashes / hangs over 1 s",
        lambda r: f"{r['executions']:,} / {r['crashes']} / {r['hangs']}, seed {r['seed']}",
    )
    add(
        "openapi",
        "F14",
        "requests from the OpenAPI description / 5xx / violations of it",
        lambda r: f"{r['requests']:,} / {r['server_errors']} / {r['failures']}",
    )
    add("paths", "F15", "traversal and SSRF strings sent / escaped", _paths_figure)
    add(
        "bombs",
        "F16",
        f"bombs / most memory above the start (limit {BOMB_LIMIT_MIB} MiB)",
        lambda r: f"{r['tried']} / {r['peak_mib']:.1f} MiB",
    )
    add(
        "pickles",
        "F17",
        "files with pickles or code / executed",
        lambda r: f"{r['tried']} / {r['executed']}",
    )
    add(
        "slow", "F18", "slow clients / p99 to first byte of a good one, quiet, during", _slow_figure
    )
    add(
        "routes",
        "F19",
        "routes mounted / reachable without a key outside the list",
        lambda r: f"{r['mounted']} / {len(r['outside_list'])}",
    )
    add("timing", "F20", "time of a key wrong in its first byte - in its last", _timing_figure)
    add(
        "pages",
        "F21",
        "payloads, visits with one / executed / stopped by the policy alone",
        lambda r: f"{r['payloads']}, {r['visits']:,} / {r['executed']} / {r['blocked']}",
    )
    add("guessing", "X10", "wrong keys sent / looked at / refused unseen", _guessing_figure)
    return rows


def _paths_figure(result: dict[str, Any]) -> str:
    tried = sum(row["tried"] for row in result["rows"])
    escaped = sum(row["escaped"] for row in result["rows"]) + result["connections_made"]
    return f"{tried:,} / {escaped}"


def _slow_figure(result: dict[str, Any]) -> str:
    own = result["rows"][0]
    quiet, during = _quiet_ms(own), own["p99_ms"]["during"]
    return f"{result['clients']} / {quiet:.2f} ms, {during:.2f} ms ({during / quiet:.2f} x)"


def _guessing_figure(result: dict[str, Any]) -> str:
    sent = f"{result['sent']:,} in {result['seconds']:.0f} s"
    return f"{sent} / {result['looked_at']} / {result['refused_unseen']:,}"


def _quiet_ms(row: dict[str, Any]) -> float:
    return (row["p99_ms"]["before"] + row["p99_ms"]["after"]) / 2


def _timing_figure(result: dict[str, Any]) -> str:
    said = []
    for how, found in result.items():
        if isinstance(found, dict):
            said.append(f"{how} {_interval(found['differences'][1])}")
    return "; ".join(said)


def _interval(row: dict[str, Any]) -> str:
    unit, scale = ("ns", 1) if abs(row["high_ns"]) < 10_000 else ("us", 1000)
    numbers = (row["median_ns"] / scale, row["low_ns"] / scale, row["high_ns"] / scale)
    told = "{:+,.0f} {u} (95 %: {:+,.0f} to {:+,.0f})" if scale == 1 else (
        "{:+,.1f} {u} (95 %: {:+,.1f} to {:+,.1f})")  # fmt: skip
    return told.format(*numbers, u=unit)


def _fuzz(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["target"],
            row["subject"],
            f"{row['executions']:,}",
            f"{row['accepted']:,}",
            str(row["crashes"]),
            str(row["hangs"]),
            f"{row.get('slowest_ms', 0):.0f}",
        ]
        for row in result["rows"]
    ]
    head = ["target", "subject", "executions", "accepted", "crashes", "hangs", "slowest, ms CPU"]
    found = [f"- {r['target']}, input {f['number']}: {f['what']}" for r in result["rows"]
             for f in r["found"]]  # fmt: skip
    return [
        "## F13: fuzzing",
        "",
        "Mutations of real inputs (bytes and JSON trees), and random bytes; documents and chunks "
        "with their digests made right, so that they reach what stands behind. A crash is any "
        "exception "
        "outside our own tree, a failed check of the result, a 5xx, or the end of the process. "
        f"{result['part_s'] / 60:.1f} minutes.",
        "",
        *table(head, rows),
        *([""] if found else []),
        *found,
    ]


def _openapi(result: dict[str, Any]) -> list[str]:
    statuses = ", ".join(f"{count:,} x {status}" for status, count in result["statuses"].items())
    return [
        "## F14: requests made from the description",
        "",
        f"schemathesis, {result['examples']} examples for each of {result['operations']} "
        f"operations: {statuses}. Checked: no 5xx; status, content type, headers and body as "
        "described.",
    ]


def _paths(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["kind"],
            f"{row['tried']:,}",
            str(row["escaped"]),
            ", ".join(f"{n:,} x {s}" for s, n in sorted(row["statuses"].items())),
        ]
        for row in result["rows"]
    ]
    return [
        "## F15: traversal and SSRF",
        "",
        "Sent over sockets byte for byte, with a key for one of two stores: steps plain, encoded, "
        "twice and overlong, absolute names, and locations in parameters and in names. Escaped: "
        "the answer holds a secret file beside the stores, a document of the other store, or "
        f"/etc/passwd. Connections to a listener that the locations name: "
        f"{result['connections_made']}.",
        "",
        *table(["kind", "tried", "escaped", "answers"], rows),
    ]


def _bombs(result: dict[str, Any]) -> list[str]:
    rows = [[row["input"], row["to"], f"{row['mib']:.1f}", row["ended"]] for row in result["rows"]]
    return [
        "## F16: bombs",
        "",
        "Memory above that before the input, at its highest. *zarr*, *arrow*: a store with the "
        "input in place, every digest right, opened and read; *remote*: a hostile server; "
        "*service*: a "
        "request to `logitstore serve`, or the store served, through API and pages.",
        "",
        *table(["input", "to", "MiB", "ended"], rows),
    ]


def _pickles(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["file"], row["read_by"], "yes" if row["executed"] else "no", str(row["exit"])]
        for row in result["rows"]
    ]
    return [
        "## F17: pickles and code",
        "",
        "Each payload would write a file, and does when it is unpickled (the control). Read by the "
        f"command line; {sum(row['traceback'] for row in result['rows'])} tracebacks.",
        "",
        *table(["file", "read by", "executed", "exit"], rows),
    ]


def _slow(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        p50, p99 = row["p50_ms"], row["p99_ms"]
        rows.append(
            [
                row["server"],
                " / ".join(f"{p50[w]:.2f}" for w in ("before", "during", "after")),
                " / ".join(f"{p99[w]:.2f}" for w in ("before", "during", "after")),
                f"{row['p99_during_of_quiet']:.2f}",
                f"{row['requests']:,}",
            ]
        )
    dropped = []
    for row in result["rows"]:
        for kind, still in row["never_dropped"].items():
            found = row["dropped_after_s"].get(kind)
            dropped.append(
                [
                    row["server"],
                    kind,
                    f"{found['median']:.1f} / {found['most']:.1f}" if found else "never",
                    str(found["drops"] if found else 0),
                    str(still),
                ]
            )
    return [
        "## F18: slow clients",
        "",
        f"{result['clients']} at a time for {result['attack_s']:.0f} s, a quarter of each kind, "
        "each of which comes back when it is dropped. Milliseconds to the first byte of 4 KiB "
        "ranges, "
        "before / during / after. Required: p99 during at most twice that of the quiet times.",
        "",
        *table(["server", "p50, ms", "p99, ms", "during / quiet", "requests during"], rows),
        "",
        *table(
            ["server", "kind", "dropped after s: median / most", "drops", "first ones never"],
            dropped,
        ),
    ]


def _routes(result: dict[str, Any]) -> list[str]:
    return [
        "## F19: routes without a key",
        "",
        f"{result['mounted']} routes, viewer included, asked with every method as program and as "
        "browser, without a key, with a wrong one, another scheme, and the key as a cookie: "
        f"{result['requests']:,} requests. Answered: {', '.join(result['without_key'])}. "
        f"Outside the list: {', '.join(result['outside_list']) or 'none'}.",
    ]


def _timing(result: dict[str, Any]) -> list[str]:
    rows = []
    rounds = []
    for how, found in result.items():
        if not isinstance(found, dict):
            continue
        rounds.append(f"{found['rounds']:,} {how}")
        for row in found["differences"]:
            significant = "yes" if row["significant"] else "no"
            what = f"{row['of']} - {row['to']}"
            rows.append([how, what, _interval(row), significant, row["would_tell"]])
    return [
        "## F20: time of right and wrong keys",
        "",
        f"Kinds in random order, {' and '.join(rounds)} rounds; the median of the differences "
        "within a round. *Significant*: 0 lies outside of its 95 % interval. The right key is "
        "answered "
        "with a document, the others with 401.",
        "",
        *table(["", "difference", "median", "significant", "would tell"], rows),
        "",
        "What is compared, in constant time, is a SHA-256 of the whole key, in which no byte of it "
        "has a place. A revoked key that is right in every byte takes longer than a wrong one: "
        "its date is looked at; ids of keys are no secret.",
    ]


def _pages(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["place"], f"{row['visits']:,}", str(row["executed"]), str(row["blocked"])]
        for row in result["rows"]
    ]
    return [
        "## F21: payloads in pages",
        "",
        f"{result['payloads']} payloads in Chromium, of which "
        f"{result['run_without_protection']} run by themselves in a page that puts them in as "
        "they are (the control).",
        "",
        *table(["place", "visits", "executed", "stopped by the policy alone"], rows),
    ]


def _guessing(result: dict[str, Any]) -> list[str]:
    right = Counter(result["right_key_from_there"])
    return [
        "## Guessing keys",
        "",
        f"From one address, as fast as answers come: {result['allowed_per_minute']} wrong keys a "
        f"minute are looked at, the rest is 429. A key holds {result['secret_bits']} random bits. "
        f"A right key that had been used from there before went on: {dict(right)}.",
    ]


_PARTS = {
    "fuzz": _fuzz,
    "openapi": _openapi,
    "paths": _paths,
    "bombs": _bombs,
    "pickles": _pickles,
    "slow": _slow,
    "routes": _routes,
    "timing": _timing,
    "pages": _pages,
    "guessing": _guessing,
}
