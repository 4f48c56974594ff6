"""What a user chooses for a capture, and which of it decides the stored bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from logitstore.spec.errors import UsageError

__all__ = ["CaptureSettings", "Task"]

Task = Literal["language-model", "classification"]

# Options that only one task has, with what they are when nobody sets them.
_OPTIONS_OF: dict[Task, dict[str, Any]] = {
    "language-model": {
        "seq_len": 512,
        "max_tokens": None,
        "shard_tokens": None,
        "bos": "auto",
        "check_bos": True,
        "batch_tokens": 2048,
        "rank_ids": False,
    },
    "classification": {
        "labels": (),
        "label_key": None,
        "input_key": None,
        "max_samples": None,
        "shard_samples": None,
        "batch_samples": 256,
        "views": None,
        "crop_padding": 4,
        "flip": True,
        "keep_thumbnails": False,
    },
}


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """A capture of a teacher over a corpus.

    Attributes:
        teacher: "hf:PATH_OR_ID" or "py:module:function".
        corpus: file names and patterns.
        out: folder or URL of the store; empty where nothing is written (`slice_of`).
        task: what the teacher is; decides what a sample is, and which options there are.
        signal: for example "topk:64".
        seq_len: tokens of a window.
        aux: fields to keep beside the signal; None: the signal's defaults.
        lse_at: temperatures T whose logsumexp(z / T) is kept.
        always_ids: control tokens whose log-probs are kept at every position.
        text_key, document_separator: see `corpora.Corpus`.
        max_tokens: capture only so many tokens, from the start of the corpus.
        shard_tokens: tokens of a shard; None: about two minutes of the teacher's time.
        bos: "auto" takes what the tokenizer does by itself; "document" puts BOS before every
            document.
        check_bos: refuse a capture for which the other BOS choice is ten times better.
        container: "zarr" or "arrow".
        rank_ids: keep frequency ranks for ids, ordered by what the pilot would have stored.
        chunk_positions: positions of a chunk; None: 2048, or `seq_len` when that is larger.
        batch_tokens: tokens of a micro-batch.
        labels: files of labels beside files of arrays, in the same order.
        label_key: field of a row, or array of an `.npz`, that holds labels; without it and
            `labels`, the store has none.
        input_key: array of an `.npz` that holds the inputs; None means "inputs".
        max_samples: capture only so many samples, from the start of the corpus.
        shard_samples: samples of a shard; None: about two minutes of the teacher's time.
        batch_samples: samples of a micro-batch.
        views: of every image, the image as it is among them; None: images as they are, only.
        crop_padding: views are shifted by up to so many pixels on each axis.
        flip: half of the views are mirrored left to right.
        keep_thumbnails: keep a picture of every image, for the viewer.
        dtype, device: see `teachers.TeacherOptions`.
        workers: processes on this machine.
        threads_per_worker: CPU threads of each; None: what the store was begun with, or the cores
            divided by the workers.
        seed: of the random function.
    """

    teacher: str
    corpus: tuple[str, ...]
    out: str
    signal: str
    task: Task = "language-model"
    seq_len: int = 512
    aux: tuple[str, ...] | None = None
    lse_at: tuple[float, ...] = ()
    always_ids: tuple[int, ...] = ()
    text_key: str | None = None
    document_separator: str | None = None
    max_tokens: int | None = None
    shard_tokens: int | None = None
    bos: Literal["auto", "document", "none"] = "auto"
    check_bos: bool = True
    container: Literal["zarr", "arrow"] = "zarr"
    rank_ids: bool = False
    chunk_positions: int | None = None
    batch_tokens: int = 2048
    labels: tuple[str, ...] = ()
    label_key: str | None = None
    input_key: str | None = None
    max_samples: int | None = None
    shard_samples: int | None = None
    batch_samples: int = 256
    views: int | None = None
    crop_padding: int = 4
    flip: bool = True
    keep_thumbnails: bool = False
    dtype: str = "auto"
    device: str = "auto"
    workers: int = 1
    threads_per_worker: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "seq_len": 2,
            "max_tokens": 1,
            "shard_tokens": 1,
            "chunk_positions": 1,
            "batch_tokens": 1,
            "max_samples": 1,
            "shard_samples": 1,
            "batch_samples": 1,
            "views": 1,
            "crop_padding": 0,
            "workers": 1,
            "threads_per_worker": 1,
            "seed": 0,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UsageError(
                    "bad-argument",
                    "too small",
                    where=f"--{name.replace('_', '-')}",
                    got=value,
                    expected=f"at least {minimum}",
                )
        for task, options in _OPTIONS_OF.items():
            for name, default in options.items():
                if task != self.task and getattr(self, name) != default:
                    raise UsageError(
                        "bad-argument",
                        f"this option belongs to --task {task}",
                        where=f"--{name.replace('_', '-')}",
                        got=getattr(self, name),
                        expected=f"options of --task {self.task}",
                    )
        if self.signal.strip().partition(":")[0] == "scores":
            raise UsageError(
                "unknown-signal",
                "a teacher gives logits; scores are of candidates that you choose",
                where="--signal",
                got=self.signal,
                expected="another signal",
                hint="push them: ls.writer(...).add_scores(ids, scores)",
            )
        if self.seq_len > 65_536:
            # segment_ids are 16-bit, and a window may hold as many documents as tokens
            raise UsageError(
                "bad-argument",
                "windows are too long",
                where="--seq-len",
                got=self.seq_len,
                expected="at most 65536",
            )
        if self.views is None and (self.crop_padding, self.flip) != (4, True):
            raise UsageError(
                "bad-argument",
                "these options say how views are made, and none are asked for",
                where="--crop-padding, --no-flip",
                got=f"crop padding {self.crop_padding}, {'' if self.flip else 'no '}flip",
                expected="--views N beside them",
            )
        if any(not 0 < t < float("inf") for t in self.lse_at):
            raise UsageError(
                "bad-argument",
                "temperatures must be positive numbers",
                where="--lse-at",
                got=", ".join(map(str, self.lse_at)),
                expected="for example 2.0,4.0",
            )

    @property
    def micro_batch(self) -> int:
        """Full windows, or samples, of one forward pass."""
        if self.task == "classification":
            return self.batch_samples
        return max(1, self.batch_tokens // self.seq_len)

    @property
    def chunk_capacity(self) -> int:
        """Positions of a chunk."""
        if self.task == "classification":
            return self.chunk_positions or 2048
        return max(self.chunk_positions or 2048, self.seq_len)

    def _views(self) -> dict[str, Any]:
        return {"number": self.views, "crop_padding": self.crop_padding, "flip": self.flip}

    def configuration(self) -> Mapping[str, Any]:
        """The part that a store remembers and compares on resume, teacher and tokenizer apart."""
        common = {
            "signal": self.signal,
            "aux": None if self.aux is None else sorted(self.aux),
            "lse_at": list(self.lse_at),
            "always_ids": list(self.always_ids),
            "container": self.container,
            "chunk_positions": self.chunk_capacity,
            "seed": self.seed,
            "micro_batch": self.micro_batch,
        }
        if self.task == "classification":
            return {
                **common,
                "task": self.task,
                "inputs": {
                    "input_key": self.input_key,
                    "text_key": self.text_key,
                    "label_key": self.label_key,
                    "label_files": bool(self.labels),
                    "document_separator": self.document_separator,
                    "max_samples": self.max_samples,
                    "shard_samples": self.shard_samples,
                },
                # Only when asked for: captures without them go on as they were begun.
                **({} if self.views is None else {"views": self._views()}),
                **({"keep_thumbnails": True} if self.keep_thumbnails else {}),
            }
        return {
            **common,
            **({"rank_ids": True} if self.rank_ids else {}),
            "packing": {
                "seq_len": self.seq_len,
                "text_key": self.text_key,
                "document_separator": self.document_separator,
                "max_tokens": self.max_tokens,
                "shard_tokens": self.shard_tokens,
            },
        }
