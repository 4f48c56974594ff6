"""Arrays as corpora of classifiers: `.npy`, `.npz` and IDX files (`*-ubyte`, `.idx`, also `.gz`).

Axis 0 counts samples. Labels stand in files of their own, one for each file of inputs and in the
same order, or in an `.npz` beside the inputs. Nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.corpora.examples import Classes, Example
from logitstore.corpora.files import SourceFile, compare, describe_files, find_files
from logitstore.corpora.spans import Unit
from logitstore.record.thumbnails import thumbnail
from logitstore.record.views import apply_views, draw_views, view_key
from logitstore.spec.errors import CorpusError, NotFoundError, UsageError
from logitstore.spec.images import Images
from logitstore.spec.plan import CorpusInfo, Span

__all__ = ["ArrayExamples", "ArrayFiles", "array_format"]

ArrayFormat = Literal["npy", "npz", "idx"]
Array = NDArray[Any]

# Views are made of so many rows together.
_ROWS_AT_ONCE = 64

_IDX_NAME = re.compile(r"(-ubyte|\.idx\d?|\.idx\d?-ubyte)(\.gz)?$")
# Third byte of an IDX file -> dtype; numbers are big-endian.
_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def array_format(files: Sequence[SourceFile]) -> ArrayFormat | None:
    """The format of files of arrays, by name; None when the first is no such file.

    Raises: UsageError bad-argument for files of several formats.
    """
    formats = {_format_of(file): file for file in files}
    if len(formats) > 1 and any(formats):
        raise UsageError(
            "bad-argument",
            "a corpus has one format, and these files have several",
            got=", ".join(f"{kind or 'no array'} ({file.name})" for kind, file in formats.items()),
            expected="only .npy, only .npz or only IDX files",
        )
    return next(iter(formats))


def _format_of(file: SourceFile) -> ArrayFormat | None:
    name = file.path.name.lower()
    if _IDX_NAME.search(name):
        return "idx"
    kinds: dict[str, ArrayFormat] = {".npy": "npy", ".npz": "npz"}
    return kinds.get(file.path.suffix.lower())


class ArrayFiles:
    """Arrays of some files, one after another along axis 0; each is read when it is first needed.

    A training loop looks inputs up by the names that a store gave them:

        inputs = ArrayFiles.open(["train-images-idx3-ubyte.gz"])
        images = inputs.of(batch.sample_keys)

    Args:
        files: as `find_files` gave them.
        key: name of the array inside `.npz` files.
    """

    def __init__(self, files: Sequence[SourceFile], key: str | None = None) -> None:
        self.files = tuple(files)
        self.key = key
        kind = array_format(files)
        if kind is None:
            raise UsageError(
                "bad-argument",
                "not a file of arrays",
                where=files[0].path,
                expected=".npy, .npz or IDX (*-ubyte, .idx, also .gz)",
            )
        self.format = kind
        self._loaded: dict[int, Array] = {}

    @classmethod
    def open(cls, patterns: Sequence[str], key: str | None = None) -> ArrayFiles:
        """Arrays of files, by name or pattern.

        Raises: NotFoundError file-not-found; UsageError bad-argument.
        """
        return cls(find_files(patterns), key)

    def __getstate__(self) -> dict[str, Any]:
        # Workers read the files themselves.
        return {**self.__dict__, "_loaded": {}}

    def array(self, file: int) -> Array:
        """The array of one file, mapped where the format allows.

        Raises: CorpusError corpus-changed, corpus-malformed, corpus-missing-key.
        """
        found = self._loaded.get(file)
        if found is None:
            source = self.files[file]
            source.check_unchanged()
            if self.format == "npz":
                found = _read_npz(source, self.key)
            else:
                found = _read_npy(source) if self.format == "npy" else _read_idx(source)
            if found.ndim == 0 or found.dtype.kind not in "biuf":
                raise CorpusError(
                    "corpus-malformed",
                    "not an array of numbers with an axis of samples",
                    where=source.path,
                    got=f"{found.dtype} {found.shape}",
                    expected="integers, floats or booleans [samples, ...]",
                )
            self._loaded[file] = found
        return found

    def of(self, sample_keys: Sequence[str]) -> Array:
        """The rows that samples were made from, [B, ...]; of views, the images as they are.

        Raises: NotFoundError sample-out-of-range for a name that is not of these files.
        """
        numbers = {file.name: number for number, file in enumerate(self.files)}
        rows = []
        for key in sample_keys:
            name, _, row = key.rpartition("#")
            row = row.partition("@")[0]
            number = numbers.get(name)
            if number is None or not row.isdecimal() or int(row) >= len(self.array(number)):
                raise NotFoundError(
                    "sample-out-of-range",
                    "no such row in these files",
                    got=key,
                    expected="<file>#<row> or <file>#<row>@<view>, of the files "
                    + ", ".join(list(numbers)[:4]),
                )
            rows.append(self.array(number)[int(row)])
        return np.stack(rows)


class ArrayExamples:
    """Arrays as examples.

    Args:
        inputs: the files of inputs.
        labels: those of labels, one for each file of inputs; None: the corpus has no labels.
        classes: of the teacher.
        images: what is kept of images. With an augmentation every row gives as many examples as it
            has views, one after another.
    """

    def __init__(
        self,
        inputs: ArrayFiles,
        labels: ArrayFiles | None,
        *,
        classes: Classes,
        images: Images | None = None,
    ) -> None:
        self._inputs = inputs
        self._labels = labels
        self._classes = classes
        self._images = images
        self._augmentation = None if images is None else images.augmentation
        self._views = 1 if self._augmentation is None else self._augmentation.views
        self.files = inputs.files
        self.format = inputs.format

    @property
    def labelled(self) -> bool:
        """Whether examples have labels."""
        return self._labels is not None

    def check(self) -> None:
        """Read everything that decides whether all examples can be had.

        Raises: CorpusError corpus-empty, corpus-malformed, corpus-missing-key, corpus-label,
        corpus-changed; UsageError bad-argument.
        """
        if self._labels is not None and len(self._labels.files) != len(self.files):
            raise UsageError(
                "bad-argument",
                "every file of inputs needs a file of labels",
                where="--labels",
                got=f"{len(self._labels.files)} files",
                expected=f"{len(self.files)}, in the order of the inputs",
            )
        first = self._inputs.array(0)
        for number, source in enumerate(self.files):
            array = self._inputs.array(number)
            if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
                raise CorpusError(
                    "corpus-malformed",
                    "samples of a corpus have one shape and type",
                    where=source.path,
                    got=f"{array.dtype} {array.shape[1:]}",
                    expected=f"{first.dtype} {first.shape[1:]}, as in {self.files[0].name}",
                )
            if self._labels is not None:
                self._check_labels(number, len(array))
        if not any(len(self._inputs.array(number)) for number in range(len(self.files))):
            raise CorpusError(
                "corpus-empty",
                "the corpus holds no sample",
                where=", ".join(str(f.path) for f in self.files[:4]),
                got="arrays of length 0",
                expected="at least one row",
            )

    def _check_labels(self, file: int, count: int) -> None:
        assert self._labels is not None
        labels = self._labels.array(file)
        where = self._labels.files[file].path
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise CorpusError(
                "corpus-malformed",
                "labels do not belong to the inputs",
                where=where,
                got=f"{labels.dtype} {labels.shape}",
                expected=f"integers ({count},), one for each row of {self.files[file].name}",
            )
        outside = np.flatnonzero((labels < 0) | (labels >= self._classes.number))
        if len(outside):
            place = f"{where}, row {outside[0]}"
            raise self._classes.unknown(int(labels[outside[0]]), place)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._starts()[-1]

    def count(self, max_samples: int | None) -> int:
        """Number of examples to capture: all views of as many rows as `max_samples` asks for."""
        rows = self.rows
        if max_samples is not None:
            rows = min(rows, -(-max_samples // self._views))
        return rows * self._views

    def units(self, unit_samples: int, max_samples: int | None) -> Iterator[Unit]:
        """The corpus in units of `unit_samples`; views of a row stay together."""
        rows = self.count(max_samples) // self._views
        unit_rows = -(-unit_samples // self._views)
        for start in range(0, rows, unit_rows):
            stop = min(start + unit_rows, rows)
            spans = tuple(
                Span(
                    file=file,
                    first_document=max(start, begin) - begin,
                    documents=min(stop, end) - max(start, begin),
                )
                for file, (begin, end) in enumerate(pairwise(self._starts()))
                if max(start, begin) < min(stop, end)
            )
            yield Unit(spans, (stop - start) * self._views)

    def spread(self, count: int, max_samples: int | None) -> list[Example]:
        """Evenly spaced rows, of each all its views: about `count` examples together."""
        rows = self.count(max_samples) // self._views
        chosen = min(-(-count // self._views), rows)
        starts = self._starts()
        out: list[Example] = []
        for number in (i * rows // chosen for i in range(chosen)):
            file = next(f for f, (_, end) in enumerate(pairwise(starts)) if number < end)
            row = number - starts[file]
            out += self._examples(file, row, row + 1)
        return out

    def examples(self, span: Span) -> Iterator[Example]:
        """Examples of a span.

        Raises: CorpusError corpus-changed, corpus-malformed.
        """
        stop = span.first_document + span.documents
        for start in range(span.first_document, stop, _ROWS_AT_ONCE):
            yield from self._examples(span.file, start, min(start + _ROWS_AT_ONCE, stop))

    def describe(self, documents: int) -> CorpusInfo:
        """The files of inputs and of labels by content."""
        files = [*self.files]
        if self._labels is not None and self._labels.files != self.files:
            # Both may be called the same in folders of their own.
            files += [
                SourceFile(f.path, f"labels:{f.name}", f.size_bytes, f.modified_ns)
                for f in self._labels.files
            ]
        return describe_files(files, documents, self.format)

    def check_unchanged(self, planned: CorpusInfo, found: CorpusInfo) -> None:
        """Refuse files that are not those of the plan.

        Raises: CorpusError corpus-changed.
        """
        compare(planned, found)

    def _examples(self, file: int, start: int, stop: int) -> Iterator[Example]:
        inputs = self._inputs.array(file)[start:stop]
        keys = [f"{self.files[file].name}#{row}" for row in range(start, stop)]
        labels: list[int | None] = [None] * len(keys)
        if self._labels is not None:
            labels = [int(label) for label in self._labels.array(file)[start:stop]]
        factor = None if self._images is None else self._images.thumbnail_factor
        pictures = [None if factor is None else thumbnail(row, factor) for row in inputs]
        if self._augmentation is None:
            for each in zip(keys, inputs, labels, pictures, strict=True):
                key, row, label, picture = each
                yield Example(key, row, label, picture=picture)
            return
        drawn = draw_views(self._augmentation, keys)
        seen = apply_views(np.repeat(inputs, self._views, axis=0), drawn)
        for place, view in enumerate(seen):
            row, number = divmod(place, self._views)
            yield Example(
                view_key(keys[row], number),
                view,
                labels[row],
                view=drawn[place],
                picture=None if number else pictures[row],
            )

    def _starts(self) -> list[int]:
        counts = (len(self._inputs.array(number)) for number in range(len(self.files)))
        return [0, *accumulate(counts)]


def _read_npy(source: SourceFile) -> Array:
    try:
        return _native(np.lib.format.open_memmap(source.path, mode="r"))
    except (ValueError, OSError, EOFError) as error:
        raise _malformed(source, str(error)) from None


def _read_npz(source: SourceFile, key: str | None) -> Array:
    names: list[str] = []
    try:
        with source.path.open("rb") as stream, zipfile.ZipFile(stream) as members:
            names = [name.removesuffix(".npy") for name in members.namelist()]
            if key in names:
                with members.open(f"{key}.npy") as member:
                    return _native(np.lib.format.read_array(member, allow_pickle=False))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _malformed(source, str(error)) from None
    raise CorpusError(
        "corpus-missing-key",
        f"no array called {key!r}",
        where=source.path,
        got="arrays " + (", ".join(names[:12]) or "none"),
        expected=repr(key),
        hint="name the arrays with --input-key and --label-key",
    )


def _read_idx(source: SourceFile) -> Array:
    """IDX: 0, 0, type, number of axes, their lengths as big-endian uint32, then the numbers."""
    try:
        opened: Any = gzip.open if source.path.suffix.lower() == ".gz" else open
        with opened(source.path, "rb") as stream:
            head = stream.read(4).ljust(4, b"\xff")
            axes = head[3] if head[:2] == b"\0\0" and head[2] in _IDX_DTYPES else 0
            shape = tuple(np.frombuffer(stream.read(4 * axes), ">u4").tolist())
            dtype = np.dtype(_IDX_DTYPES.get(head[2], "u1"))
            expected = math.prod(shape) * dtype.itemsize
            # What is unpacked is bounded by the size that the head states.
            data = stream.read(expected + 1) if axes else b""
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _malformed(source, str(error)) from None
    if not axes or len(shape) != axes:
        raise _malformed(source, f"no IDX file begins with {head.hex(' ')}")
    if len(data) != expected:
        raise _malformed(source, f"IDX of shape {shape} needs {expected} bytes, holds {len(data)}")
    return _native(np.frombuffer(data, dtype).reshape(shape))


def _native(array: Array) -> Array:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _malformed(source: SourceFile, why: str) -> CorpusError:
    return CorpusError(
        "corpus-malformed",
        f"cannot be read as an array: {why.splitlines()[0] if why else 'it ends too early'}",
        where=source.path,
        expected="a .npy, .npz or IDX file of numbers",
    )
