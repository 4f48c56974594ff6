"""Names of the reader feature that keeps ranks in place of ids (format-v1, section 7.3)."""

from __future__ import annotations

__all__ = ["RANKED_COLUMNS", "RANKS_FEATURE", "RANKS_TABLE"]

RANKS_FEATURE = "rank-ids"

# Little-endian uint32 [V]: the id of every rank.
RANKS_TABLE = "id-ranks.u32"

# Columns of token ids that are ranks in objects.
RANKED_COLUMNS = ("ids", "head_ids", "tail_ids")
