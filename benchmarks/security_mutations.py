"""Inputs that nearly are what a parser expects: mutations of real ones, and random bytes.

Each is a function of a seed and a number, so that one that breaks something can be made again.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

__all__ = ["made"]

# What parsers stumble over: signs, limits, encodings, separators, names that lead elsewhere.
_TOKENS = (
    *(
        b"\0",
        b"\xff\xff\xff\xff",
        b"\x80",
        b"-1",
        b"-0",
        b"9" * 30,
        b"9" * 400,
        b"1e999",
        b"NaN",
        b"Infinity",
    ),
    *(b"null", b"true", b"[]", b"{}", b'"', b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"\xc0\xaf"),
    *(b"[" * 2000, b'{"a":' * 500, b"..", b"../", b"%00", b"%2e%2e%2f", b",", b"=", b"-", b";q="),
    *(b"bytes=", b"\r\n", b"\t", b" ", b"*", b"W/", b"&", b"\xe2\x80\xae", b"0x10", b"1_000"),
)
_INTEGERS = (0, 1, 127, 128, 255, 256, 32767, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_WIDE = (*_INTEGERS, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 65_536, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**40),
    *(0.5, -0.0, 1e308, 1e-308, "", "x", "0" * 64, "..", "../x", "/etc/passwd", "\0", "\ud800"),
    *("a" * 5000, [], {}, [[]], {"": None}, [0] * 300, {"kind": "topk"}, {"k": -1}, "\u202e"),
)


def made(seeds: Sequence[bytes], seed: int, number: int, *, is_json: bool) -> bytes:
    """The input of that number."""
    rng = random.Random(f"{seed}:{number}")
    if number < len(seeds):
        return seeds[number]
    chosen = rng.choice(seeds)
    kind = rng.randrange(20)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    if is_json and kind < 12:
        try:
            tree = _mutated_tree(rng, json.loads(chosen))
            # Lone surrogates have no UTF-8 but do have an escape.
            return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")
        except (ValueError, RecursionError):
            pass
    return _mutated_bytes(rng, chosen, seeds)


def _mutated_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        at = rng.randrange(len(out) + 1)
        stop = min(len(out), at + rng.randrange(1, 33))
        kind = rng.randrange(9)
        if kind == 0 and out:
            out[at - 1] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at - 1] = rng.randrange(256)
        elif kind == 2:
            out[at:at] = rng.choice(_TOKENS)
        elif kind == 3:
            del out[at:stop]
        elif kind == 4:
            out[at:at] = out[at:stop] * rng.randrange(1, 5)
        elif kind == 5:
            out[at : at + 4] = struct.pack("<I", rng.choice(_INTEGERS))
        elif kind == 6:
            out[at : at + 8] = struct.pack("<Q", rng.choice(_WIDE))
        elif kind == 7 and rng.random() < 0.3:
            del out[at:]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at:stop] = other[start : start + rng.randrange(65)]
    return bytes(out)


def _mutated_tree(rng: random.Random, tree: Any) -> Any:
    for _ in range(rng.randrange(1, 4)):
        tree = _changed(rng, tree)
    return tree


def _changed(rng: random.Random, node: Any) -> Any:
    """A copy with one node, somewhere, another."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(list(node))
        kind = rng.randrange(12)
        if kind == 0:
            return {k: v for k, v in node.items() if k != key}
        if kind == 1:
            return {**node, rng.choice(["", "x", key + "_", "__class__"]): node[key]}
        return {**node, key: _changed(rng, node[key])}
    if isinstance(node, list) and node and rng.random() < 0.9:
        at = rng.randrange(len(node))
        kind = rng.randrange(12)
        if kind == 0:
            return node[:at] + node[at + 1 :]
        if kind == 1:
            return [*node, node[at]] if rng.random() < 0.5 else node[::-1]
        return [*node[:at], _changed(rng, node[at]), *node[at + 1 :]]
    if isinstance(node, int) and not isinstance(node, bool) and rng.random() < 0.5:
        return node + rng.choice([-1, 1, 1 << 16, 1 << 31, -(1 << 31)])
    return rng.choice(_VALUES)
