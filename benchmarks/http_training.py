"""A training loop's side of the HTTP benchmark; each function runs in a process on one core."""

from __future__ import annotations

import time
from typing import Any

import torch

import logitstore as ls
from logitstore.data import LogitDataset, loader
from logitstore.store import open as open_store

__all__ = ["cold_open", "epoch", "trainer"]

BATCH_SIZE = 4


def epoch(location: str, number: int, cache_dir: str | None) -> dict[str, float]:
    """One shuffled epoch of decoded batches by a fresh dataset, which remembers nothing."""
    torch.set_num_threads(1)
    with LogitDataset(location, shuffle=True, seed=number, cache_dir=cache_dir) as dataset:
        samples = positions = checksum = 0
        start, cpu = time.perf_counter(), time.process_time()
        for batch in loader(dataset, BATCH_SIZE):
            samples += len(batch)
            positions += batch.tokens.numel()
            checksum += int(batch.tokens.sum())
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        if samples != len(dataset):
            raise RuntimeError(f"{samples} of {len(dataset)} samples from {location}")
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "positions": positions,
        "samples": samples,
        "checksum": checksum,
    }


def trainer(location: str, steps: int, *, ahead: bool) -> dict[str, float]:
    """Trains a small student on top-K records; how long it waits for data.

    Args:
        ahead: fetch chunks before they are needed, as datasets of remote stores do.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with LogitDataset(location, shuffle=True) as dataset:
        vocab_size = dataset.header.vocab_size
        student = torch.nn.Sequential(
            torch.nn.Embedding(vocab_size, 64), torch.nn.Linear(64, vocab_size)
        )
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        waited_s = 0.0
        done = 0
        batched = loader(dataset, BATCH_SIZE)
        if not ahead:
            batched.batch_sampler._chunks_of = None  # type: ignore[union-attr]
        begin = time.perf_counter()
        while done < steps:
            before = time.perf_counter()
            for batch in batched:
                waited_s += time.perf_counter() - before
                loss = ls.losses.forward_kl(
                    student(batch.tokens), batch.targets, mask=batch.loss_mask
                )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == steps:
                    break
                before = time.perf_counter()
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "waited_s": waited_s, "steps": done, "step_s": seconds / done}


def cold_open(location: str) -> dict[str, Any]:
    """Opens a store: header and index."""
    start = time.perf_counter()
    with open_store(location) as store:
        return {"open_s": time.perf_counter() - start, "shards": len(store.shards)}
