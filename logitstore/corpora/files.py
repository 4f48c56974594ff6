"""The files of a corpus: found by name or pattern, described by content."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.errors import CorpusError, NotFoundError, UsageError
from logitstore.spec.plan import CorpusFile, CorpusInfo

__all__ = ["CorpusFormat", "SourceFile", "describe_files", "find_files"]

CorpusFormat = Literal["text", "jsonl", "parquet"]

_SUFFIXES: dict[str, CorpusFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Attributes:
        path: where it is on this machine.
        name: path below the folder that all files of the corpus share, with forward slashes. It
            names documents and stands in the plan, so that a corpus may be moved as a whole.
        size_bytes, modified_ns: as `find_files` saw them; a later reader compares.
    """

    path: Path
    name: str
    size_bytes: int
    modified_ns: int

    def check_unchanged(self) -> None:
        """Refuse a file that is not as it was found.

        Raises: CorpusError corpus-changed.
        """
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.modified_ns):
            raise CorpusError(
                "corpus-changed",
                "the file changed while the capture was running",
                where=self.path,
                hint="start the same command again; it compares the file with the plan",
            )


def find_files(patterns: Sequence[str]) -> tuple[SourceFile, ...]:
    """The files that names and patterns (`*`, `?`, `[...]`, `**`) stand for.

    Order: as given, the matches of a pattern sorted; a file named twice counts once.

    Raises: NotFoundError file-not-found; UsageError bad-argument for a folder.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        # A plain name wins over its meaning as a pattern: files may be called "notes [1].txt".
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [Path(name).resolve() for name in found if os.path.isfile(name)]
        if not matches and found:
            raise UsageError(
                "bad-argument",
                "a corpus is made of files, and this is a folder",
                where=pattern,
                expected=f"files or a pattern, for example '{pattern.rstrip('/')}/**/*.txt'",
            )
        if not matches:
            raise NotFoundError(
                "file-not-found",
                "no such corpus file",
                where=pattern,
                expected="a file, or a pattern that matches some",
                hint="quote patterns, so that the shell passes them on",
            )
        paths.update(dict.fromkeys(matches))
    if not paths:
        raise UsageError("bad-argument", "no corpus file given", expected="at least one file")
    root = os.path.commonpath([path.parent for path in paths])
    out = []
    for path in paths:
        status = path.stat()
        name = path.relative_to(root).as_posix()
        out.append(SourceFile(path, name, status.st_size, status.st_mtime_ns))
    return tuple(out)


def format_of(files: Sequence[SourceFile]) -> CorpusFormat:
    """`jsonl` or `parquet` by suffix, everything else is text; a corpus has one format.

    Raises: UsageError bad-argument.
    """
    formats = {_SUFFIXES.get(f.path.suffix.lower(), "text"): f for f in files}
    if len(formats) > 1:
        raise UsageError(
            "bad-argument",
            "a corpus has one format, and these files have several",
            got=", ".join(f"{kind} ({file.name})" for kind, file in formats.items()),
            expected="only text, only JSONL (.jsonl, .ndjson) or only Parquet (.parquet, .pq)",
            hint="capture them into two stores, or convert one of them",
        )
    return next(iter(formats))


def describe_files(
    files: Sequence[SourceFile], documents: int, kind: str | None = None
) -> CorpusInfo:
    """The corpus by content: reads every file once for its SHA-256.

    Args:
        kind: format to record; None: as the names say.
    """
    kind = kind or format_of(files)
    described = tuple(
        CorpusFile(name=f.name, bytes=f.size_bytes, sha256=_sha256(f.path)) for f in files
    )
    digest = sha256_hex(
        canonical_json({"format": kind, "files": [f.model_dump(mode="json") for f in described]})
    )
    return CorpusInfo(format=kind, files=described, documents=documents, fingerprint=digest)


def compare(planned: CorpusInfo, found: CorpusInfo) -> None:
    """Refuse a corpus that is not the one the plan was made from, naming the files.

    Raises: CorpusError corpus-changed.
    """
    if planned.fingerprint == found.fingerprint:
        return
    before = {f.name: f.sha256 for f in planned.files}
    after = {f.name: f.sha256 for f in found.files}
    changes = [
        f"{name}: " + ("content changed" if name in after else "missing")
        for name, digest in before.items()
        if after.get(name) != digest
    ]
    changes += [f"{name}: not in the plan" for name in after if name not in before]
    changes = changes or ["the order of the files changed"]
    raise CorpusError(
        "corpus-changed",
        "the corpus is not the one this store's plan was made from",
        got="; ".join(changes[:8]) + (f" and {len(changes) - 8} more" if changes[8:] else ""),
        expected=f"{len(before)} files with fingerprint {planned.fingerprint[:12]}",
        hint="restore the files, or capture into another store",
        data={"changes": changes},
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
