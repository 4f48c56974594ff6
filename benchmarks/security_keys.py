"""F19, F20 and what bounds guessing: keys of the service, over HTTP and in this process."""

from __future__ import annotations

import http.client
import random
import statistics
import string
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from http_servers import Server, logitstore_server
from security_stores import cores, write_pair
from starlette.routing import BaseRoute, Mount, Route

from logitstore_server.app import create_app
from logitstore_server.keys import KeyRing, create_key, revoke_key
from logitstore_server.settings import ServerSettings

__all__ = ["guessing", "routes", "timing"]

# What anybody may ask without a key: that the process lives, how to log in, and the viewer's own
# files, which are the same in every installation.
ALLOWED = {
    *(("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/static/viewer.css")),
    *(("GET", "/login"), ("POST", "/login"), ("POST", "/logout")),
}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def _templates(routes: Sequence[BaseRoute], root: str = "") -> set[str]:
    found: set[str] = set()
    for route in routes:
        if isinstance(route, Mount):
            found |= _templates(list(route.routes), root + route.path)
        elif isinstance(route, Route):
            found.add(root + route.path)
        else:
            raise SystemExit(f"a kind of route that is not known here: {route!r}")
    return found


def _paths(folder: Path, stores: dict[str, Path]) -> list[str]:
    """Every mounted path, with what exists in its places."""
    app = create_app(ServerSettings(stores=[f"{n}={p}" for n, p in stores.items()]))
    shard = next((folder / "beta" / "shards").iterdir()).name
    values = {"{store}": "beta", "{store_name}": "beta", "{shard}": shard, "{name}": shard,
              "{sample:number}": "0", "{file:path}": "viewer.css"}  # fmt: skip
    paths = []
    for path in _templates(app.routes):
        for place, value in values.items():
            path = path.replace(place, value)
        if "{" in path:
            raise SystemExit(f"nothing is known to put into {path}")
        paths.append(path)
    return [*sorted(paths), "/metrics", "/login", "/logout"]


def routes(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """F19: every route, method and kind of client, without a key and with keys that are none."""
    stores = write_pair(folder)
    keys = folder / "keys.json"
    text, _ = create_key(keys, label="x", stores=["*"], metrics=True, expires=None)
    paths = _paths(folder, stores)
    settings = {"log_level": "error", "failed_keys_per_minute": "1000000"}
    sent = {"no key": {}, "wrong key": {"Authorization": f"Bearer {text[:-1]}!"},
            "other scheme": {"Authorization": f"Basic {text}"},
            "key as cookie": {"Cookie": f"logitstore-session={text}"}}  # fmt: skip
    if tiny:
        sent = {"no key": {}}
    reachable, asked = set(), 0
    with logitstore_server(
        folder, stores, cores()[0], key=(keys, text), settings=settings
    ) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        good = _ask(client, "GET", "/v1/stores/beta/store.json", server.headers)
        if good[0] != 200:
            raise SystemExit("the right key opens nothing, so nothing was tried")
        accepts = ("*/*", "text/html")
        for path, method, accept, headers in product(paths, _METHODS, accepts, sent.values()):
            asked += 1
            status, told = _ask(client, method, path, {"Accept": accept, **headers})
            open_path = path in {known for _, known in ALLOWED}
            if status != 401 and not (open_path and status == 405):
                reachable.add(("GET" if method == "HEAD" else method, path))
            elif status == 401 and told is None and path != "/login":
                reachable.add((method, path))
    extra = sorted(reachable - ALLOWED)
    return {
        "mounted": len(paths),
        "requests": asked,
        "without_key": sorted(" ".join(pair) for pair in reachable & ALLOWED),
        "outside_list": [" ".join(pair) for pair in extra],
    }


def _ask(
    client: http.client.HTTPConnection, method: str, path: str, headers: dict[str, str]
) -> tuple[int, str | None]:
    client.request(method, path, headers=headers)
    answer = client.getresponse()
    answer.read()
    return answer.status, answer.getheader("www-authenticate")


def guessing(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Wrong keys as fast as they can be sent; a reader from the same address goes on."""
    stores = write_pair(folder)
    keys = folder / "keys.json"
    text, _ = create_key(keys, label="x", stores=["*"], metrics=False, expires=None)
    path = "/v1/stores/alpha/store.json"
    statuses: Counter[int] = Counter()
    good: Counter[int] = Counter()
    with logitstore_server(folder, stores, cores()[0], key=(keys, text)) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        _ask(client, "GET", path, server.headers)
        start_s, seconds = time.monotonic(), 1.0 if tiny else 20.0
        while (now_s := time.monotonic()) < start_s + seconds:
            guess = f"{text[:-6]}{random.getrandbits(24):06x}"
            statuses[_ask(client, "GET", path, {"Authorization": f"Bearer {guess}"})[0]] += 1
            if sum(statuses.values()) % 50 == 0:
                good[_ask(client, "GET", path, server.headers)[0]] += 1
        took_s = now_s - start_s
    return {
        "seconds": took_s,
        "sent": sum(statuses.values()),
        "looked_at": statuses[401],
        "refused_unseen": statuses[429],
        "right_key_from_there": dict(good),
        "allowed_per_minute": ServerSettings().failed_keys_per_minute,
        "secret_bits": 256,
    }


# The first one tells how far two equal kinds differ by chance.
PAIRS = (
    ("last byte wrong, too", "last byte wrong", "nothing: the same twice"),
    ("first byte wrong", "last byte wrong", "how much of a key is right"),
    ("middle byte wrong", "last byte wrong", "how much of a key is right"),
    ("unknown id", "last byte wrong", "whether a key's id exists"),
    ("revoked, last byte wrong", "last byte wrong", "whether a key of this id was revoked"),
    ("revoked", "last byte wrong", "that a whole key was right once"),
    ("right", "last byte wrong", "nothing that the answer does not say"),
)
Variants = dict[str, Callable[[random.Random], str]]
_LETTERS = string.ascii_letters + string.digits


def _variants(keys: Path) -> Variants:
    """Kinds of keys, another text each time; all but the right one are answered alike."""
    right, entry = create_key(keys, label="x", stores=["*"], metrics=False, expires=None)
    gone, gone_entry = create_key(keys, label="y", stores=["*"], metrics=False, expires=None)
    revoke_key(keys, gone_entry.id)
    secret, last = right.index(entry.id) + len(entry.id) + 1, len(right) - 1

    def other(text: str, at: int) -> Callable[[random.Random], str]:
        letters = _LETTERS.replace(text[at], "")
        return lambda rng: text[:at] + rng.choice(letters) + text[at + 1 :]

    def unknown(rng: random.Random) -> str:
        key_id = "".join(rng.choices("abcdefgh", k=len(entry.id)))
        return right.replace(entry.id, key_id)

    return {
        "right": lambda rng: "".join(right),
        "first byte wrong": other(right, secret),
        "middle byte wrong": other(right, (secret + last) // 2),
        "last byte wrong": other(right, last),
        "last byte wrong, too": other(right, last),
        "unknown id": unknown,
        "revoked": lambda rng: "".join(gone),
        "revoked, last byte wrong": other(gone, last),
    }


def timing(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """F20: kinds of keys in turn, in random order, many rounds."""
    stores = write_pair(folder)
    keys = folder / "keys.json"
    variants = _variants(keys)
    ring = KeyRing(keys)
    right = variants["right"](random.Random())
    rounds = 200 if tiny else 20_000
    found = {"in process": _rounds(variants, lambda text: ring.find(text), rounds)}
    settings = {"failed_keys_per_minute": "100000000", "log_level": "error"}
    with logitstore_server(
        folder, stores, cores()[0], key=(keys, right), settings=settings
    ) as server:
        found["over HTTP"] = _over_http(server, variants, 50 if tiny else 2000)
    return {
        how: {
            "rounds": len(next(iter(times.values()))),
            "median_ns": {name: statistics.median(values) for name, values in times.items()},
            "differences": [
                {
                    "of": one,
                    "to": other,
                    "would_tell": what,
                    **_difference(times[one], times[other]),
                }
                for one, other, what in PAIRS
            ],
        }
        for how, times in found.items()
    }


def _over_http(server: Server, variants: Variants, rounds: int) -> dict[str, list[int]]:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    path = "/v1/stores/alpha/store.json"

    def ask(text: str) -> None:
        _ask(client, "GET", path, {"Authorization": f"Bearer {text}"})

    for make in variants.values():
        ask(make(random.Random()))
    return _rounds(variants, ask, rounds)


def _rounds(variants: Variants, run: Callable[[str], object], rounds: int) -> dict[str, list[int]]:
    """Nanoseconds of each kind in each round."""
    order = list(variants.items())
    rng = random.Random(0)
    times: dict[str, list[int]] = {name: [] for name in variants}
    for _ in range(rounds):
        rng.shuffle(order)
        for name, make in order:
            text = make(rng)
            start = time.perf_counter_ns()
            run(text)
            times[name].append(time.perf_counter_ns() - start)
    return times


def _difference(one: Sequence[int], other: Sequence[int]) -> dict[str, Any]:
    """Median of the differences within a round, with the order statistics that are its 95 % limits.

    Source: Conover, Practical Nonparametric Statistics, section 3.2.
    """
    differences = sorted(a - b for a, b in zip(one, other, strict=True))
    count = len(differences)
    half = 0.98 * count**0.5
    low = differences[max(0, int(count / 2 - half))]
    high = differences[min(count - 1, int(count / 2 + half) + 1)]
    return {
        "median_ns": statistics.median(differences),
        "low_ns": low,
        "high_ns": high,
        "significant": not low <= 0 <= high,
    }
