"""Documents to windows: what is promised about BOS, segments, labels, keys and byte offsets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.corpora import (
    ByteTokenizer,
    Document,
    FastTokenizer,
    labels_of,
    pack,
    position_ids_of,
)


def documents(*texts: str) -> list[Document]:
    return [Document(0, i, f"f#{i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def bpe(tiny_lm_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    return FastTokenizer(
        tokenizer.backend_tokenizer,
        name="tiny",
        bos_id=tokenizer.bos_token_id,
        adds_bos=False,
    )


def test_windows_segments_and_labels():
    samples = list(
        pack(documents("abc", "de", "fghij"), ByteTokenizer(257, 256), seq_len=6, bos=True)
    )
    assert [s.key for s in samples] == ["f#0@0", "f#1@2", "f#2@5"]
    assert [s.tokens.tolist() for s in samples] == [
        [256, *b"abc", 256, *b"d"],
        [*b"e", 256, *b"fghi"],
        [*b"j"],
    ]
    assert [s.segment_ids.tolist() for s in samples] == [
        [0, 0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1, 1],
        [0],
    ]
    assert samples[0].labels.tolist() == [*b"abc", -1, *b"d", -1]
    assert samples[1].labels.tolist() == [-1, *b"fghi", -1]
    assert samples[0].position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert samples[0].byte_end.tolist() == [0, 1, 2, 3, 3, 4]
    assert samples[1].byte_end.tolist() == [1, 1, 2, 3, 4, 5]


def test_blank_documents_give_nothing_and_a_limit_cuts_inside_a_document():
    samples = list(
        pack(documents(" \n", "abcdef"), ByteTokenizer(), seq_len=4, bos=False, max_tokens=5)
    )
    assert [s.tokens.tolist() for s in samples] == [[*b"abcd"], [*b"e"]]
    assert list(pack(documents("", "\t"), ByteTokenizer(), seq_len=4, bos=False)) == []


@given(
    texts=st.lists(st.text(max_size=30), max_size=8),
    seq_len=st.integers(2, 17),
    bos=st.booleans(),
)
def test_every_byte_is_packed_once_in_order(texts, seq_len, bos):
    """Windows together are the documents; all but the last are full; keys are unique."""
    samples = list(pack(documents(*texts), ByteTokenizer(257, 256), seq_len=seq_len, bos=bos))
    tokens = [int(t) for s in samples for t in s.tokens]
    expected: list[int] = []
    for text in texts:
        if text and not text.isspace():
            expected += ([256] if bos else []) + list(text.encode())
    assert tokens == expected
    assert all(len(s) == seq_len for s in samples[:-1])
    assert len({s.key for s in samples}) == len(samples)
    for sample in samples:
        assert (np.diff(sample.segment_ids) >= 0).all()
        ends = np.diff(np.append(0, sample.byte_end))
        assert (ends == (sample.tokens < 256)).all()


@given(segments=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_labels_and_position_ids_restart_with_each_segment(segments):
    segment_ids = np.repeat(np.arange(len(segments)), segments)
    tokens = np.arange(len(segment_ids)) + 7
    labels, positions = labels_of(tokens, segment_ids), position_ids_of(segment_ids)
    start = 0
    for length in segments:
        own = tokens[start : start + length].tolist()
        assert labels[start : start + length].tolist() == [*own[1:], -1]
        assert positions[start : start + length].tolist() == list(range(length))
        start += length


HARD = "naïve 👩‍🚀 漢字 e\u0301 \u0000 end\n\ttabs  and   blanks <s> </s>"


@given(text=st.text(max_size=40) | st.just(HARD))
def test_token_bytes_and_ends_are_exact_for_byte_level_bpe(bpe, text):
    """Also where one character is several tokens: each token's bytes stand where byte_ends says."""
    encoded = bpe.encode(text)
    data = text.encode()
    start = 0
    for token, end in zip(encoded.ids, encoded.byte_ends, strict=True):
        assert bpe.table.tokens[token] == data[start:end]
        start = int(end)
    assert start == len(data)


def test_a_character_split_over_tokens_has_ends_inside_it(bpe):
    ends = bpe.encode("👩").byte_ends.tolist()
    assert ends == [1, 2, 3, 4]


def test_special_tokens_are_in_the_table(bpe):
    assert bpe.table.special == {0, 1}
    assert bpe.table.tokens[:2] == (b"<s>", b"</s>")


def test_a_tokenizer_that_normalises_text_gives_the_ends_of_its_characters():
    """Lower-casing changes the bytes, so ends come from character offsets."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"ärger": 0, "oh": 1, "?": 2}, unk_token="?"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = FastTokenizer(backend, name="words", bos_id=None, adds_bos=False)
    assert tokenizer.encode("OH  Ärger").byte_ends.tolist() == [2, 10]


def test_sentencepiece_like_pieces_have_blanks_and_bytes():
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "<0x0A>": 1, "▁a": 2, "b": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = FastTokenizer(backend, name="sp", bos_id=None, adds_bos=False)
    assert tokenizer.table.tokens == (b"<unk>", b"\n", b" a", b"b")


def test_a_real_tokenizer_gives_back_a_real_text(smollm2_dir, kjv_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    fast = FastTokenizer(tokenizer.backend_tokenizer, name="smollm2", bos_id=1, adds_bos=False)
    assert len(fast.table) == 49_152
    text = kjv_path.read_text(encoding="utf-8")[:100_000] + HARD
    encoded = fast.encode(text)
    assert b"".join(fast.table.tokens[i] for i in encoded.ids) == text.encode()
    assert encoded.byte_ends[-1] == len(text.encode())
