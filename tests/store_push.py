"""Small stores for the store's tests, and a program that pushes one and can be killed at any step.

    python tests/store_push.py STORE CONTAINER KILL_AT

KILL_AT is the number of the write step after which the process kills itself (0: never). Every
step is printed as it happens, and every shard when its commit was reported.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from logitstore import store
from logitstore.record.new_header import new_header, now
from logitstore.record.record import Record
from logitstore.record.statistics import merge, statistics_of
from logitstore.spec.commit import Commit
from logitstore.spec.errors import CommitError
from logitstore.spec.header import Header, TeacherInfo, TokenizerInfo
from logitstore.spec.plan import (
    CorpusFile,
    CorpusInfo,
    Plan,
    ShardPlan,
    plan_fingerprint,
    shard_name,
)
from logitstore.spec.signals import parse_signal
from logitstore.spec.tokenizer_table import TOKENIZER_TABLE, TokenizerTable
from logitstore.store import steps

# Where tests that flush thousands of times keep their stores: in memory, where that can be had.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# Children are forked from a server that has only imported what they need: quick, and free of the
# threads of other tests. One list for all, since there is one such server.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "tests.test_store_racing",
        "tests.test_store_writing",
        "tests.test_store_concurrency",
        "logitstore.containers.zarr_shard",
        "logitstore.containers.arrow_shard",
        "pyarrow.ipc",
    ]
)

VOCAB = 97
K = 4
TABLE = TokenizerTable(
    (b"<s>", *(bytes([32 + i]) for i in range(1, 95)), b"\xe2\x82", b"\xac"), frozenset({0})
)


def race(location: str, committers: int) -> str:
    """Threads that commit one shard of a new store at once. Returns the attempt of the one that
    won; the others must all have been told so."""
    writer = store.create(location, header())
    planned = writer.add_plan(plan(writer.header, 1))
    barrier = threading.Barrier(committers)

    def commit(_: int) -> str:
        with writer.begin("0001-000000", planned) as attempt:
            added = record(writer.header, "0001-000000", 0)
            attempt.add(added)
            barrier.wait()
            try:
                attempt.commit(statistics=statistics_of(added))
                return attempt.attempt
            except CommitError as error:
                return error.kind

    with ThreadPoolExecutor(committers) as pool:
        outcomes = list(pool.map(commit, range(committers)))
    (winner,) = [o for o in outcomes if o != "already-committed"]
    return winner


def header(container: str = "zarr", seed: int = 0) -> Header:
    """A top-4 store over 97 ids."""
    return new_header(
        parse_signal(f"topk:{K}"),
        vocab_size=VOCAB,
        configuration={"signal": f"topk:{K}", "seed": seed, "packing": {"seq_len": 16}},
        teacher=TeacherInfo(name="numpy"),
        container=container,
        chunk_positions=64,
        seed=seed,
        tokenizer=TokenizerInfo(
            name="ascii",
            fingerprint=TABLE.fingerprint,
            size=VOCAB,
            bos="none",
            table=TOKENIZER_TABLE,
            special_ids=(0,),
        ),
    )


def tables() -> dict[str, bytes]:
    return {TOKENIZER_TABLE: TABLE.encode()}


def plan(head: Header, shards: int, number: int = 1) -> Plan:
    """A corpus plan of that many shards."""
    listed = tuple(ShardPlan(shard=shard_name(number, i)) for i in range(shards))
    corpus = CorpusInfo(
        format="text",
        files=(CorpusFile(name="none.txt", bytes=0, sha256="0" * 64),),
        documents=0,
        fingerprint="0" * 64,
    )
    digest = head.configuration_sha256
    return Plan(
        store_uuid=head.store_uuid,
        number=number,
        kind="corpus",
        created=now(),
        configuration_sha256=digest,
        corpus=corpus,
        shards=listed,
        fingerprint=plan_fingerprint(digest, number, corpus, listed),
    )


def record(head: Header, shard: str, chunk: int) -> Record:
    """Three samples of different lengths; a function of its arguments."""
    rng = np.random.default_rng([int(shard[:4]), int(shard[5:]), chunk])
    lengths = rng.integers(4, 17, 3)
    positions = int(lengths.sum())
    logits = rng.normal(0, 3, (positions, VOCAB))
    lse = np.log(np.exp(logits).sum(1))
    logprobs = logits - lse[:, None]
    ids = np.argsort(-logprobs, axis=1)[:, :K]
    kept = np.take_along_axis(logprobs, ids, 1)
    tokens = rng.integers(1, VOCAB, positions)
    keys = [f"{shard}/{chunk}/{i}".encode() for i in range(3)]
    values = {
        "sample_lengths": lengths,
        "num_sample_key": [len(k) for k in keys],
        "sample_key": np.frombuffer(b"".join(keys), np.uint8),
        "tokens": tokens,
        "segment_ids": np.zeros(positions),
        "label_logprob": logprobs[np.arange(positions), tokens],
        "label_rank": rng.integers(0, VOCAB, positions),
        "entropy": -(np.exp(logprobs) * logprobs).sum(1),
        "log_tail": np.log1p(-np.exp(kept).sum(1)),
        "lse": lse,
        "ids": ids,
        "logprobs": kept,
    }
    schema = head.schema_
    return Record(schema, {c.name: np.asarray(values[c.name], c.dtype) for c in schema.columns})


def commit_shard(
    writer: store.StoreWriter, planned: Plan, shard: str, chunks: int = 2, generation: int = 1
) -> Commit:
    """Capture one shard."""
    with writer.begin(shard, planned, generation=generation) as attempt:
        records = [record(writer.header, shard, i) for i in range(chunks)]
        for each in records:
            attempt.add(each)
        return attempt.commit(statistics=merge(map(statistics_of, records)))


def push(location: str, container: str, shards: int = 3, *, seal: bool = True) -> list[str]:
    """Create or continue a store and commit what is missing; names of the shards done here."""
    done = []
    try:
        writer = store.create(location, header(container), tables())
    except CommitError as error:
        if error.kind != "store-sealed":
            raise
        return done
    with writer:
        planned = writer.add_plan(plan(writer.header, shards))
        held = writer.committed()
        for each in planned.shards:
            if each.shard not in held:
                commit_shard(writer, planned, each.shard)
                done.append(each.shard)
                print(f"committed {each.shard}", flush=True)
        if seal:
            writer.seal()
    return done


def main() -> None:
    location, container, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    count = 0

    def hook(name: str) -> None:
        nonlocal count
        count += 1
        print(f"step {count} {name}", flush=True)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    steps.hook = hook
    push(location, container)


if __name__ == "__main__":
    main()
