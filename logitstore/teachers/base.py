"""What a capture needs of a teacher, and how teachers are named.

Letters: B samples of a micro-batch, T positions of each, R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from logitstore.corpora import Classes, Example, Sample, Tokenizer
from logitstore.spec.errors import TeacherError, UsageError
from logitstore.spec.header import TeacherInfo

__all__ = [
    "BLOCK_BYTES",
    "Classifier",
    "Teacher",
    "TeacherOptions",
    "block_rows",
    "load_classifier",
    "load_teacher",
]

# Float32 logits of one block. Large enough for an efficient product with the output layer, small
# beside any model; two blocks wait between teacher and encoder.
BLOCK_BYTES = 64 << 20


def block_rows(vocab_size: int) -> int:
    """Rows of a block: a function of V alone, so that equal plans give equal bytes."""
    return max(16, BLOCK_BYTES // (4 * vocab_size))


# What `TeacherOptions.dtype` may be.
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How a teacher is run.

    Attributes:
        dtype: of the forward pass: "float32", "bfloat16", "float16", or "auto": float32 on a CPU
            (where half precision is slower and less exact), else what the weights have.
        device: "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.
        threads: CPU threads of this process.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        """Raises: UsageError bad-argument for a dtype of no such name, whatever the teacher."""
        if self.dtype not in DTYPES:
            raise UsageError(
                "bad-argument",
                "no such dtype",
                where="--dtype",
                got=self.dtype,
                expected=", ".join(DTYPES),
            )


class Teacher(Protocol):
    """A loaded teacher.

    Attributes:
        vocab_size: V: ids that the tokenizer has and the output layer knows.
        tokenizer: text to ids.
        settings: how it computes, as far as that decides the stored bytes.
    """

    vocab_size: int

    @property
    def settings(self) -> Mapping[str, str | int]: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def describe(self) -> TeacherInfo:
        """Provenance; reads the weights' files for their digest."""
        ...

    def blocks(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        """Raw logits of samples of equal length, a block of rows at a time.

        Yields: float [R, V] on the teacher's device; blocks follow the positions of the first
        sample, then of the second, and so on, B * T rows together. `[B, T, V]` need never exist.

        Raises: TeacherError teacher-shape; whatever the model raises.
        """
        ...


class Classifier(Protocol):
    """A loaded teacher of classes.

    Attributes:
        vocab_size: V, the number of classes.
        classes: how a corpus may name them.
        settings: how it computes, as far as that decides the stored bytes.
    """

    vocab_size: int
    classes: Classes

    @property
    def settings(self) -> Mapping[str, str | int]: ...

    def describe(self) -> TeacherInfo:
        """Provenance; reads the weights' files for their digest."""
        ...

    def blocks(self, samples: Sequence[Example]) -> Iterator[Tensor]:
        """Raw logits of samples, float [B, V] together, on the teacher's device.

        Raises: TeacherError teacher-shape; whatever the model raises.
        """
        ...


def load_teacher(name: str, options: TeacherOptions) -> Teacher:
    """Load a language model, `hf:PATH_OR_ID` or `py:module:function`.

    Raises: UsageError bad-argument; TeacherError teacher-load.
    """
    kind, rest = _prepare(name, options)
    if kind == "hf":
        from logitstore.teachers.causal_lm import CausalLM

        return CausalLM.load(rest, options)
    from logitstore.teachers.function import FunctionTeacher

    return FunctionTeacher.load(rest, options)


def load_classifier(name: str, options: TeacherOptions) -> Classifier:
    """Load a classifier, `hf:PATH_OR_ID` or `py:module:function`.

    Raises: UsageError bad-argument; TeacherError teacher-load.
    """
    kind, rest = _prepare(name, options)
    if kind == "hf":
        from logitstore.teachers.classifier import SequenceClassifier

        return SequenceClassifier.load(rest, options)
    from logitstore.teachers.classifier import FunctionClassifier

    return FunctionClassifier.load(rest, options)


def _prepare(name: str, options: TeacherOptions) -> tuple[str, str]:
    """Kind and rest of a teacher's name; sets this process's threads."""
    import torch

    torch.set_num_threads(options.threads)
    kind, _, rest = name.partition(":")
    if kind in ("hf", "py") and rest:
        return kind, rest
    raise UsageError(
        "bad-argument",
        "no such kind of teacher",
        where="--teacher",
        got=name,
        expected="hf:PATH_OR_ID or py:module:function",
        hint=f"did you mean hf:{name}?" if kind not in ("hf", "py") else None,
    )


def device_of(options: TeacherOptions) -> str:
    """The torch device that an option means.

    Raises: TeacherError teacher-load when there is no such device.
    """
    import torch

    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise TeacherError(
            "teacher-load",
            f"device cannot be used: {str(error).splitlines()[0]}",
            where="--device",
            got=options.device,
            expected="cpu, cuda or cuda:N",
        ) from None
    return options.device
