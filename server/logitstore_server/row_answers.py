"""Answers of the routes in `rows`: the shapes of the Hugging Face dataset viewer's API."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

__all__ = [
    "ColumnStatistics",
    "Feature",
    "Info",
    "IsValid",
    "Page",
    "Row",
    "Size",
    "Split",
    "Splits",
    "StatisticsAnswer",
]


class Feature(BaseModel):
    """A column of rows."""

    feature_idx: int
    name: str
    type: dict[str, Any] = Field(examples=[{"dtype": "uint32", "_type": "Value"}])


class Row(BaseModel):
    """One sample."""

    row_idx: int = Field(description="Number of the sample in this snapshot.")
    row: dict[str, Any]
    truncated_cells: list[str] = Field(description="Columns that were cut.")


class Page(BaseModel):
    """Some rows of a store."""

    features: list[Feature]
    rows: list[Row]
    num_rows_total: int = Field(description="Samples of the store.")
    num_rows_per_page: int = Field(description="Most rows that a page can have.")
    partial: bool = Field(description="Samples remain that were not looked at.")
    truncated: bool = Field(description="Some cell was cut.")
    scanned: int = Field(description="Samples that were looked at for this page.")
    next: str | None = Field(description="Cursor to the next page, null after the last.")


class Split(BaseModel):
    """The one part of a store."""

    dataset: str
    config: str
    split: str


class Splits(BaseModel):
    """Parts of a store."""

    splits: list[Split]
    pending: list[str]
    failed: list[str]


class ColumnStatistics(BaseModel):
    """Statistics of one quantity over positions."""

    column_name: str
    column_type: str
    column_statistics: dict[str, Any]


class StatisticsAnswer(BaseModel):
    """What commits and index say; no sample is read."""

    num_examples: int
    num_positions: int
    labels: int = Field(description="Positions with a label.")
    statistics: list[ColumnStatistics]
    partial: bool


class Size(BaseModel):
    """Sizes of a store."""

    size: dict[str, Any]
    partial: bool = Field(description="The capture goes on.")


class Info(BaseModel):
    """What a store holds."""

    dataset_info: dict[str, Any]
    partial: bool


class IsValid(BaseModel):
    """What can be asked of a store."""

    preview: bool
    viewer: bool
    search: bool
    filter: bool
    statistics: bool
