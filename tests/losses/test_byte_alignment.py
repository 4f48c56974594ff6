"""Tokens of two tokenizers over the same bytes: groups, shared ids, and GOLD on real texts."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.corpora.documents import Document
from logitstore.corpora.packing import pack
from logitstore.losses.byte_alignment import byte_ends, byte_groups, matched_ids
from logitstore.losses.gold import gold
from logitstore.targets import DenseTargets, TopKTargets
from tests.losses.cases import random_logits, value_and_gradient


def test_byte_groups():
    def pairs(*args, **options):
        return [(list(g.student), list(g.target)) for g in byte_groups(*args, **options)]

    assert pairs([1, 2, 3], [3]) == [([0, 1, 2], [0])]
    assert pairs([2, 4], [3, 5]) == [([0, 1], [0, 1])]
    assert pairs([2, 4], [3, 5], leftover=False) == []
    # A control token (no bytes) at the start of one side only joins the next group.
    assert pairs([0, 2, 3], [2, 3]) == [([0, 1], [0]), ([2], [1])]
    # End tokens of both sides meet; one alone is dropped.
    assert pairs([2, 2], [2, 2]) == [([0], [0]), ([1], [1])]
    assert pairs([2, 2], [2]) == [([0], [0])]
    assert pairs([], [3]) == []


@given(data=st.data(), num_bytes=st.integers(1, 30))
@settings(max_examples=60)
def test_groups_partition_the_text(data, num_bytes):
    def cut():
        inner = data.draw(st.sets(st.integers(1, num_bytes - 1))) if num_bytes > 1 else set()
        return sorted(inner | {num_bytes})

    student, teacher = cut(), cut()
    groups = byte_groups(student, teacher)
    assert [i for g in groups for i in g.student] == list(range(len(student)))
    assert [i for g in groups for i in g.target] == list(range(len(teacher)))
    ends = [student[g.student[-1]] for g in groups]
    assert ends == [teacher[g.target[-1]] for g in groups]
    assert ends == sorted(set(student) & set(teacher))


def test_matched_ids_by_bytes():
    student = [b"<s>", b"a", b" the", None, b"the", b"a"]
    student[0] = None
    teacher = [b" the", b"", b"a", b"zz", b" the"]
    student_ids, teacher_ids = matched_ids(student, teacher)
    assert student_ids.tolist() == [2, 1]
    assert teacher_ids.tolist() == [0, 2]
    empty, _ = matched_ids([b"x"], [b"y"])
    assert empty.shape == (0,)


TEXT = (
    "In the beginning God created the heaven and the earth. "
    "Zażółć gęślą jaźń — 東京は雨 🙂; def f(x):\n    return x ** 2  # naïve\n"
)


def test_two_real_tokenizers(smollm2_tokenizer, word_tokenizer):
    """Student with SmolLM2's tokenizer, a record made with another: groups, bounds, matched ids."""
    sides = []
    for seed, tokenizer in enumerate((smollm2_tokenizer, word_tokenizer)):
        tokens = torch.from_numpy(tokenizer.encode(TEXT).ids)[None]
        lengths = torch.tensor(
            [
                0 if i in tokenizer.table.special else len(token or b"")
                for i, token in enumerate(tokenizer.table.tokens)
            ]
        )
        ends = byte_ends(tokens, lengths)
        # What the store holds for its own tokens is what the ids' bytes give.
        assert ends[0].tolist() == tokenizer.encode(TEXT).byte_ends.tolist()
        assert ends[0, -1] == len(TEXT.encode())
        logits = random_logits(seed, *tokens.shape, len(lengths)).float()
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        sides.append((logits, labels, ends, tokens))
    (student, labels, ends, tokens), (teacher, target_labels, target_ends, target_tokens) = sides
    groups = byte_groups(ends[0].tolist(), target_ends[0].tolist())
    pieces = [
        b"".join(tokenizer.table.tokens[i] for i in side[0].tolist()[members[0] : members[-1] + 1])
        for g in groups
        for tokenizer, side, members in (
            (smollm2_tokenizer, tokens, g.student),
            (word_tokenizer, target_tokens, g.target),
        )
    ]
    assert pieces[::2] == pieces[1::2]
    assert b"".join(pieces[::2]) == TEXT.encode()
    assert any(len(g.student) > 1 or len(g.target) > 1 for g in groups)

    options = {
        "labels": labels,
        "byte_end": ends,
        "target_mask": target_labels != -100,
    }
    dense = dataclasses.replace(DenseTargets.from_logits(teacher), byte_end=target_ends)
    stored = dataclasses.replace(
        TopKTargets.from_logits(teacher, 32, labels=target_labels), byte_end=target_ends
    )
    exact, gradient = value_and_gradient(
        gold, student, dense, target_labels=target_labels, **options
    )
    bound = gold(student, stored, **options)
    assert 0 < bound <= exact + 1e-5
    assert torch.isfinite(gradient).all()
    assert (gradient[0, -1] == 0).all()
    ids = matched_ids(smollm2_tokenizer.table.tokens, word_tokenizer.table.tokens)
    # Both hold every single byte, and most frequent words.
    assert 1000 < ids[0].numel() < 2000
    student_bytes = [smollm2_tokenizer.table.tokens[i] for i in ids[0].tolist()]
    assert student_bytes == [word_tokenizer.table.tokens[i] for i in ids[1].tolist()]
    exact = gold(student, dense, target_labels=target_labels, matched_ids=ids, **options)
    bound = gold(student, stored, matched_ids=ids, **options)
    assert 0 < bound <= exact + 1e-5


def test_packed_windows_of_two_tokenizers(smollm2_tokenizer, word_tokenizer):
    """The corpus's own byte ends, over two documents in one window."""
    documents = [Document(0, i, f"d#{i}", text) for i, text in enumerate((TEXT, TEXT[::-1]))]
    windows = [
        next(pack(documents, tokenizer, seq_len=4096, bos=False))
        for tokenizer in (smollm2_tokenizer, word_tokenizer)
    ]
    tokens, labels, ends, masks = (
        [torch.from_numpy(np.asarray(f(w)))[None] for w in windows]
        for f in (
            lambda w: w.tokens,
            lambda w: w.labels,
            lambda w: w.byte_end,
            lambda w: w.labels >= 0,
        )
    )
    vocabularies = [len(t.table) for t in (smollm2_tokenizer, word_tokenizer)]
    student, teacher = (
        random_logits(i, *tokens[i].shape, vocabularies[i]).float() for i in range(2)
    )
    stored = TopKTargets.from_logits(teacher, 16, labels=labels[1])
    stored = dataclasses.replace(stored, byte_end=ends[1])
    dense = dataclasses.replace(DenseTargets.from_logits(teacher), byte_end=ends[1])
    options = {
        "labels": labels[0],
        "mask": masks[0],
        "byte_end": ends[0],
        "target_mask": masks[1],
        "same_bytes": True,
    }
    exact = gold(student, dense, target_labels=labels[1], **options)
    assert 0 < gold(student, stored, **options) <= exact + 1e-5
    # With one tokenizer on both sides every group is one token, and equal logits cost nothing.
    options |= {"labels": labels[1], "mask": masks[1], "byte_end": ends[1]}
    assert gold(teacher, dense, target_labels=labels[1], **options) <= 1e-6
