"""Small stores for the viewer's tests, and a viewer that listens on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

import logitstore
from logitstore import store
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore_server.viewer import viewer_app

VOCAB = 40
HOSTILE = [
    b"<img src=x onerror=\"document.title='owned'\">",
    b"</script><script>document.title='owned'</script>",
    "\u202egnp.exe\u2066".encode(),
    b"W" * 10_240,
    b"\xe2\x82",
    b"\x1b[2J\x00",
    "\u05e9\u05dc\u05d5\u05dd".encode(),
    b"{{ 7 * 7 }}",
    b"\n",
    " \u0301\u0301\u0301".encode(),
]
SIGNALS = {
    "topk": "topk:8",
    "q8": "topk:8,p=0.9,coding=q8",
    "sampled": "sampled:20",
    "threshold": "threshold:tau=1/10",
    "dense": "dense:dtype=float32",
    "graph": "graph:k=3",
    "vocab-graph": "graph:k=3,form=vocab",
}
# Name of a store.
HOSTILE_STORE = "<img src=x onerror=alert(1)>"
TABLE = TokenizerTable((b"<s>", *(f" w{i}".encode() for i in range(1, VOCAB))), frozenset({0}))
HOSTILE_TABLE = TokenizerTable(
    (b"<s>", *HOSTILE, *(f" w{i}".encode() for i in range(len(HOSTILE) + 1, VOCAB))), frozenset({0})
)


def logits(tokens: int, seed: int) -> np.ndarray:
    """float32 [T, V]: some rows sure, some not."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 6, (tokens, 1))
    return (rng.normal(0, 1, (tokens, VOCAB)) * spread).astype(np.float32)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(float)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def push(
    place: Path,
    signal: str,
    *,
    lengths: tuple[int, ...] = (12, 30, 7, 21),
    table: TokenizerTable | None = TABLE,
    seed: int = 0,
    noise: float = 0.0,
    key: str = "docs/a<b>.txt#{}@0",
    **options: Any,
) -> Path:
    """A store of pushed samples; equal arguments but `signal` give equal tokens and logits."""
    with logitstore.writer(
        place,
        signal=signal,
        vocab_size=VOCAB,
        tokenizer=table,
        **{"chunk_positions": 32, "shard_positions": 40, **options},
    ) as writer:
        for number, length in enumerate(lengths):
            rng = np.random.default_rng([seed, number])
            tokens = rng.integers(0, VOCAB, length)
            shift = np.random.default_rng([9, number]).normal(0, 1, (length, VOCAB)) * noise
            writer.add(
                tokens,
                (logits(length, seed + number) + shift).astype(np.float32),
                sample_key=key.format(number),
            )
    return place


@contextmanager
def serving(stores: Mapping[str, store.Store]) -> Iterator[str]:
    """The address of a viewer of these stores, without a final slash."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(viewer_app(stores), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
