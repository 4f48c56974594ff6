"""The HTTP benchmark's report: targets first, then a table for each part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from report import table

__all__ = ["capacity_of", "page", "targets_of"]

OURS = "logitstore"


def targets_of(result: dict[str, Any]) -> list[list[str]]:
    """Rows of what was asked for, worst case first where there are several."""
    lines = []
    if found := _ratios(result.get("shards", [])):
        lines.append(["shard bytes / nginx", f"{min(found):.2f}", "0.70"])
    for client in ("obstore", "socket"):
        own = [row for row in result.get("ranges", []) if row["client"] == client]
        for length in dict.fromkeys(row["bytes"] for row in own):
            found = _ratios(row for row in own if row["bytes"] == length)
            if found:
                what = f"ranges of {length:,} B / nginx, client {client}"
                lines.append([what, f"{min(found):.2f} to {max(found):.2f}", "0.70"])
    for row in result.get("epochs", []):
        if row["read"] == "warm cache":
            ratio = f"{row['of_disk']['median']:.2f}"
            lines.append([f"tokens/s over HTTP / disk, warm cache, {row['store']}", ratio, "0.80"])
    if "memory" in result:
        for what, found_memory in result["memory"].items():
            slope = f"{found_memory['mb_per_gb']:+.2f} MB/GB"
            lines.append([f"memory over {found_memory['gb'][-1]:.1f} GB, {what}", slope, "about 0"])
    if "opening" in result:
        own_open = result["opening"][OURS]
        lines.append(
            [f"requests to open {own_open['shards']:,} shards", str(own_open["requests"]), "2"]
        )
    return lines


def capacity_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What docs/serving.md shows: medians, beside those of the other server or of the disk."""
    rows: list[dict[str, Any]] = []

    def add(what: str, unit: str, values: dict[str, float], own: str = OURS) -> None:
        beside = {name: value for name, value in values.items() if name in ("nginx", "disk")}
        rows.append({"what": what, "service": values[own], "beside": beside, "unit": unit})

    for streams, found in _grouped(result.get("shards", []), "streams"):
        values = {r["server"]: r["mb_per_s"]["median"] for r in found}
        add(f"whole shards, {streams} streams", "MB/s", values)
    own = [row for row in result.get("ranges", []) if row["client"] == "obstore"]
    for length, same in _grouped(own, "bytes"):
        streams, found = _grouped(same, "streams")[-1]
        values = {r["server"]: r["requests_per_s"]["median"] for r in found}
        add(f"ranges of {length:,} B, {streams} streams", "requests/s", values)
    for clients, found in _grouped(result.get("load", []), "clients"):
        for q in ("p50", "p99"):
            values = {r["server"]: r["first_byte_ms"][q] for r in found}
            add(f"{q} to first byte, {clients} clients", "ms", values)
    for store, found in _grouped(result.get("epochs", []), "store"):
        values = {r["read"]: r["tokens_per_s"]["median"] / 1e6 for r in found}
        for how in ("warm cache", "no cache"):
            add(f"decoded, {store}, {how}", "Mtok/s", values, own=how)
    return rows


def _grouped(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[Any, list[dict[str, Any]]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.items())


def _ratios(rows: Iterable[dict[str, Any]]) -> list[float]:
    return [r["of_nginx"]["median"] for r in rows if r["server"] == OURS and "of_nginx" in r]


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Serving over HTTP",
        "",
        "Server on one core, client on another, loopback, warm page cache; servers take turns in "
        f"one run. Medians of {result['repeats']} repeats after one that is not counted, lowest "
        "and highest in brackets; ratios are of the same round. MB is 10⁶ bytes. *logitstore* is "
        "`logitstore serve` without keys; *with keys* asks for one with every request.",
        "",
        *result["skipped"],
        "",
        *table(["target", "measured, worst case or range", "required"], result["targets"]),
        "",
    ]
    for name, write in _WRITERS.items():
        if name in result:
            lines += [*write(result[name]), ""]
    return "\n".join(lines)


def _cell(found: dict[str, float], form: str = ".2f") -> str:
    return f"{found['median']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def _of_nginx(row: dict[str, Any]) -> str:
    return _cell(row["of_nginx"]) if "of_nginx" in row else "–"


def _shards(rows: list[dict[str, Any]]) -> list[str]:
    head = ["streams", "server", "MB/s", "of nginx"]
    lines = [
        [str(r["streams"]), r["server"], _cell(r["mb_per_s"], ".0f"), _of_nginx(r)] for r in rows
    ]
    title = f"## Whole shards of {rows[0]['bytes'] / 1e6:.1f} MB, read from sockets"
    return [title, "", *table(head, lines)]


def _ranges(rows: list[dict[str, Any]]) -> list[str]:
    head = ["client", "bytes", "streams", "server", "requests/s", "of nginx"]
    lines = [
        [
            r["client"],
            f"{r['bytes']:,}",
            str(r["streams"]),
            r["server"],
            _cell(r["requests_per_s"], ".0f"),
            _of_nginx(r),
        ]
        for r in rows
    ]
    note = (
        "*obstore* is the client of our reader. *socket* does nothing but write a request and read "
        "the answer into one buffer: it shows what a request costs the server. A Python server "
        "does not come near nginx there; the service logs, counts and checks each request."
    )
    return ["## Ranges at random places", "", note, "", *table(head, lines)]


def _load(rows: list[dict[str, Any]]) -> list[str]:
    head = ["clients", "server", "rows/s", "MB/s", "p50 to first byte", "p99 to first byte"]
    lines = [
        [
            str(r["clients"]),
            r["server"],
            _cell(r["requests_per_s"], ".0f"),
            f"{r['mb_per_s']['median']:.0f}",
            f"{r['first_byte_ms']['p50']:.2f} ms",
            f"{r['first_byte_ms']['p99']:.2f} ms",
        ]
        for r in rows
    ]
    note = (
        "Each request is a chunk of the top-64 store, one row (sample) of 2,048 positions; every "
        "client asks again as soon as it has its answer, so the first byte waits for the others."
    )
    return ["## Load: capacity of one worker on one core", "", note, "", *table(head, lines)]


def _epochs(rows: list[dict[str, Any]]) -> list[str]:
    head = ["store", "read from", "Mtok/s", "of disk"]
    lines = [
        [
            r["store"],
            r["read"],
            _cell({k: v / 1e6 for k, v in r["tokens_per_s"].items()}, ".3f"),
            _cell(r["of_disk"]),
        ]
        for r in rows
    ]
    note = (
        "`LogitDataset`, shuffled, batches of 4, no worker processes; a fresh dataset for each "
        "epoch, so that every chunk is read, checked and decoded. *warm cache*: chunks lie in "
        "`cache_dir`; *no cache*: every chunk comes over HTTP; *cold cache*: the same, and is "
        "written to `cache_dir`."
    )
    return ["## Decoded tokens over loopback", "", note, "", *table(head, lines)]


def _memory(found: dict[str, dict[str, Any]]) -> list[str]:
    head = ["GB sent", "shards: MB", "GB sent", "samples: MB"]
    pairs = [zip(found[k]["gb"], found[k]["rss_mb"], strict=True) for k in ("shards", "samples")]
    lines = [
        [f"{a[0]:.1f}", f"{a[1]:.1f}", f"{b[0]:.1f}", f"{b[1]:.1f}"]
        for a, b in zip(*pairs, strict=True)
    ]
    stream = found["samples"]
    note = (
        f"Resident memory of the server. *samples* is one answer of {stream['bytes'] / 1e9:.1f} GB "
        f"from /samples as an Arrow stream, {stream['rows_per_s']:.0f} rows/s, "
        f"{stream['mb_per_s']:.0f} MB/s, at most {stream['peak_rss_mb']:.0f} MB."
    )
    return ["## Memory", "", note, "", *table(head, lines)]


def _opening(found: dict[str, Any]) -> list[str]:
    lines = [["disk", f"{found['disk']['open_s'] * 1000:.0f}", "–"]]
    for name, row in found.items():
        if name != "disk":
            times = {k: v * 1000 for k, v in row["open_s"].items()}
            lines.append([name, _cell(times, ".0f"), str(row["requests"])])
    title = f"## Opening a sealed store of {found['disk']['shards']:,} shards"
    return [title, "", *table(["from", "ms", "requests, counted by the server"], lines)]


def _waiting(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [r["data"], _cell(r["step_ms"], ".0f"), _cell(r["waits_percent"], ".1f")] for r in rows
    ]
    note = (
        "A small student (4,096 ids, 4 × 512 tokens a step) trained on one core, which also "
        "decodes; only fetching is done ahead."
    )
    head = ["data", "ms a step", "waits for data, %"]
    return ["## How long a trainer waits", "", note, "", *table(head, lines)]


_WRITERS = {
    "shards": _shards,
    "ranges": _ranges,
    "load": _load,
    "epochs": _epochs,
    "memory": _memory,
    "opening": _opening,
    "waiting": _waiting,
}
