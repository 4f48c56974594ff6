"""Corpora: files to documents, documents to packed samples; examples for classifiers.

Nothing here needs torch.
"""

from logitstore.corpora.arrays import ArrayExamples, ArrayFiles, array_format
from logitstore.corpora.documents import Corpus, Document
from logitstore.corpora.examples import Classes, Example, TextExamples
from logitstore.corpora.files import SourceFile, describe_files, find_files
from logitstore.corpora.packing import Sample, labels_of, pack, position_ids_of
from logitstore.corpora.spans import Unit, plan_units
from logitstore.corpora.tokenizer import ByteTokenizer, Encoded, FastTokenizer, Tokenizer

__all__ = [
    "ArrayExamples",
    "ArrayFiles",
    "ByteTokenizer",
    "Classes",
    "Corpus",
    "Document",
    "Encoded",
    "Example",
    "FastTokenizer",
    "Sample",
    "SourceFile",
    "TextExamples",
    "Tokenizer",
    "Unit",
    "array_format",
    "describe_files",
    "find_files",
    "labels_of",
    "pack",
    "plan_units",
    "position_ids_of",
]
