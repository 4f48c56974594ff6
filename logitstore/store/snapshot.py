"""The set of commits a reader has pinned, small enough for a checkpoint."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from logitstore.spec.document import canonical_json, sha256_hex
from logitstore.spec.errors import StateError
from logitstore.spec.plan import shard_name

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """Shards and generations of one store.

    Attributes:
        store_uuid: the store.
        commits: (shard, generation) in reading order, which is the order of shard names.
    """

    store_uuid: str
    commits: tuple[tuple[str, int], ...]

    @property
    def digest(self) -> str:
        """SHA-256 over uuid, shards and generations: equal exactly for equal snapshots."""
        return sha256_hex(canonical_json([self.store_uuid, self.commits]))

    def as_state(self) -> dict[str, Any]:
        """JSON-able form: per plan a bitmap of shard numbers, and the generations that are not 1.

        Ten thousand complete shards take some 100 bytes.
        """
        bitmaps: dict[int, bytearray] = {}
        generations: dict[str, int] = {}
        for shard, generation in self.commits:
            plan, index = map(int, shard.split("-"))
            bitmap = bitmaps.setdefault(plan, bytearray())
            byte, bit = divmod(index, 8)
            bitmap.extend(bytes(max(0, byte + 1 - len(bitmap))))
            bitmap[byte] |= 1 << bit
            if generation != 1:
                generations[shard] = generation
        return {
            "store_uuid": self.store_uuid,
            "shards": {
                str(plan): base64.b64encode(zlib.compress(bytes(bitmap))).decode()
                for plan, bitmap in sorted(bitmaps.items())
            },
            "generations": generations,
            "digest": self.digest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot of `as_state`.

        Raises: StateError state-malformed.
        """
        try:
            commits: list[tuple[str, int]] = []
            for plan, packed in state["shards"].items():
                for index in _bits(packed):
                    name = shard_name(int(plan), index)
                    commits.append((name, int(state["generations"].get(name, 1))))
            snapshot = cls(str(state["store_uuid"]), tuple(sorted(commits)))
            matches = snapshot.digest == state["digest"]
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise StateError(
                "state-malformed", f"not a snapshot: {error!r}", expected="Snapshot.as_state()"
            ) from None
        if not matches:
            raise StateError(
                "state-malformed",
                "snapshot does not match its digest",
                got=snapshot.digest,
                expected=state["digest"],
            )
        return snapshot


# One bit for each of the million shard names of a plan.
_MAX_BITMAP_BYTES = 125_000


def _bits(packed: str) -> Iterable[int]:
    inflate = zlib.decompressobj()
    bitmap = inflate.decompress(base64.b64decode(packed, validate=True), _MAX_BITMAP_BYTES)
    if not inflate.eof:
        raise ValueError("bitmap is truncated or too long")
    for byte, value in enumerate(bitmap):
        for bit in range(8):
            if value >> bit & 1:
                yield byte * 8 + bit
