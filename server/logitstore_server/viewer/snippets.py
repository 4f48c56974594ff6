"""Ready-made ways to get what a page shows."""

from __future__ import annotations

import shlex

__all__ = ["snippets"]


def snippets(
    location: str | None,
    base: str,
    name: str,
    sample: int,
    address: str,
    teacher: str | None = None,
) -> dict[str, str | None]:
    """Python and shell text that reads one sample, and that runs its teacher again.

    Args:
        location: of the store; None: readers use the service.
        base: address of the service or viewer, without a final slash.
        address: path of the page.
        teacher: what a fresh run would load; None where there is nothing to compare.
    """
    where = location if location is not None else f"{base}/v1/stores/{name}"
    python = (
        "import logitstore as ls\n\n"
        f"store = ls.open({where!r})\n"
        f"record = store.sample({sample})\n"
        "print(record.arrays.keys())\n"
    )
    audit = None
    if teacher is not None:
        words = ["logitstore", "audit", where, "--teacher", teacher, "--sample", str(sample)]
        audit = shlex.join(words)
    curl = f"curl {shlex.quote(f'{base}{address}.json')}\n"
    return {"python": python, "curl": curl, "audit": audit}
