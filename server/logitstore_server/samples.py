"""GET /v1/stores/NAME/samples: any selection of samples, as an Arrow stream or a small JSON answer.

The stream has a record batch for each chunk that the selection touches in turn, more where it asks
for samples again and again, in the types of the arrow container, with a column `sample` in front.
Every answer says how many rows it has, in the header Logitstore-Rows and in the stream's own
metadata, because a stream that is cut between two batches reads like a shorter one. A process holds
one chunk of it at a time.

Source: Arrow IPC streaming format; its registered media type application/vnd.apache.arrow.stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from logitstore.containers.arrow_shard import batch_columns, record_batch
from logitstore.record import Record
from logitstore.record.topk import narrow_topk
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from logitstore.spec.schema import Schema
from logitstore.spec.signals import TopKSpec
from logitstore.store import Store
from logitstore.store.documents import object_key
from logitstore_server.json_values import plain
from logitstore_server.metrics import ROWS
from logitstore_server.problems import ServiceError
from logitstore_server.routing import ServedByName, problems, settings_of
from logitstore_server.sending import forget_mapped, send_blocks
from logitstore_server.stores import Opened, ServedStore

__all__ = ["ARROW_STREAM", "Columns", "add_routes", "batches", "chosen_columns"]

ARROW_STREAM = "application/vnd.apache.arrow.stream"
_JSON = "application/json"

# Of a JSON answer; larger ones are refused with a hint to the Arrow stream.
_MAX_JSON_SAMPLES = 100
_MAX_JSON_VALUES = 200_000

Codec = Literal["none", "lz4", "zstd"]
_CODECS: dict[str, str | None] = {"none": None, "identity": None, "lz4": "lz4", "zstd": "zstd"}
_LIST = re.compile(r"\d{1,18}(,\d{1,18})*")

# Examples and sizes of parameters are part of the OpenAPI document.
_Ids = Annotated[
    str | None,
    Query(
        description="Numbers of samples, in this order: `7,3,3`.",
        pattern=f"^{_LIST.pattern}$",
        max_length=60_000,
        examples=["0,1"],
    ),
]
_Bound = Annotated[int | None, Query(ge=0, le=1 << 53)]


@dataclass(frozen=True)
class Columns:
    """What a client wants of each sample.

    Attributes:
        names: columns of the answer, in the schema's order.
        read: columns to decode for them.
        k: of a top-K store only so many ids.
    """

    names: tuple[str, ...]
    read: tuple[str, ...]
    k: int | None


def add_routes(app: FastAPI) -> None:
    """Add the route of samples."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in [ARROW_STREAM]}
    content[_JSON] = {"schema": {"type": "object"}}
    app.add_api_route(
        "/v1/stores/{store}/samples",
        samples,
        methods=["GET"],
        tags=["samples"],
        response_model=None,
        response_class=Response,
        responses={
            200: {"description": "The samples.", "content": content},
            **problems(404, 406, 422),
        },
    )


async def samples(
    request: Request,
    served: ServedByName,
    ids: _Ids = None,
    start: _Bound = None,
    stop: _Bound = None,
    columns: Annotated[
        str | None,
        Query(description="Names of columns with commas between them; all by default."),
    ] = None,
    k: Annotated[
        int | None, Query(ge=1, le=65_535, description="Of a top-K store only the k largest ids.")
    ] = None,
    codecs: Annotated[
        Codec | None,
        Query(description="Compression of the Arrow buffers; `Accept: ...; codecs=` does the same"),
    ] = None,
) -> Response:
    """Samples by number: a list, or a range from `start` to before `stop`.

    Accept: application/vnd.apache.arrow.stream (the default; a parameter `codecs` names the
    buffer compressions that the client reads) or application/json for up to 100 samples.
    """
    media_type, codec = _negotiate(request.headers.get("accept"))
    if codecs is not None:
        codec = _CODECS[codecs]
    opened = await run_in_threadpool(served.opened)
    header = opened.store.header
    wanted = chosen_columns(header, columns, k)
    most = _MAX_JSON_SAMPLES if media_type == _JSON else settings_of(request).max_samples
    chosen = _chosen(opened.store, ids, start, stop, most)
    if media_type == _JSON:
        return await run_in_threadpool(_as_json, served, opened, chosen, wanted)
    return _ArrowResponse(served, opened, chosen, wanted, codec)


def chosen_columns(header: Header, text: str | None, k: int | None) -> Columns:
    """The columns of a request.

    Raises: UsageError bad-argument, conversion-refused.
    """
    known = batch_columns(header.schema_)
    names = known if text is None else text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            "bad-argument",
            "the store has no such column",
            got=unknown[0][:64],
            expected=", ".join(known),
        )
    ordered = tuple(name for name in known if name in names)
    read = set(ordered)
    if k is not None:
        spec = header.signal
        if not isinstance(spec, TopKSpec):
            raise UsageError(
                "conversion-refused",
                "k cuts top-K stores only; other signals have no order to cut",
                got=str(spec),
            )
        if k > spec.k:
            raise UsageError(
                "k-exceeds-vocabulary", "the store keeps fewer ids", got=k, expected=spec.k
            )
        if read & {"ids", "logprobs", "log_tail"}:
            read |= {"ids", "logprobs"}
    return Columns(ordered, tuple(name for name in known if name in read), k)


def batches(
    opened: Opened, chosen: Sequence[int], wanted: Columns
) -> Iterator[tuple[list[int], Record]]:
    """(numbers, record) of consecutive samples that lie in one chunk, which is decoded once.

    A generator: the next chunk is read when it is asked for. No record has more positions than its
    chunk: a request may name one sample thousands of times.
    """
    store = opened.store
    located = ((sample, store.locate(sample)) for sample in chosen)
    for (shard, chunk), group in groupby(located, key=lambda each: each[1][:2]):
        record = store.read_chunk(shard, chunk, wanted.read)
        for part in _parts(record, [(sample, row) for sample, (_, _, row) in group]):
            numbers, rows = [sample for sample, _ in part], [row for _, row in part]
            ROWS.labels(opened.name).inc(len(numbers))
            yield numbers, _cut(_rows(record, rows), store.header, wanted)
        _forget(opened, shard, chunk)


def _parts(record: Record, asked: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of (sample, row) that together have no more positions than the record."""
    lengths = np.diff(record.sample_offsets())
    part: list[tuple[int, int]] = []
    positions = 0
    for sample, row in asked:
        if part and positions + lengths[row] > record.num_positions:
            yield part
            part, positions = [], 0
        part.append((sample, row))
        positions += int(lengths[row])
    yield part


def _forget(opened: Opened, shard: int, chunk: int) -> None:
    """Take a chunk's bytes out of memory, where its file is mapped."""
    if opened.backend.location.kind == "local":
        ref, row = opened.store.shards[shard], opened.store.commit(shard).chunks[chunk]
        key = object_key(ref.object)
        data = opened.backend.get_range(key, row.offset, row.bytes, size_bytes=ref.object_bytes)
        forget_mapped(data, (row.offset, row.offset + row.bytes))


def _rows(record: Record, rows: list[int]) -> Record:
    first, last = rows[0], rows[-1]
    if rows == list(range(first, last + 1)):
        return record.slice(first, last + 1)
    return Record.concat([record.sample(row) for row in rows])


def _cut(record: Record, header: Header, wanted: Columns) -> Record:
    if wanted.k is not None and "logprobs" in record:
        assert isinstance(header.signal, TopKSpec)
        ragged = "num_ids" in record
        arrays = narrow_topk(record, k=wanted.k, p=math.inf if ragged else None)
        schema = record.schema if ragged else _narrow_schema(record.schema, wanted.k)
        held = [column for column in schema.columns if column.name in arrays]
        record = Record(
            schema, {c.name: np.asarray(arrays[c.name]).astype(c.dtype, copy=False) for c in held}
        )
    return record.select(wanted.names)


def _narrow_schema(schema: Schema, k: int) -> Schema:
    columns = tuple(
        column.model_copy(update={"inner": (k,)}) if column.name in ("ids", "logprobs") else column
        for column in schema.columns
    )
    return Schema(columns=columns, groups=schema.groups)


def _chosen(
    store: Store, ids: str | None, start: int | None, stop: int | None, most: int
) -> Sequence[int]:
    """Numbers of the samples asked for, each of which exists.

    Raises: UsageError bad-argument; NotFoundError sample-out-of-range.
    """
    chosen: Sequence[int]
    if ids is not None:
        if start is not None or stop is not None:
            raise UsageError("bad-argument", "ids and a range exclude each other")
        chosen = [int(number) for number in ids.split(",")]
        outside = [number for number in chosen if number >= store.num_samples]
        if outside:
            store.locate(outside[0])
    else:
        first = start or 0
        after = first + most if stop is None else stop
        chosen = range(first, min(after, store.num_samples))
    if len(chosen) > most:
        raise UsageError(
            "bad-argument",
            "too many samples in one request",
            got=len(chosen),
            expected=f"at most {most}",
            hint=f"ask again from a later start, or with `Accept: {ARROW_STREAM}`",
        )
    return chosen


def _negotiate(accept: str | None) -> tuple[str, str | None]:
    """Media type and buffer compression that the client likes best.

    Raises: ServiceError not-acceptable.
    """
    best: tuple[float, str, str | None] = (0.0, "", None)
    # A comma inside quotes separates codecs, not media types.
    for item in re.findall(r'(?:[^,"]|"[^"]*")+', accept or "*/*"):
        parts = re.findall(r'(?:[^;"]|"[^"]*")+', item) or [""]  # of ";" alone there are none
        name, *parameters = (part.strip() for part in parts)
        values = {
            key.strip().lower(): value.strip().strip('"').lower()
            for key, _, value in (parameter.partition("=") for parameter in parameters)
        }
        quality = 1.0
        if "q" in values:
            known = re.fullmatch(r"[01](?:\.\d{0,3})?", values["q"])
            quality = float(known[0]) if known else 0.0
        kind = {"*/*": ARROW_STREAM, "application/*": ARROW_STREAM}.get(name, name.lower())
        if kind not in (ARROW_STREAM, _JSON) or quality <= best[0]:
            continue
        likes = (word.strip() for word in values.get("codecs", "").split(","))
        best = quality, kind, next((_CODECS[word] for word in likes if word in _CODECS), None)
    if not best[1]:
        raise ServiceError(
            "not-acceptable", "samples have other media types", expected=f"{ARROW_STREAM}, {_JSON}"
        )
    return best[1:]


class _ArrowResponse(Response):
    """A selection as an Arrow IPC stream, made while it is sent."""

    def __init__(
        self,
        served: ServedStore,
        opened: Opened,
        chosen: Sequence[int],
        wanted: Columns,
        codec: str | None,
    ) -> None:
        self._parts = opened, chosen, wanted, codec
        self.status_code = 200
        self.background = None
        media_type = ARROW_STREAM if codec is None else f'{ARROW_STREAM}; codecs="{codec}"'
        self._fields = [
            (b"content-type", media_type.encode()),
            (b"logitstore-rows", str(len(chosen)).encode()),
            (b"logitstore-snapshot", opened.store.snapshot.digest.encode()),
            (b"cache-control", served.cache_control(immutable=False).encode()),
            (b"vary", b"Accept"),
            (b"x-content-type-options", b"nosniff"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_blocks(self._fields, _stream(*self._parts), scope, receive, send)


class _Blocks:
    """A file that keeps what was written since it was last emptied."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _stream(
    opened: Opened, chosen: Sequence[int], wanted: Columns, codec: str | None
) -> Iterator[bytes]:
    """The stream's bytes: one block for each batch, then the end marker."""
    store = opened.store
    sink = _Blocks()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    schema = _numbered([], _empty(store, wanted)).schema.with_metadata(
        {
            "logitstore.store_uuid": store.header.store_uuid,
            "logitstore.snapshot": store.snapshot.digest,
            "logitstore.signal": str(store.header.signal),
            "logitstore.rows": str(len(chosen)),
        }
    )
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for numbers, record in batches(opened, chosen, wanted):
            batch = _numbered(numbers, record_batch(record))
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            yield sink.take()
    yield sink.take()


def _empty(store: Store, wanted: Columns) -> pa.RecordBatch:
    """A batch without rows, for its types."""
    schema = store.header.schema_
    arrays = {column.name: np.zeros((0, *column.inner), column.dtype) for column in schema.columns}
    return record_batch(_cut(Record(schema, arrays).select(wanted.read), store.header, wanted))


def _numbered(numbers: Collection[int], batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array(numbers, pa.uint64()), *batch.columns], names=["sample", *batch.schema.names]
    )


def _as_json(
    served: ServedStore, opened: Opened, chosen: Sequence[int], wanted: Columns
) -> Response:
    rows: list[dict[str, Any]] = []
    values = 0
    for numbers, record in batches(opened, chosen, wanted):
        values += sum(array.size for array in record.arrays.values())
        if values > _MAX_JSON_VALUES:
            raise UsageError(
                "bad-argument",
                "too large for a JSON answer",
                got=f"over {_MAX_JSON_VALUES} values",
                expected="fewer samples or columns",
                hint=f"ask with `Accept: {ARROW_STREAM}`",
            )
        rows += _numbered(numbers, record_batch(record)).to_pylist()
    return JSONResponse(
        {"snapshot": opened.store.snapshot.digest, "num_rows": len(rows), "rows": plain(rows)},
        headers={
            "Cache-Control": served.cache_control(immutable=False),
            "Logitstore-Rows": str(len(rows)),
            "Vary": "Accept",
        },
    )
