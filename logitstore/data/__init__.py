"""The student's side: datasets, batches, epoch order and exact resume."""

from logitstore.data.collate import Batch, Item, SampleId, collate
from logitstore.data.dataset import LogitDataset
from logitstore.data.loader import Loader, loader
from logitstore.data.replay import replay
from logitstore.data.retokenize import StudentBatch, retokenizer

__all__ = [
    "Batch",
    "Item",
    "Loader",
    "LogitDataset",
    "SampleId",
    "StudentBatch",
    "collate",
    "loader",
    "replay",
    "retokenizer",
]
