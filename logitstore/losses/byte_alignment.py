"""Where the tokens of two tokenizers end in one text, and which of their ids mean the same bytes.

Everything is counted in bytes of the UTF-8 text: characters and string forms of tokens differ
between tokenizers (a leading space is "Ġ", "▁" or a plain byte), bytes do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ByteGroup", "byte_ends", "byte_groups", "matched_ids"]


class ByteGroup(NamedTuple):
    """Tokens of both sides that cover the same bytes: `student` and `target` are index ranges."""

    student: range
    target: range


def byte_ends(tokens: Tensor, byte_length_of_id: Tensor) -> Tensor:
    """Byte offset where each token ends, counted from the start of its row.

    Args:
        tokens: int64 [..., T].
        byte_length_of_id: int64 [V], bytes of every id; 0 for control tokens, which stand for no
            text.

    Returns: int64 [..., T].
    """
    return byte_length_of_id[tokens].cumsum(-1)


def byte_groups(
    student_ends: Sequence[int], target_ends: Sequence[int], *, leftover: bool = True
) -> list[ByteGroup]:
    """Walk two non-decreasing lists of byte ends; a group closes wherever both sides end together.

    Args:
        student_ends: where the student's tokens end.
        target_ends: where the teacher's tokens end, in the same text.
        leftover: tokens after the last common end form one more group, as in TRL. Its two sides
            need not cover the same bytes, for instance when one side was truncated; False leaves it
            out.

    Groups with an empty side are left out. A token without bytes (a control token) closes a group
    of its own when the other side has one at the same place, and otherwise joins the next group of
    its side.
    """
    groups: list[ByteGroup] = []
    s = t = first_s = first_t = 0
    while s < len(student_ends) and t < len(target_ends):
        difference = student_ends[s] - target_ends[t]
        s += difference <= 0
        t += difference >= 0
        if difference == 0:
            groups.append(ByteGroup(range(first_s, s), range(first_t, t)))
            first_s, first_t = s, t
    if leftover and first_s < len(student_ends) and first_t < len(target_ends):
        groups.append(
            ByteGroup(range(first_s, len(student_ends)), range(first_t, len(target_ends)))
        )
    return groups


def matched_ids(
    student_bytes: Sequence[bytes | None], target_bytes: Sequence[bytes | None]
) -> tuple[Tensor, Tensor]:
    """Ids of both tokenizers that stand for the same bytes: int64 [M] student, int64 [M] teacher.

    Args:
        student_bytes, target_bytes: bytes of every id, None or b"" for ids that stand for no text.
            Control tokens are matched by the caller, who knows what they mean.

    Ordered by teacher id. Where several ids of one side have the same bytes the lowest is taken.

    TRL matches token *strings*, so that "Ġthe" and "▁the" stay unmatched and control tokens of
    equal name match; bytes avoid both.
    """
    student_id_of: dict[bytes, int] = {}
    for i, token in enumerate(student_bytes):
        if token:
            student_id_of.setdefault(token, i)
    pairs: list[tuple[int, int]] = []
    seen: set[bytes] = set()
    for i, token in enumerate(target_bytes):
        if token and token in student_id_of and token not in seen:
            seen.add(token)
            pairs.append((student_id_of[token], i))
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()
