"""Ready-made ways to get what a page shows."""

from __future__ import annotations

import shlex

__all__ = ["snippets"]


def snippets(
    location: str | None, base: str, name: str, sample: int, address: str
) -> dict[str, str]:
    """Python and shell text that reads one sample.

    Args:
        location: of the store; None: readers use the service.
        base: address of the service or viewer, without a final slash.
        address: path of the page.
    """
    where = location if location is not None else f"{base}/v1/stores/{name}"
    python = (
        "import logitstore as ls\n\n"
        f"store = ls.open({where!r})\n"
        f"record = store.sample({sample})\n"
        "print(record.arrays.keys())\n"
    )
    return {"python": python, "curl": f"curl {shlex.quote(f'{base}{address}.json')}\n"}
