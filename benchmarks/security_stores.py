"""The small stores and the live services that the security figures are taken from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import logitstore
import logitstore.store
from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["VOCAB", "cores", "forged", "framed", "push", "write_pair"]

VOCAB = 64


def push(
    place: Path,
    *,
    signal: str = "topk:8",
    container: str = "zarr",
    seed: int = 0,
    tokens: tuple[bytes, ...] = (),
    keys: tuple[str, ...] = (),
    samples: int = 6,
) -> Path:
    """A sealed store of a few samples; `tokens` are the first words of its vocabulary, and `keys`
    its samples' names."""
    words = tuple(f" w{i}".encode() for i in range(len(tokens) + 1, VOCAB))
    table = TokenizerTable((b"<s>", *tokens, *words)[: max(VOCAB, len(tokens) + 1)], frozenset({0}))
    rng = np.random.default_rng(seed)
    with logitstore.writer(
        place,
        signal=signal,
        container=container,
        vocab_size=len(table),
        tokenizer=table,
        chunk_positions=64,
        shard_positions=128,
    ) as writer:
        for number in range(samples):
            length = 40 if not tokens else len(table)
            key = keys[number % len(keys)] if keys else f"docs/{number}.txt"
            ids = rng.permutation(len(table))[:length]
            logits = rng.normal(0, 3, (length, len(table))).astype(np.float32)
            writer.add(ids, logits, sample_key=key)
    with logitstore.store.append(place) as sealing:
        sealing.seal()
    return place


def write_pair(folder: Path) -> dict[str, Path]:
    """name -> folder of `alpha` and `beta`, whose contents differ."""
    return {
        name: push(folder / name, seed=seed, container=container)
        for seed, (name, container) in enumerate((("alpha", "zarr"), ("beta", "arrow")))
    }


def framed(body: bytes) -> bytes:
    """A document's file with a digest that is right."""
    return b'{"sha256":"%s","body":%s}\n' % (sha256_hex(body).encode(), body)


def forged(
    place: Path,
    *,
    chunk: Callable[[bytes, Store], bytes] | None = None,
    object_: Callable[[bytes], bytes] | None = None,
    commit: Callable[[dict[str, Any]], None] | None = None,
    header: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Change the first chunk, the first commit and the header of a store, and make every digest
    right again: what somebody gives us who writes a store by hand.

    Args:
        chunk: the new bytes for the old ones, in their place.
        object_: the new bytes of the whole object; what it moves is for `commit` to correct.
        commit, header: change the document's body.
    """
    from logitstore.containers.protocol import crc32c

    with logitstore.store.open(place) as opened:
        shard = opened.shards[0].object
        row = opened.commit(0).chunks[0]
        path = place / "shards" / shard
        data = path.read_bytes()
        part = data[row.offset : row.offset + row.bytes]
        new = part if chunk is None else chunk(part, opened)
    data = data[: row.offset] + new + data[row.offset + row.bytes :]
    if object_ is not None:
        data = object_(data)
    _write(path, data)
    grown = len(new) - len(part)
    size, digest = len(data), sha256_hex(data)

    def changed(body: dict[str, Any]) -> None:
        body["object"] |= {"bytes": size, "sha256": digest}
        first, *rest = body["chunks"]
        first |= {"bytes": len(new), "crc32c": crc32c(new)}
        for each in rest:
            each["offset"] += grown
        if commit is not None:
            commit(body)

    commit_path = next((place / "commits").glob(f"{shard.split('.')[0]}.*"))
    commit_sha256 = _edit(commit_path, changed)
    header_sha256 = _edit(place / "store.json", header or (lambda body: None))

    def indexed(body: dict[str, Any]) -> None:
        body["header_sha256"] = header_sha256
        body["shards"][0] |= {
            "commit_sha256": commit_sha256,
            "object_bytes": size,
            "object_sha256": digest,
        }

    _edit(place / "index.json", indexed)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Change a document's body; the digest of the new one."""
    body = json.loads(path.read_bytes())["body"]
    change(body)
    data = canonical_json(body)
    _write(path, framed(data))
    return sha256_hex(data)


def _write(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def cores() -> tuple[int, int]:
    """The core of servers and the core of clients."""
    own = sorted(os.sched_getaffinity(0))
    return own[0], own[-1]
