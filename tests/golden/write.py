"""Writes tiny stores that every later release must read: `python tests/golden/write.py FOLDER`.

Run once for a format version (or for a release that first uses a part of it), look at the result,
commit it. A folder that was committed is never written again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import logitstore
from logitstore import store
from logitstore.spec.tokenizer_table import TokenizerTable

VOCAB_SIZE = 97
TABLE = TokenizerTable(
    (b"<s>", *(bytes([32 + i]) for i in range(1, 95)), b"\xe2\x82", b"\xac"), frozenset({0})
)

STORES: dict[str, dict[str, Any]] = {
    "zarr-topk": {"container": "zarr", "signal": "topk:8", "lse_at": (2.0,)},
    "zarr-threshold": {"container": "zarr", "signal": "threshold:tau=1/8", "always_ids": (0,)},
    "zarr-sampled": {"container": "zarr", "signal": "sampled:20", "loss_mask": True},
    "zarr-graph": {"container": "zarr", "signal": "graph:k=3,form=vocab"},
    "arrow-topk": {"container": "arrow", "signal": "topk:8,p=0.9,coding=q8"},
    "arrow-dense": {"container": "arrow", "signal": "dense"},
}


def main(folder: Path) -> None:
    """Writes every store beside a file of the values that a reader must give."""
    for name, options in STORES.items():
        place = folder / name
        rng = np.random.default_rng(7)
        with logitstore.writer(
            place,
            vocab_size=VOCAB_SIZE,
            tokenizer=TABLE,
            chunk_positions=32,
            shard_positions=60,
            seed=5,
            **options,
        ) as writer:
            for number in range(7):
                length = int(rng.integers(3, 30))
                mask = rng.random(length) < 0.8
                writer.add(
                    rng.integers(0, VOCAB_SIZE, length),
                    rng.normal(0, 3, (length, VOCAB_SIZE)).astype(np.float32),
                    segment_ids=(np.arange(length) >= length // 2).astype(np.int64),
                    loss_mask=mask if "loss_mask" in options else None,
                    sample_key=f"golden#{number}@0",
                )
        with store.append(place) as sealer:
            sealer.seal()
        with store.open(place) as written:
            samples = [written.sample(i) for i in range(len(written))]
        expected = [
            {column: digest(values) for column, values in sample.arrays.items()}
            for sample in samples
        ]
        text = json.dumps({"samples": expected}, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def digest(values: np.ndarray) -> dict[str, Any]:
    """A column of one sample: type, shape and SHA-256 of its little-endian bytes."""
    data = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
    return {
        "dtype": values.dtype.name,
        "shape": list(values.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
