"""Classifiers: one row of logits a sample.

`py:module:function`: the function takes no argument and is called once in every worker. It returns
an object that is called with a batch of inputs, a tensor [B, ...] of the arrays' own dtype or a
list of B texts, and returns raw logits [B, V] (a tensor or a numpy array). Attributes:

    num_classes   int, mandatory
    class_names   sequence of str, lets a corpus name its labels
    fingerprint   str, changes whenever the logits do; the module's source is part of it anyway

`hf:PATH_OR_ID`: a sequence classifier of transformers, over texts.

Letters: B samples, V classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitstore.corpora import Classes, Example
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import TeacherInfo
from logitstore.teachers.base import TeacherOptions, device_of
from logitstore.teachers.folder import LoadedFolder, load_folder
from logitstore.teachers.function import load_function

__all__ = ["FunctionClassifier", "SequenceClassifier"]


class FunctionClassifier:
    """Wraps the object that a user's function returned."""

    def __init__(self, name: str, model: Any, source: str, options: TeacherOptions) -> None:
        self._name = name
        self._model = model
        self._source = source
        self._threads = options.threads
        self._device = device_of(options)
        number = getattr(model, "num_classes", None)
        names = tuple(str(n) for n in getattr(model, "class_names", None) or ())
        if not callable(model) or not isinstance(number, int) or len(names) not in (0, number):
            raise TeacherError(
                "teacher-load",
                "the function did not return a classifier",
                where=f"py:{name}",
                got=f"{type(model).__name__}, num_classes {number!r}, {len(names)} class_names",
                expected="a callable with an int attribute num_classes "
                "and as many class_names, or none",
            )
        self.classes = Classes(number, names)
        self.vocab_size = number
        self.settings: dict[str, str | int] = {}

    @classmethod
    def load(cls, name: str, options: TeacherOptions) -> FunctionClassifier:
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
        )

    @torch.no_grad()
    def blocks(self, samples: Sequence[Example]) -> Iterator[Tensor]:
        inputs: Any = [sample.input for sample in samples]
        if not isinstance(inputs[0], str):
            inputs = torch.from_numpy(np.stack(inputs)).to(self._device)
        logits_BV = torch.as_tensor(self._model(inputs))
        expected = (len(samples), self.vocab_size)
        if tuple(logits_BV.shape) != expected:
            raise TeacherError(
                "teacher-shape",
                "logits have the wrong shape",
                where=f"py:{self._name}",
                got=tuple(logits_BV.shape),
                expected=f"{expected} (samples, num_classes)",
            )
        yield logits_BV


class SequenceClassifier:
    """A transformers sequence classifier with its tokenizer.

    Texts of a micro-batch are padded to the longest and cut at the model's greatest length.
    """

    def __init__(self, loaded: LoadedFolder) -> None:
        self._loaded = loaded
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        config = self._model.config
        kind = getattr(config, "problem_type", None)
        if config.num_labels < 2 or kind in ("regression", "multi_label_classification"):
            raise TeacherError(
                "teacher-load",
                "its outputs are no distribution over classes",
                where=f"hf:{loaded.name}",
                got=f"{config.num_labels} outputs, problem_type {kind}",
                expected="two or more classes of which one is right",
            )
        names = tuple(str(config.id2label.get(i, "")) for i in range(config.num_labels))
        # What transformers makes up where nobody named the classes says nothing.
        made_up = names == tuple(f"LABEL_{i}" for i in range(config.num_labels))
        self.classes = Classes(config.num_labels, () if made_up else names)
        self.vocab_size = int(config.num_labels)
        limits = (
            getattr(config, "max_position_embeddings", None),
            self._tokenizer.model_max_length,
        )
        self._max_length = min(int(limit) for limit in limits if limit)
        self.settings: dict[str, str | int] = {"max_length": self._max_length}

    @classmethod
    def load(cls, name: str, options: TeacherOptions) -> SequenceClassifier:
        """Load weights and tokenizer from a folder, or from the hub's cache or the hub.

        Only safetensors, no code from the model's folder.

        Raises: TeacherError teacher-load; UsageError bad-argument, missing-dependency.
        """
        return cls(
            load_folder(
                name,
                options,
                architecture="AutoModelForSequenceClassification",
                expected="a sequence classifier",
                otherwise="a language model is captured with --task language-model",
            )
        )

    def describe(self) -> TeacherInfo:
        return self._loaded.describe()

    @torch.no_grad()
    def blocks(self, samples: Sequence[Example]) -> Iterator[Tensor]:
        encoded = self._tokenizer(
            [sample.input for sample in samples],
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        yield self._model(**encoded.to(self._model.device)).logits
