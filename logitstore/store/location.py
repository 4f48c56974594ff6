"""Where a store is: one parser for folders and URLs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from logitstore.spec.errors import StorageError, UsageError

__all__ = ["Location", "parse_location"]

_OBJECT_SCHEMES = {"s3", "gs", "az"}
_HTTP_SCHEMES = {"http", "https"}
# Repositories of the Hugging Face Hub, at HF_ENDPOINT where that is set.
_HUB = "https://huggingface.co"
_HUB_KINDS = ("datasets", "spaces")


@dataclass(frozen=True)
class Location:
    """A parsed location.

    Attributes:
        kind: "local" (a folder), "object" (s3, gs, az) or "http" (read-only).
        text: absolute path of the folder, or the URL without a trailing slash.
    """

    kind: Literal["local", "object", "http"]
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def path(self) -> Path:
        """The folder; only for kind "local"."""
        assert self.kind == "local"
        return Path(self.text)


def parse_location(location: str | os.PathLike[str] | Location) -> Location:
    """A folder, `file://`, `s3://bucket/prefix`, `gs://`, `az://`, `hf://` or `http(s)://` URL.

    `hf://datasets/OWNER/NAME[@REVISION]/PATH` stands for the https URL that the Hub serves the
    repository's files at.

    Raises: StorageError unsupported-url; UsageError bad-argument for a URL that is incomplete,
    carries credentials (they would end up in logs) or a query.
    """
    if isinstance(location, Location):
        return location
    text = os.fspath(location)
    if "\0" in text or not text:
        raise _bad(text, "is empty or holds a NUL character", "a folder or a URL")
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Location("local", os.path.abspath(os.path.expanduser(text)))
    parts = urlsplit(text)
    scheme = parts.scheme
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise _bad(text, "does not name a folder of this machine", "file:///absolute/path")
        return Location("local", os.path.abspath(unquote(parts.path)))
    if scheme not in _OBJECT_SCHEMES | _HTTP_SCHEMES | {"hf"}:
        raise StorageError(
            "unsupported-url",
            "no reader for this kind of URL",
            where=text,
            got=f"{scheme}://",
            expected="a folder, file://, s3://, gs://, az://, hf://, http:// or https://",
        )
    if parts.query or parts.fragment:
        raise _bad(text, "has a query or a fragment", "a plain URL")
    if "@" in parts.netloc:
        clean = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise _bad(clean, "carries credentials", "credentials in environment variables")
    if not parts.netloc:
        raise _bad(text, "names no bucket or host", f"{scheme}://NAME/PREFIX")
    segments = [unquote(s) for s in parts.path.split("/")]
    if any(s in (".", "..") for s in segments):
        raise _bad(text, "holds '.' or '..'", "a plain URL")
    if scheme == "hf":
        return parse_location(_hub_url(text, f"{parts.netloc}{parts.path}"))
    kind: Literal["object", "http"] = "object" if scheme in _OBJECT_SCHEMES else "http"
    return Location(kind, f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}")


def _hub_url(text: str, path: str) -> str:
    """The URL below which the Hub serves the files of `hf://PATH`."""
    segments = path.rstrip("/").split("/")
    kind = [segments.pop(0)] if segments[0] in _HUB_KINDS else []
    if len(segments) < 2 or not all(segments):
        raise _bad(text, "names no repository", "hf://datasets/OWNER/NAME/PATH")
    owner, repository, *inside = segments
    name, _, revision = repository.partition("@")
    base = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    return "/".join([base, *kind, owner, name, "resolve", revision or "main", *inside])


def _bad(text: str, what: str, expected: str) -> UsageError:
    return UsageError("bad-argument", f"location {what}", got=repr(text), expected=expected)
