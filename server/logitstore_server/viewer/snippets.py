"""Ready-made ways to get what a page shows."""

from __future__ import annotations

import shlex
from urllib.parse import quote

from logitstore.spec.plan import CorpusInfo
from logitstore_server.viewer.viewed_store import ViewedStore

__all__ = ["again", "snippets"]

# Signals that no fresh run is compared with.
_NOT_AUDITED = ("graph", "scores")
# Files of a corpus that a command names one by one.
_CORPUS_FILES = 4


def snippets(
    location: str | None,
    base: str,
    name: str,
    sample: int,
    address: str,
    again: list[str] | None = None,
) -> dict[str, str | None]:
    """Python and shell text that reads one sample, and that runs its teacher again.

    Args:
        location: of the store; None: readers use the service.
        base: address of the service or viewer, without a final slash.
        address: path of the page.
        again: options that say what a fresh run would load; None where there is nothing to compare.
    """
    where = location if location is not None else f"{base}/v1/stores/{quote(name)}"
    python = (
        "import logitstore as ls\n\n"
        f"store = ls.open({where!r})\n"
        f"record = store.sample({sample})\n"
        "print(record.arrays.keys())\n"
    )
    audit = None
    if again is not None:
        audit = shlex.join(["logitstore", "audit", where, *again, "--sample", str(sample)])
    curl = f"curl {shlex.quote(f'{base}{address}.json')}\n"
    return {"python": python, "curl": curl, "audit": audit}


def again(viewed: ViewedStore) -> list[str] | None:
    """Options of an audit that say what to run again; None where nothing can be compared."""
    header, corpus = viewed.header, viewed.corpus
    if header.signal.kind in _NOT_AUDITED:
        return None
    # What pushed its logits had a name of its own.
    name = header.teacher.name
    words = ["--teacher", name if name.startswith(("hf:", "py:")) else "hf:FOLDER_OR_ID"]
    if header.sample_kind == "sequence":
        return words
    # Such a store keeps no inputs; it has the labels.
    if not isinstance(corpus, CorpusInfo):
        return None
    names = [file.name for file in corpus.files if not file.name.startswith("labels:")]
    for name in names if len(names) <= _CORPUS_FILES else ["FILES"]:
        words += ["--corpus", name]
    return words
