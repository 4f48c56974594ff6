"""The student's side: datasets, batches, epoch order and exact resume."""

from logitstore.data.collate import Batch, Item, SampleId, collate
from logitstore.data.dataset import LogitDataset
from logitstore.data.loader import Loader, loader

__all__ = [
    "Batch",
    "Item",
    "Loader",
    "LogitDataset",
    "SampleId",
    "collate",
    "loader",
]
