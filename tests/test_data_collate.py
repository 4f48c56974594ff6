"""Batches from in-memory records: alignment, padding, positions, attention, classification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from logitstore.data.chunks import Chunk, Row, gather
from logitstore.data.collate import Batch, Item, SampleId, collate
from logitstore.record import Record
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from tests.data_stores import Sample, make_header, make_record, random_samples, teacher_logits


def items(header: Header, record: Record, rows: Sequence[int] | None = None, k=None) -> list[Item]:
    chunk = Chunk(record)
    rows = range(record.num_samples) if rows is None else rows
    return [Item(Row(chunk, r), header, SampleId("0001-000000", r), k) for r in rows]


def test_row_t_meets_token_t_plus_1_of_its_segment():
    header = make_header()
    samples = random_samples(20)
    batch = collate(items(header, make_record(header, samples)))
    targets = batch.targets.padded()
    assert batch.tokens.shape == batch.labels.shape == targets.label_logprob.shape
    logprobs_VV = teacher_logits().log_softmax(-1)
    met = 0
    for b, sample in enumerate(samples):
        for t, (token, label) in enumerate(zip(sample.tokens, sample.labels(), strict=True)):
            assert batch.tokens[b, t] == token
            assert batch.labels[b, t] == (label if label >= 0 else -100)
            assert batch.loss_mask[b, t] == (label >= 0)
            expected = logprobs_VV[token].topk(8)
            assert targets.ids[b, t].tolist() == expected.indices.tolist()
            torch.testing.assert_close(targets.logprobs[b, t], expected.values, atol=2e-3, rtol=0)
            if label >= 0:
                met += 1
                value = logprobs_VV[token, label]
                torch.testing.assert_close(targets.label_logprob[b, t], value, atol=5e-3, rtol=0)
    assert met > 100
    assert batch.sample_keys == tuple(s.key for s in samples)
    assert batch.sample_ids[3] == ("0001-000000", 3)


def test_short_samples_are_padded_at_the_end():
    header = make_header()
    samples = [Sample("a", [1, 2, 3]), Sample("b", [4, 5, 6, 7, 8], [0, 0, 1, 1, 1])]
    batch = collate(items(header, make_record(header, samples)))
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]]
    assert batch.labels.tolist() == [[2, 3, -100, -100, -100], [5, -100, 7, 8, -100]]
    assert batch.loss_mask.tolist() == [
        [True, True, False, False, False],
        [True, False, True, True, False],
    ]
    assert batch.segment_ids.tolist() == [[0, 0, 0, -1, -1], [0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
    assert batch.targets.lengths.tolist() == [3, 5]
    assert batch.targets.padded().ids[0, 3].tolist() == [-1] * 8


def test_attention_is_causal_inside_segments():
    header = make_header()
    samples = [Sample("a", [1, 2]), Sample("b", [4, 5, 6, 7], [0, 0, 1, 1])]
    mask = collate(items(header, make_record(header, samples))).attention_mask()
    assert mask.shape == (2, 1, 4, 4)
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    # Padding sees padding: a row without any key would make NaN of the whole batch.
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask.any(-1).all()


def test_full_attention_does_not_restart():
    header = make_header(attention="full")
    samples = [Sample("a", [1]), Sample("b", [4, 5, 6], [0, 0, 1])]
    batch = collate(items(header, make_record(header, samples)))
    assert batch.position_ids.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert batch.attention_mask()[1, 0].equal(torch.ones(3, 3, dtype=torch.bool).tril())
    # Labels still do not cross documents: the store holds no distribution for that token.
    assert batch.labels[1].tolist() == [5, -100, -100]


def test_a_stored_mask_narrows_the_derived_one():
    header = make_header(loss_mask=True)
    batch = collate(items(header, make_record(header, [Sample("a", [1, 3, 4, 6, 7])])))
    assert batch.labels.tolist() == [[3, 4, 6, 7, -100]]
    assert batch.loss_mask.tolist() == [[True, False, True, False, False]]


def test_an_item_is_its_row_of_a_batch():
    header = make_header()
    samples = random_samples(6, seed=3)
    record = make_record(header, samples)
    batch = collate(items(header, record))
    for b, item in enumerate(items(header, record)):
        size = len(samples[b].tokens)
        for name in ("tokens", "labels", "loss_mask", "segment_ids", "position_ids"):
            assert getattr(item, name).equal(getattr(batch, name)[b, :size])
        assert item.sample_key == samples[b].key
        assert item.targets.ids.equal(batch.targets.padded().ids[b, :size])


@pytest.mark.parametrize("signal", ["topk:8", "topk:12,p=0.8"])
def test_k_gives_the_exact_smaller_record(signal):
    header = make_header(signal)
    smaller = make_header("topk:3")
    samples = random_samples(5)
    got = collate(items(header, make_record(header, samples), k=3)).targets
    want = collate(items(smaller, make_record(smaller, samples))).targets
    kept = got.ids >= 0
    assert got.ids[kept].equal(want.ids[kept])
    assert got.logprobs[kept].equal(want.logprobs[kept])
    full = kept.all(-1)
    assert full.any()
    torch.testing.assert_close(got.log_tail[full], want.log_tail[full], atol=5e-3, rtol=1e-3)


def test_gather_takes_any_rows_of_any_chunks_in_order():
    header = make_header("topk:8,p=0.9")
    samples = [random_samples(7, seed=s) for s in range(3)]
    chunks = [Chunk(make_record(header, s)) for s in samples]
    rng = np.random.default_rng(0)
    for _ in range(20):
        picks = [(int(c), int(r)) for c, r in rng.integers(0, (3, 7), (9, 2))]
        # A stretch of neighbours is copied as one piece and must come out the same.
        picks[2:6] = [(1, 2), (1, 3), (1, 4), (2, 5)]
        got = gather([Row(chunks[c], r) for c, r in picks])
        want = Record.concat([chunks[c].record.sample(r) for c, r in picks])
        assert got.sample_keys() == [samples[c][r].key for c, r in picks]
        for name, array in want.arrays.items():
            np.testing.assert_array_equal(got[name], array)
        assert not any(np.shares_memory(got["ids"], c.record["ids"]) for c in chunks)


def test_classification_batches_have_no_fields_of_sequences():
    header = make_header(sample_kind="classification", aux=("entropy", "log_tail"))
    samples = [Sample(f"image{i}", [i], label=i + 1) for i in range(5)]
    batch = collate(items(header, make_record(header, samples)))
    assert batch.labels.tolist() == [1, 2, 3, 4, 5]
    assert batch.targets.ids.shape == (5, 8)
    assert batch.targets.entropy.shape == (5,)
    assert not batch.targets.is_flat
    for name in ("tokens", "loss_mask", "segment_ids", "position_ids"):
        assert getattr(batch, name) is None
    item = items(header, make_record(header, samples))[2]
    assert item.labels == 3
    assert item.tokens is None
    with pytest.raises(UsageError, match="bad-argument"):
        batch.attention_mask()


def test_batches_move_as_one():
    header = make_header()
    batch = collate(items(header, make_record(header, random_samples(4))))
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.targets.ids.device.type} == {"meta"}
    assert moved.sample_keys == batch.sample_keys


def test_pin_memory_reaches_every_tensor(monkeypatch):
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self.clone()
    )
    header = make_header()
    batch = collate(items(header, make_record(header, random_samples(4))))
    assert isinstance(batch.pin_memory(), Batch)
    assert {id(batch.tokens), id(batch.labels), id(batch.targets.ids)} <= set(pinned)


def test_an_empty_batch_is_refused():
    with pytest.raises(UsageError, match="bad-argument"):
        collate([])
