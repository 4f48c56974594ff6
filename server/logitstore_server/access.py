"""What a request may see: the stores and metrics that its key allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Access", "access_of"]


@dataclass(frozen=True)
class Access:
    """What a request may see.

    Attributes:
        client: whose limits it counts against: `key:ID`, or `address:ADDRESS` without a key.
        stores: names of the stores that it may read.
        metrics: whether it may read the service's metrics.
    """

    client: str
    stores: frozenset[str]
    metrics: bool

    def may_read(self, store: str) -> bool:
        """Whether the store exists for this request; where not, the answer is 404."""
        return store in self.stores


def access_of(scope: Mapping[str, Any]) -> Access:
    """What the request of an ASGI scope may see, as `secure` found it.

    Raises: KeyError where no `Authentication` stands in front.
    """
    found = scope["state"]["access"]
    assert isinstance(found, Access)
    return found
