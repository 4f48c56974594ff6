"""The one exception tree.

The class says what a caller can do about it; `kind` is a stable code that is never renamed, shown
in brackets in every message, used as the `kind` of HTTP problem documents and tested by name. Every
message has four parts: what failed and where, what was got, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "KINDS",
    "AlignmentError",
    "CaptureError",
    "CommitError",
    "CorpusError",
    "FormatError",
    "IntegrityError",
    "Interrupted",
    "LogitstoreError",
    "NotFoundError",
    "PartialError",
    "StateError",
    "StorageError",
    "TargetsError",
    "TeacherError",
    "UsageError",
]


class LogitstoreError(Exception):
    """Base of everything logitstore raises on purpose.

    Args:
        kind: stable code, one of `KINDS`.
        what: what failed, one sentence fragment.
        where: file, document, key, shard or argument concerned.
        got: the value found.
        expected: the value or values that would have been right.
        hint: what to do about it (a command, a flag, a page).
        data: machine-readable details (JSON-able), for `--json` and problem documents.

    Attributes:
        message: the text a person reads; one to four lines.
    """

    exit_code = 1

    def __init__(
        self,
        kind: str,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise AssertionError(f"unknown error kind {kind!r}: add it to KINDS")
        self.kind = kind
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.hint = hint
        self.data = dict(data or {})
        # Not a property: torch takes a class with `message` for one that can
        # be built from it, and would lose the text of an error in a DataLoader's worker.
        self.message = self._text()
        super().__init__(self.message)

    def _text(self) -> str:
        lines = [f"[{self.kind}] " + (f"{self.where}: " if self.where else "") + self.what]
        if self.got is not None:
            lines.append(f"  got: {self.got}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries (loader and capture workers); the default would lose
        # keywords.
        return (
            _rebuild,
            (
                type(self),
                self.kind,
                self.what,
                self.where,
                self.got,
                self.expected,
                self.hint,
                self.data,
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form: kind, message parts and details."""
        return {
            "kind": self.kind,
            "what": self.what,
            "where": self.where,
            "got": self.got,
            "expected": self.expected,
            "hint": self.hint,
            "data": self.data,
        }


def _rebuild(
    cls: type[LogitstoreError],
    kind: str,
    what: str,
    where: str | None,
    got: str | None,
    expected: str | None,
    hint: str | None,
    data: dict[str, Any],
) -> LogitstoreError:
    return cls(kind, what, where=where, got=got, expected=expected, hint=hint, data=data)


class UsageError(LogitstoreError, ValueError):
    """An argument, flag or setting is wrong; change it and call again."""

    exit_code = 2


class NotFoundError(LogitstoreError, FileNotFoundError):
    """A file, store, shard, sample or table is not there."""


class CorpusError(LogitstoreError, ValueError):
    """The corpus cannot be read as asked."""


class TeacherError(LogitstoreError, RuntimeError):
    """The teacher cannot be loaded, or its output cannot be a distribution."""


class CaptureError(LogitstoreError, RuntimeError):
    """A capture cannot go on."""


class PartialError(LogitstoreError, RuntimeError):
    """Part of the work is done and committed; the same command continues."""

    exit_code = 3


class FormatError(LogitstoreError, ValueError):
    """A document or object does not follow the format, or follows a newer one."""


class IntegrityError(LogitstoreError, ValueError):
    """Stored bytes are not the bytes that were committed."""

    exit_code = 4


class CommitError(LogitstoreError, RuntimeError):
    """The commit protocol refused: somebody else's work or another configuration is there."""


class StorageError(LogitstoreError, OSError):
    """The disk, the object store or the process environment does not allow the operation."""


class AlignmentError(LogitstoreError, ValueError):
    """Teacher rows do not belong to these tokens, or to this tokenizer."""


class StateError(LogitstoreError, ValueError):
    """A loader state belongs to another store, snapshot or order."""


class TargetsError(LogitstoreError, ValueError):
    """Targets, loss and arguments do not fit together."""


class Interrupted(LogitstoreError, RuntimeError):
    """The user stopped the run; committed work is kept."""

    exit_code = 130


# kind -> what it means, one line. Stable: a kind is never renamed or given another meaning.
KINDS: dict[str, str] = {
    # usage
    "bad-argument": "an argument has a value that cannot work",
    "unknown-signal": "no signal of that name, or a parameter it does not have",
    "unknown-aux": "no aux field of that name, or one this signal cannot have",
    "k-exceeds-vocabulary": "more ids asked for than the vocabulary has",
    "conversion-refused": "the asked-for signal does not follow from the stored one",
    "missing-dependency": "an optional package is needed and not installed",
    # not found
    "not-a-store": "the location holds no store",
    "file-not-found": "a named file does not exist",
    "sample-out-of-range": "no sample of that number",
    "shard-not-found": "no visible shard of that name",
    "table-not-found": "the store has no table of that name",
    # corpus
    "corpus-empty": "the corpus holds no document with text",
    "corpus-not-utf8": "a text file is not UTF-8",
    "corpus-missing-key": "a row lacks the text key",
    "corpus-label": "a label is no class of the teacher",
    "corpus-malformed": "a row or file cannot be parsed",
    "corpus-changed": "the corpus is not the one the plan was made from",
    # teacher
    "teacher-load": "the teacher cannot be loaded",
    "teacher-nonfinite": "the teacher produced NaN, +inf, or a row without any finite logit",
    "teacher-bos": "the other BOS choice gives a far better perplexity",
    "teacher-shape": "the teacher's output has another shape than its tokens or vocabulary ask for",
    "teacher-out-of-memory": "not even one sample at a time fits into memory",
    # capture
    "capture-failed": "a capture worker failed",
    "capture-partial": "some samples could not be captured; the rest is committed",
    "capture-interrupted": "the capture was stopped by the user",
    "wrong-length": "tokens and logits, or two columns, differ in length",
    "token-out-of-range": "a token id is not below the vocabulary size",
    "writer-closed": "the writer was already closed",
    # format
    "format-too-new": "the store needs a newer logitstore",
    "unknown-reader-feature": "the store uses a feature this version does not know",
    "document-malformed": "a document is not of the form the format demands",
    "document-too-large": "a document exceeds its size limit",
    "document-invalid": "a document's body breaks a rule of the format",
    "path-not-allowed": "a name in a document is not a plain relative path",
    # integrity
    "document-hash-mismatch": "a document's sha256 is not that of its body",
    "object-missing": "a committed object is not there",
    "object-size-mismatch": "an object has another size than its commit says",
    "object-hash-mismatch": "an object's sha256 is not the committed one",
    "chunk-checksum-mismatch": "a chunk's crc32c is not the committed one",
    "chunk-malformed": "a chunk's bytes do not decode to the committed shapes",
    "document-mismatch": "a document belongs to another store, plan, shard or number",
    "document-missing": "a document the store refers to is not there",
    "index-mismatch": "the index and the commits disagree",
    "table-hash-mismatch": "a table's sha256 is not the one in the header",
    "verify-failed": "verification found problems; they are listed",
    # commit
    "store-exists": "a store with another configuration is already there",
    "configuration-changed": "the configuration differs from the one the store was started with",
    "already-committed": "another worker committed this shard first",
    "store-sealed": "the store is sealed and accepts no more shards",
    "plan-incomplete": "shards of the plan are not committed yet",
    # storage
    "disk-full": "no space left",
    "permission-denied": "the process may not read or write there",
    "storage-failed": "a storage operation failed",
    "credentials-missing": "the environment holds no credentials for this object store",
    "not-cached": "offline, and the cache does not hold what is needed",
    "fork-unsafe": "a remote store was used in a forked child",
    "unsupported-url": "no reader for this kind of URL",
    # alignment and tokenizer
    "tokenizer-mismatch": "the store was made with another tokenizer",
    "store-misaligned": "stored rows do not meet the tokens they stand beside",
    # loader state
    "state-malformed": "a loader state cannot be read",
    "state-mismatch": "a loader state belongs to another store, snapshot, seed or filter",
    # targets and losses
    "targets-mismatch": "this loss cannot use these targets",
    "aux-missing": "the store does not hold a field this loss needs",
    "missing-not-allowed": "this loss has no meaning with that treatment of the missing mass",
    "shape-mismatch": "tensors disagree in shape",
    "empty-mask": "no position counts",
    "label-missing": "labels are needed and were not given",
    "not-retemperable": "these targets cannot be softened to another temperature",
    # service
    "store-not-found": "the service has no store of that name",
    "store-unavailable": "a store of the service cannot be read now",
    "path-not-found": "the service has nothing at that path",
    "method-not-allowed": "the path answers GET and HEAD only",
    "not-acceptable": "none of the accepted media types or codings can be sent",
    "precondition-failed": "the object is not the one the request names",
    "range-not-satisfiable": "the ranges asked for cannot be sent",
    "cursor-invalid": "a cursor cannot be read, or belongs to another store or question",
    "internal": "the service failed",
    "unsafe-bind": "the service would be open to a network without a guard",
    "keys-file": "the file of keys cannot be used",
    "key-not-found": "the file of keys has no key of that id",
    "key-invalid": "no key was sent, or one that is unknown, expired or revoked",
    "key-lacks-scope": "the key is valid and does not allow this",
    "host-not-allowed": "the request's Host is none of the service's names",
    "rate-limited": "too many requests; the answer says when to come back",
    "too-many-streams": "too many requests in flight; the answer says when to come back",
    "request-too-large": "the request's body is larger than the service takes",
    "request-timeout": "the request's body did not arrive in time",
    "head-too-large": "the request line and headers are longer than the service takes",
    "service-busy": "the service answers as many requests as it can, or is ending",
}
