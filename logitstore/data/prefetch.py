"""Fetching the chunks of a remote store before they are needed, while the trainer computes.

The order of an epoch is known, so nothing is guessed: the sampler tells with each batch which
chunks come into use soon, and the process that reads the batch fetches them with a few threads.
Only bytes are fetched ahead; what is read, and in which order, is the same without.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from logitstore.spec.errors import StorageError
from logitstore.store import Store

__all__ = ["AHEAD_CHUNKS", "ChunkKey", "Lookahead", "Prefetcher"]

# (shard, chunk) numbers
ChunkKey = tuple[int, int]

# Some 65,000 positions: seconds of training for a small student, a few megabytes of memory.
AHEAD_CHUNKS = 32
# Enough to hide 20 ms to a server at 800,000 positions a second.
_THREADS = 8
# Chunks lie within one window of the shuffle, or two.
_REMEMBERED = 16 * AHEAD_CHUNKS


class Lookahead:
    """Chunks that a reader of every `step`-th batch needs next, each told once.

    Args:
        chunks_of: number of a batch -> its chunks.
        first, step: the reader's batches are first, first + step, ...
        stop: number of batches.
        distance: so many chunks are told before the batch that needs them.
    """

    def __init__(
        self,
        chunks_of: Callable[[int], Iterable[ChunkKey]],
        first: int,
        step: int,
        stop: int,
        distance: int = AHEAD_CHUNKS,
    ) -> None:
        self._chunks_of = chunks_of
        self._next, self._step, self._stop = first, step, stop
        self._distance = distance
        self._needed_at: deque[int] = deque()  # of what was told and is not in use yet
        self._told: OrderedDict[ChunkKey, None] = OrderedDict()

    def at(self, batch: int) -> list[ChunkKey]:
        """Chunks to fetch from now on, in the order of need; the batch's own come first."""
        while self._needed_at and self._needed_at[0] < batch:
            self._needed_at.popleft()
        new: list[ChunkKey] = []
        while self._next < self._stop and len(self._needed_at) < self._distance:
            for key in self._chunks_of(self._next):
                if key not in self._told:
                    new.append(key)
                    self._needed_at.append(self._next)
                self._told[key] = None
                self._told.move_to_end(key)
            self._next += self._step
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        return new


class Prefetcher:
    """Bytes of announced chunks, fetched by threads until they are taken.

    What the host's cache holds is not fetched: reading it where it is used costs less than handing
    it over from a thread, and its disk begins to read when it is announced.

    What is announced and never taken, because an epoch was broken off, makes place for the next.
    A forked child starts with nothing, since it has none of the threads.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="logitstore-prefetch")
        self._futures: OrderedDict[ChunkKey, Future[memoryview]] = OrderedDict()

    def announce(self, keys: Iterable[ChunkKey]) -> None:
        """Fetch these, in this order."""
        if self._pid != os.getpid():
            return
        for key in keys:
            if key not in self._futures and not self._store.is_near(*key):
                self._futures[key] = self._pool.submit(self._store.chunk_bytes, *key)
        while len(self._futures) > 4 * AHEAD_CHUNKS:
            _, dropped = self._futures.popitem(last=False)
            dropped.cancel()

    def take(self, key: ChunkKey) -> memoryview | None:
        """The chunk's bytes, once they are there; None when it was not announced, or when the
        storage failed, so that the caller, who may wait longer, asks again.

        Raises: IntegrityError, FormatError and NotFoundError of `Store.chunk_bytes`.
        """
        future = self._futures.pop(key, None) if self._pid == os.getpid() else None
        if future is None:
            return None
        try:
            return future.result()
        except StorageError:
            return None

    def close(self) -> None:
        """Stop; what is under way is finished and dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._futures.clear()
