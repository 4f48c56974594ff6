"""A DataLoader that can stop after any batch and go on with the next one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils.data
from torch.utils.data import DataLoader

from logitstore.data.collate import Batch, Item, collate
from logitstore.data.dataset import LogitDataset
from logitstore.data.order import Interval, RankOrder, count, rank_part, remaining
from logitstore.data.prefetch import ChunkKey, Lookahead
from logitstore.data.state import LoaderState
from logitstore.spec.errors import LogitstoreError, StateError, UsageError
from logitstore.store import Snapshot

__all__ = ["Loader", "loader"]


@dataclass(frozen=True)
class _Place:
    """Where reading stands: `LoaderState` with the snapshot as an object, for this world size."""

    epoch: int
    snapshot: Snapshot
    intervals: tuple[Interval, ...]
    consumed: int = 0


class Loader(DataLoader[Batch]):
    """Batches of a `LogitDataset` with exact resume. Made by `loader`.

    Iterating reads the dataset's current epoch from its beginning, or goes on where a loaded state
    stands; an epoch read to its end moves the dataset on to the next one. `len` is the number of
    batches of a whole epoch, the same on every rank: when samples do not divide by ranks, some
    ranks have one sample more in their last batch.
    """

    def __init__(
        self,
        dataset: LogitDataset,
        batch_size: int,
        *,
        drop_last: bool,
        collate_fn: Callable[[Sequence[Item]], Batch],
        **options: Any,
    ) -> None:
        ahead = dataset.chunks_of if dataset.fetches_ahead else None
        readers = max(1, options.get("num_workers", 0))
        self._batches = _Batches(batch_size, drop_last, readers, ahead)
        super().__init__(
            _Reader(dataset, collate_fn),
            batch_sampler=self._batches,
            collate_fn=_as_is,
            **options,
        )
        self.source = dataset
        self._own_snapshot = dataset.store.snapshot
        self._place = self._beginning(dataset.epoch)
        self._loaded = False
        self._packed: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __len__(self) -> int:
        place = self._beginning(self.source.epoch)
        return self._batches.number(self._smallest_part(place), 0)

    def __iter__(self) -> Any:
        return self._iterate()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place after the last batch handed out; prefetched ones do not count."""
        return self._state(self._place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that `state` was taken at.

        `state` may come from any rank. With the world size it was saved at, the batches that follow
        are those of the uninterrupted run (for the same batch size); with another one, the ranks
        share exactly the samples that nobody has seen. A store that has grown since is read at the
        state's snapshot until the epoch ends.

        Raises: StateError state-malformed, state-mismatch (another store, snapshot, seed, filter).
        """
        parsed = LoaderState.parse(state)
        dataset = self.source
        where = dataset.store.location
        snapshot = Snapshot.from_state(parsed.snapshot)
        if snapshot.store_uuid != self._own_snapshot.store_uuid:
            raise StateError(
                "state-mismatch",
                "the state belongs to another store",
                where=where,
                got=f"store {snapshot.store_uuid}",
                expected=f"store {self._own_snapshot.store_uuid}",
            )
        parsed.check_order(dataset.order_parameters(), where=where)
        total = len(dataset.epoch_order(parsed.epoch, snapshot))
        if parsed.intervals and parsed.intervals[-1][1] > total:
            raise StateError(
                "state-malformed",
                "the state names places beyond the epoch",
                where=where,
                got=parsed.intervals[-1][1],
                expected=f"at most {total}",
            )
        intervals, consumed = parsed.intervals, parsed.consumed
        if parsed.world_size != dataset.world_size:
            intervals = remaining(intervals, parsed.world_size, consumed, dataset.tail)
            consumed = 0
        self._place = _Place(parsed.epoch, snapshot, intervals, consumed)
        self._loaded = True
        self._packed = None
        dataset.set_epoch(parsed.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Read this epoch next. The epoch of a loaded state keeps the state's place."""
        self.source.set_epoch(epoch)
        if epoch != self._place.epoch:
            self._place = self._beginning(epoch)
            self._loaded = False

    def _iterate(self) -> Iterator[Batch]:
        dataset = self.source
        if not self._loaded or self._place.epoch != dataset.epoch:
            self._place = self._beginning(dataset.epoch)
        self._loaded = False
        place = self._place
        order = dataset.epoch_order(place.epoch, place.snapshot)
        part = rank_part(place.intervals, dataset.world_size, dataset.rank, dataset.tail)
        smallest = self._smallest_part(place)
        self._batches.begin(RankOrder(order, part), smallest, place.consumed)
        last = self._batches.number(smallest, place.consumed)
        for number, batch in enumerate(super().__iter__(), start=1):
            if isinstance(batch, LogitstoreError):
                raise batch
            if number < last:
                consumed = place.consumed + number * self._batches.batch_size
                self._place = dataclasses.replace(place, consumed=consumed)
            else:
                self._place = self._beginning(place.epoch + 1)
            yield dataclasses.replace(batch, state=self._state(self._place))
        self._place = self._beginning(place.epoch + 1)
        dataset.set_epoch(place.epoch + 1)

    def _beginning(self, epoch: int) -> _Place:
        return _Place(epoch, self._own_snapshot, ((0, self.source.epoch_samples),))

    def _smallest_part(self, place: _Place) -> int:
        return count(place.intervals) // self.source.world_size

    def _state(self, place: _Place) -> dict[str, Any]:
        # All but `consumed` is the same from batch to batch, and a snapshot takes time to pack.
        stretch = (place.epoch, place.intervals, id(place.snapshot))
        if self._packed is None or self._packed[0] != stretch:
            state = LoaderState(
                snapshot=place.snapshot.as_state(),
                order=json.loads(json.dumps(self.source.order_parameters())),
                epoch=place.epoch,
                world_size=self.source.world_size,
                intervals=place.intervals,
                consumed=0,
            )
            self._packed = (stretch, state.model_dump(mode="json"))
        return {**self._packed[1], "consumed": place.consumed}


def loader(
    dataset: LogitDataset,
    batch_size: int,
    *,
    num_workers: int = 0,
    drop_last: bool = False,
    collate_fn: Callable[[Sequence[Item]], Batch] = collate,
    **options: Any,
) -> Loader:
    """A DataLoader over this rank's epoch whose `state_dict()` resumes exactly.

    Args:
        dataset: its rank, world size and epoch are the loader's.
        batch_size: samples per batch and rank.
        num_workers: worker processes; 0 reads in this process, which is fastest as long as decoding
            takes less time than a training step. Workers of remote stores are started by
            "forkserver", since their connections do not survive a fork.
        drop_last: leave out a last batch that is not full.
        collate_fn: items to a `Batch`.
        options: pin_memory, prefetch_factor, persistent_workers, timeout, worker_init_fn,
            multiprocessing_context of `torch.utils.data.DataLoader`.

    Raises: UsageError bad-argument.
    """
    own = {"shuffle", "sampler", "batch_sampler"} & options.keys()
    if own:
        raise UsageError(
            "bad-argument",
            "the dataset decides the order",
            where=f"loader {', '.join(sorted(own))}",
            hint="LogitDataset(..., shuffle=True, seed=...)",
        )
    if batch_size < 1:
        raise UsageError(
            "bad-argument", "must be positive", where="loader batch_size", got=batch_size
        )
    if num_workers and dataset.store.location.kind != "local":
        options.setdefault("multiprocessing_context", "forkserver")
    return Loader(
        dataset,
        batch_size,
        drop_last=drop_last,
        collate_fn=collate_fn,
        num_workers=num_workers,
        **options,
    )


class _Request(NamedTuple):
    """Sample numbers of a batch, and chunks that its reader needs soon."""

    numbers: list[int]
    soon: list[ChunkKey]


class _Batches(torch.utils.data.Sampler[Any]):
    """Sample numbers of each batch. Workers get numbers and not places, so that they need to know
    neither epoch nor snapshot nor where a state stood.

    Args:
        readers: processes that read; batch i is read by number i % readers.
        chunks_of: sample numbers -> their chunks, where fetching ahead helps.
    """

    def __init__(
        self,
        batch_size: int,
        drop_last: bool,
        readers: int,
        chunks_of: Callable[[Sequence[int]], list[ChunkKey]] | None,
    ) -> None:
        self.batch_size, self._drop_last = batch_size, drop_last
        self._readers, self._chunks_of = readers, chunks_of
        self._order: RankOrder | None = None
        self._smallest_part, self._consumed = 0, 0

    def begin(self, order: RankOrder, smallest_part: int, consumed: int) -> None:
        """What the next iteration reads."""
        self._order, self._smallest_part, self._consumed = order, smallest_part, consumed

    def number(self, smallest_part: int, consumed: int) -> int:
        """Batches after `consumed` places; a function of the smallest part, so that ranks agree."""
        left = max(smallest_part - consumed, 0)
        return left // self.batch_size if self._drop_last else -(-left // self.batch_size)

    def __iter__(self) -> Iterator[_Request]:
        order, chunks_of = self._order, self._chunks_of
        assert order is not None
        number = self.number(self._smallest_part, self._consumed)

        def numbers(batch: int) -> list[int]:
            start = self._consumed + batch * self.batch_size
            last = batch == number - 1 and not self._drop_last
            stop = len(order) if last else start + self.batch_size
            return order.numbers(start, stop).tolist()

        ahead = (
            []
            if chunks_of is None
            else [
                Lookahead(lambda batch: chunks_of(numbers(batch)), first, self._readers, number)
                for first in range(self._readers)
            ]
        )
        for batch in range(number):
            soon = ahead[batch % self._readers].at(batch) if ahead else []
            yield _Request(numbers(batch), soon)


class _Reader(torch.utils.data.Dataset[Batch]):
    """Makes batches of sample numbers, in this process or in a worker."""

    def __init__(
        self, dataset: LogitDataset, collate_fn: Callable[[Sequence[Item]], Batch]
    ) -> None:
        self._dataset, self._collate = dataset, collate_fn

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> Batch:
        return self._collate(self._dataset.items([number]))

    def __getitems__(self, request: _Request) -> Batch | LogitstoreError:
        try:
            if request.soon:
                self._dataset.announce(request.soon)
            return self._collate(self._dataset.items(request.numbers))
        except LogitstoreError as error:
            # Raised in a worker it would reach the parent as a RuntimeError; as a value it keeps
            # its class and kind.
            return error


def _as_is(batch: Any) -> Any:
    return batch
