"""`py:module:function`: a teacher of one's own.

The function takes no argument and is called once in every worker. It returns an object that is
called as `teacher(tokens, segment_ids)` with two int64 tensors [B, T] and returns raw logits
[B, T, V] (a tensor or a numpy array): row t over token t + 1, and it must not look across segments.
Attributes:

    vocab_size    int, mandatory
    tokenizer     a `tokenizers.Tokenizer` or a transformers tokenizer; without one, text is its
                  UTF-8 bytes (ids 0 to 255)
    bos_id        int, the token that begins a document
    fingerprint   str, changes whenever the logits do; the module's source is part of it anyway
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitstore.corpora import ByteTokenizer, FastTokenizer, Sample, Tokenizer
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import TeacherInfo
from logitstore.teachers.base import TeacherOptions, block_rows, device_of

__all__ = ["FunctionTeacher", "load_function"]


def load_function(name: str) -> tuple[Any, str]:
    """Import and call `module:function`: what it returns, and its module's source.

    Modules are also found in the working directory.

    Raises: TeacherError teacher-load.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
        function: Callable[[], Any] = getattr(module, function_name)
        return function(), inspect.getsource(module)
    except Exception as error:
        raise TeacherError(
            "teacher-load",
            f"the teacher's function failed: {type(error).__name__}: {error}",
            where=f"py:{name}",
            expected="py:MODULE:FUNCTION, importable from here, taking no argument",
        ) from error


class FunctionTeacher:
    """Wraps the object that a user's function returned."""

    def __init__(self, name: str, model: Any, source: str, options: TeacherOptions) -> None:
        self._name = name
        self._model = model
        self._source = source
        self._threads = options.threads
        self._device = device_of(options)
        vocab_size = getattr(model, "vocab_size", None)
        if not callable(model) or not isinstance(vocab_size, int):
            raise TeacherError(
                "teacher-load",
                "the function did not return a teacher",
                where=f"py:{name}",
                got=type(model).__name__,
                expected="a callable with an int attribute vocab_size",
            )
        self.tokenizer = _tokenizer_of(model, name, vocab_size)
        self.vocab_size = min(vocab_size, len(self.tokenizer.table))
        self._columns = vocab_size
        self.settings: dict[str, str | int] = {"block_rows": block_rows(self.vocab_size)}

    @classmethod
    def load(cls, name: str, options: TeacherOptions) -> FunctionTeacher:
        """Import and call the function.

        Raises: TeacherError teacher-load.
        """
        return cls(name, *load_function(name), options)

    def describe(self) -> TeacherInfo:
        digest = hashlib.sha256(self._source.encode())
        digest.update(str(getattr(self._model, "fingerprint", "")).encode())
        return TeacherInfo(
            name=f"py:{self._name}",
            fingerprint=digest.hexdigest(),
            engine="torch",
            engine_version=torch.__version__,
            device_type=self._device.partition(":")[0],
            threads_per_worker=self._threads,
            masked_rows=self._columns - self.vocab_size,
        )

    @torch.no_grad()
    def blocks(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        tokens_BT = torch.from_numpy(np.stack([s.tokens for s in samples])).to(self._device)
        segment_ids_BT = torch.from_numpy(np.stack([s.segment_ids for s in samples]))
        out = self._model(tokens_BT, segment_ids_BT.to(self._device))
        logits_BTV = torch.as_tensor(out)
        expected = (*tokens_BT.shape, self._columns)
        if tuple(logits_BTV.shape) != expected:
            raise TeacherError(
                "teacher-shape",
                "logits have the wrong shape",
                where=f"py:{self._name}",
                got=tuple(logits_BTV.shape),
                expected=f"{expected} (samples, positions, vocab_size)",
            )
        yield from logits_BTV.flatten(0, 1)[:, : self.vocab_size].split(block_rows(self.vocab_size))


def _tokenizer_of(model: Any, name: str, vocab_size: int) -> Tokenizer:
    given = getattr(model, "tokenizer", None)
    bos_id: int | None = getattr(model, "bos_id", None)
    if given is None:
        if vocab_size < 256:
            raise TeacherError(
                "teacher-load",
                "a teacher without a tokenizer reads bytes and needs an id for each",
                where=f"py:{name}",
                got=f"vocab_size {vocab_size}",
                expected="at least 256, or an attribute tokenizer",
            )
        return ByteTokenizer(vocab_size, bos_id)
    backend = getattr(given, "backend_tokenizer", given)
    return FastTokenizer(backend, name=f"py:{name}", bos_id=bos_id, adds_bos=bos_id is not None)
