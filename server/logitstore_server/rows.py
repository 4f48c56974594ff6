"""A store in the shapes of the Hugging Face dataset viewer's API, for people and small tools.

    GET /v1/stores/NAME/splits  first-rows  rows  filter  search  statistics  size  info  is-valid

A row is a sample. Pages hold at most 100 rows; long cells are cut and named in `truncated_cells`.
`filter` and `search` look at so many positions for one answer and say so: `partial` is true and
`next` leads on. Whole samples, with their distributions, come from `/samples`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, Query
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from logitstore.containers.arrow_shard import batch_columns, column_types, record_batch
from logitstore.record import Record
from logitstore.record.selection import Selection, parse_conditions
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from logitstore.spec.schema import Column, Schema
from logitstore.spec.statistics import Measure
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore_server.cursors import make_cursor, read_cursor
from logitstore_server.json_values import plain
from logitstore_server.routing import ServedByName, problems
from logitstore_server.row_answers import (
    ColumnStatistics,
    Feature,
    Info,
    IsValid,
    Page,
    Row,
    Size,
    Split,
    Splits,
    StatisticsAnswer,
)
from logitstore_server.samples import Columns, batches, chosen_columns
from logitstore_server.stores import Opened, ServedStore

__all__ = ["add_routes"]

MAX_LENGTH = 100

_CONFIG, _SPLIT = "default", "train"
_FIRST_ROWS = 10
_MAX_CELL_VALUES = 256
_MAX_TEXT_TOKENS = 2048
# Of one page, before cells are cut.
_MAX_PAGE_POSITIONS = 1 << 16
# Of one answer of filter or search, whichever comes first.
_MAX_SCANNED_POSITIONS = 1 << 20
_MAX_SCAN_S = 2.0
_MAX_CONDITIONS = 16

_CONDITIONS = TypeAdapter(
    list[tuple[str, str, str | int | float | list[str] | list[int] | list[float]]],
    config=ConfigDict(allow_inf_nan=False),
)

_Length = Annotated[int, Query(ge=1, le=MAX_LENGTH, description="Rows of the page.")]
_Cursor = Annotated[
    str | None, Query(max_length=300, description="`next` of the page before, as it is.")
]
_ColumnList = Annotated[
    str | None,
    Query(description="Names with commas between them; default: what has few values a position."),
]


def add_routes(app: FastAPI) -> None:
    """Add the viewer's routes."""
    for endpoint, model, statuses in (
        (splits, Splits, (404,)),
        (first_rows, Page, (404, 422)),
        (rows, Page, (404, 409, 422)),
        (filter_rows, Page, (404, 409, 422)),
        (search, Page, (404, 409, 422)),
        (statistics, StatisticsAnswer, (404,)),
        (size, Size, (404,)),
        (info, Info, (404,)),
        (is_valid, IsValid, (404,)),
    ):
        name = "filter" if endpoint is filter_rows else endpoint.__name__.replace("_", "-")
        app.add_api_route(
            f"/v1/stores/{{store}}/{name}",
            endpoint,
            methods=["GET"],
            tags=["rows"],
            response_model=model,
            responses=problems(*statuses),
        )


def splits(served: ServedByName) -> Splits:
    """The parts of a store: one."""
    served.opened()
    part = Split(dataset=served.name, config=_CONFIG, split=_SPLIT)
    return Splits(splits=[part], pending=[], failed=[])


def first_rows(served: ServedByName, columns: _ColumnList = None) -> Page:
    """The first ten rows."""
    return _page(served, columns, None, 0, _FIRST_ROWS)


def rows(
    served: ServedByName,
    offset: Annotated[int, Query(ge=0, le=1 << 53, description="First row.")] = 0,
    length: _Length = MAX_LENGTH,
    columns: _ColumnList = None,
    cursor: _Cursor = None,
) -> Page:
    """Rows from `offset`, or from where the page before ended."""
    return _page(served, columns, cursor, offset, length)


def filter_rows(
    served: ServedByName,
    where: Annotated[
        str,
        Query(
            max_length=4000,
            description="Conditions that must all hold, as JSON: [[field, operator, value], ...]. "
            "Fields: length, labels, sample_key, label, and COLUMN.mean, .min or .max over the "
            "positions that count. Operators: == != < <= > >= in, not in.",
            examples=['[["length", ">=", 2]]'],
        ),
    ],
    length: _Length = MAX_LENGTH,
    columns: _ColumnList = None,
    cursor: _Cursor = None,
) -> Page:
    """Rows whose stored values meet conditions, in the form of the dataset's `filter=`."""
    opened = served.opened()
    selection = _selection(where, opened.store.header)
    names = {column.name for column in opened.store.header.schema_.columns}
    needed = (selection.columns or set()) | names & {"segment_ids", "label", "loss_mask"}
    question = ["filter", [condition.as_json() for condition in selection.conditions]]
    return _scan(served, opened, question, needed, selection.keeps, columns, cursor, length)


def search(
    served: ServedByName,
    query: Annotated[
        str, Query(min_length=1, max_length=200, description="Text to look for, as it is.")
    ],
    length: _Length = MAX_LENGTH,
    columns: _ColumnList = None,
    cursor: _Cursor = None,
) -> Page:
    """Rows whose text holds a string, case and all."""
    opened = served.opened()
    table = served.tokenizer()
    if table is None or opened.store.header.schema_.column("tokens") is None:
        raise UsageError("bad-argument", "the store keeps no text to search")

    def holds(record: Record) -> NDArray[np.bool_]:
        offsets = record.sample_offsets()
        tokens = record["tokens"]
        texts = (table.text(tokens[offsets[i] : offsets[i + 1]]) for i in range(record.num_samples))
        return np.array([query in text for text in texts], np.bool_)

    return _scan(served, opened, ["search", query], {"tokens"}, holds, columns, cursor, length)


def statistics(served: ServedByName) -> StatisticsAnswer:
    """Mean, deviation, extremes and histogram of every measure; logarithms are natural."""
    opened = served.opened()
    found = opened.index.statistics
    return StatisticsAnswer(
        num_examples=opened.index.samples,
        num_positions=opened.index.positions,
        labels=found.labels,
        statistics=[
            ColumnStatistics(
                column_name=name, column_type="float", column_statistics=_measure(measure)
            )
            for name, measure in found.measures.items()
        ],
        partial=not opened.sealed,
    )


def size(served: ServedByName) -> Size:
    """Bytes and samples, of the store and of each stored column."""
    opened = served.opened()
    index = opened.index
    total = sum(row.object_bytes for row in index.shards)
    held = {
        "num_bytes_original_files": total,
        "num_rows": index.samples,
        "num_positions": index.positions,
        "num_columns": len(batch_columns(opened.store.header.schema_)),
        "column_bytes": dict(index.column_bytes),
    }
    part = {"dataset": served.name, "config": _CONFIG, "split": _SPLIT, **held}
    return Size(
        size={"dataset": {"dataset": served.name, **held}, "splits": [part]},
        partial=not opened.sealed,
    )


def info(served: ServedByName) -> Info:
    """Signal, teacher, tokenizer and columns."""
    opened = served.opened()
    header = opened.store.header
    wanted = chosen_columns(header, None, None)
    return Info(
        dataset_info={
            "dataset_name": served.name,
            "config_name": _CONFIG,
            "signal": header.signal.model_dump(mode="json", exclude_none=True),
            "sample_kind": header.sample_kind,
            "vocab_size": header.vocab_size,
            "teacher": header.teacher.model_dump(mode="json", exclude_none=True),
            "tokenizer": None if header.tokenizer is None else header.tokenizer.name,
            "features": {f.name: f.type for f in _features(header, wanted, None)},
            "splits": {_SPLIT: {"name": _SPLIT, "num_examples": opened.index.samples}},
            "store_uuid": header.store_uuid,
            "snapshot": opened.store.snapshot.digest,
        },
        partial=not opened.sealed,
    )


def is_valid(served: ServedByName) -> IsValid:
    """Which of the other paths answer for this store."""
    opened = served.opened()
    text = served.tokenizer() is not None
    text &= opened.store.header.schema_.column("tokens") is not None
    return IsValid(preview=True, viewer=True, search=text, filter=True, statistics=True)


def _page(
    served: ServedStore, columns: str | None, cursor: str | None, offset: int, length: int
) -> Page:
    opened = served.opened()
    store = opened.store
    wanted = _row_columns(store.header, columns)
    question = ["rows", wanted.names]
    start = offset if cursor is None else read_cursor(cursor, opened, question)
    table = served.tokenizer()
    page = _PageBuilder(store.header, wanted, table)
    chosen = range(start, min(start + length, store.num_samples))
    for numbers, record in batches(opened, chosen, wanted):
        page.add(numbers, record)
        if page.positions >= _MAX_PAGE_POSITIONS:
            break
    end = start + len(page.rows)
    return page.finish(opened, question, end, scanned=len(page.rows), wanted_length=length)


def _scan(
    served: ServedStore,
    opened: Opened,
    question: list[Any],
    needed: set[str],
    keeps: Callable[[Record], NDArray[np.bool_]],
    columns: str | None,
    cursor: str | None,
    length: int,
) -> Page:
    """Rows that a test keeps, from a cursor on, until the page or the budget is full."""
    store = opened.store
    wanted = _row_columns(store.header, columns)
    start = 0 if cursor is None else read_cursor(cursor, opened, question)
    page = _PageBuilder(store.header, wanted, served.tokenizer())
    names = {column.name for column in store.header.schema_.columns}
    tested = Columns((), tuple(needed & names), None)
    deadline_s = time.monotonic() + _MAX_SCAN_S
    at, scanned_positions = start, 0
    looked = batches(opened, range(start, store.num_samples), _all_read(tested))
    for numbers, record in looked:
        found = np.flatnonzero(keeps(record))[: length - len(page.rows)]
        if len(found):
            chosen = [numbers[int(i)] for i in found]
            for rows_of, held in batches(opened, chosen, wanted):
                page.add(rows_of, held)
        scanned_positions += record.num_positions
        full = len(page.rows) >= length
        at = (page.rows[-1].row_idx if full and page.rows else numbers[-1]) + 1
        over = time.monotonic() > deadline_s or scanned_positions >= _MAX_SCANNED_POSITIONS
        if full or over or page.positions >= _MAX_PAGE_POSITIONS:
            break
    return page.finish(opened, question, at, scanned=at - start, wanted_length=length)


def _all_read(columns: Columns) -> Columns:
    """Columns that stay in the record because a test needs them."""
    return Columns(columns.read, columns.read, None)


class _PageBuilder:
    """Collects rows and cuts long cells."""

    def __init__(self, header: Header, wanted: Columns, table: TokenizerTable | None) -> None:
        self._header = header
        self._wanted = wanted
        self._table = table if "tokens" in wanted.names else None
        self._widths = {c.name: math.prod(c.inner) for c in header.schema_.columns}
        self.rows: list[Row] = []
        self.positions = 0

    def add(self, numbers: list[int], record: Record) -> None:
        """Add the samples of a record."""
        batch = record_batch(record)
        offsets = record.sample_offsets()
        self.positions += record.num_positions
        for i, number in enumerate(numbers):
            row: dict[str, Any] = {}
            cut = []
            for name in batch.schema.names:
                row[name], whole = _cell(batch.column(name)[i], self._widths[name])
                if not whole:
                    cut.append(name)
            if self._table is not None:
                tokens = record["tokens"][offsets[i] : offsets[i + 1]]
                row["text"] = self._table.text(tokens[:_MAX_TEXT_TOKENS])
                if len(tokens) > _MAX_TEXT_TOKENS:
                    cut.append("text")
            self.rows.append(Row(row_idx=number, row=plain(row), truncated_cells=cut))

    def finish(
        self, opened: Opened, question: list[Any], end: int, *, scanned: int, wanted_length: int
    ) -> Page:
        more = end < opened.store.num_samples
        return Page(
            features=_features(self._header, self._wanted, self._table),
            rows=self.rows,
            num_rows_total=opened.store.num_samples,
            num_rows_per_page=MAX_LENGTH,
            partial=more and len(self.rows) < wanted_length,
            truncated=any(row.truncated_cells for row in self.rows),
            scanned=scanned,
            next=make_cursor(opened, question, end) if more else None,
        )


def _cell(scalar: pa.Scalar, width: int) -> tuple[Any, bool]:
    """A value for JSON, and whether it is whole."""
    if not isinstance(scalar, pa.ListScalar):
        return scalar.as_py(), True
    values = scalar.values
    most = max(1, _MAX_CELL_VALUES // width)
    return values[:most].to_pylist(), len(values) <= most


def _row_columns(header: Header, text: str | None) -> Columns:
    """The columns of rows; by default those that are not wide.

    Raises: UsageError bad-argument.
    """
    schema = header.schema_
    if text is None:
        text = ",".join(
            name for name in batch_columns(schema) if _is_slim(schema.column(name), schema)
        )
    wanted = chosen_columns(header, text, None)
    for column in schema.columns:
        if column.name in wanted.names and math.prod(column.inner) > _MAX_CELL_VALUES:
            raise UsageError(
                "bad-argument",
                "the column is too wide for a page",
                got=column.name,
                hint="ask /samples for it",
            )
    return wanted


def _is_slim(column: Column | None, schema: Schema) -> bool:
    assert column is not None
    group = schema.group(column.axis)
    return not column.inner and (group is None or group.text)


def _selection(where: str, header: Header) -> Selection:
    """The conditions of a request.

    Raises: UsageError bad-argument.
    """
    try:
        entries = _CONDITIONS.validate_json(where)
    except ValidationError as error:
        raise UsageError(
            "bad-argument",
            f"where is no list of conditions: {error.errors(include_url=False)[0]['msg']}",
            expected='JSON such as [["length", ">=", 32]]',
        ) from None
    if len(entries) > _MAX_CONDITIONS:
        raise UsageError(
            "bad-argument", "too many conditions", got=len(entries), expected=_MAX_CONDITIONS
        )
    return Selection(conditions=parse_conditions(entries, header))


def _measure(measure: Measure) -> dict[str, Any]:
    histogram = measure.histogram
    count = measure.count
    variance = measure.total_squares / count - measure.mean**2 if count else 0.0
    edges = [histogram.low + i * histogram.width for i in range(len(histogram.counts) + 1)]
    return {
        "count": count,
        "min": measure.least,
        "max": measure.greatest,
        "mean": measure.mean,
        "std": math.sqrt(max(0.0, variance)),
        "histogram": {"hist": list(histogram.counts), "bin_edges": edges},
    }


def _features(header: Header, wanted: Columns, table: TokenizerTable | None) -> list[Feature]:
    types = [
        (field.name, _type(field.type)) for field in column_types(header.schema_, wanted.names)
    ]
    if table is not None and "tokens" in wanted.names:
        types.append(("text", {"dtype": "string", "_type": "Value"}))
    return [Feature(feature_idx=i, name=name, type=kind) for i, (name, kind) in enumerate(types)]


def _type(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"feature": _type(kind.value_type), "_type": "List"}
    names = {"halffloat": "float16", "float": "float32"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}
