"""Top-K records against a float64 reference, on ordinary and hostile rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.record import Record, build_schema
from logitstore.record import random as numpy_random
from logitstore.record.new_header import new_header
from logitstore.record.sequences import labels, loss_mask, position_ids
from logitstore.record.statistics import merge, statistics_of
from logitstore.signals import encoder, exact_topk
from logitstore.signals import random as torch_random
from logitstore.spec.errors import LogitstoreError, TeacherError
from logitstore.spec.header import AUX_FIELDS, TeacherInfo
from logitstore.spec.signals import parse_signal
from logitstore.targets import from_records

P, V = 37, 501


def make_header(signal: str, vocab_size: int = V, **options):
    return new_header(
        parse_signal(signal),
        vocab_size=vocab_size,
        configuration={"test": True},
        teacher=TeacherInfo(name="test"),
        **options,
    )


def encode(header, logits_PV, labels_P=None):
    positions = torch.arange(len(logits_PV))
    if labels_P is None:
        labels_P = torch.full((len(logits_PV),), -1)
    return encoder(header).encode(
        logits_PV, labels_P=labels_P, keys_P=torch.zeros_like(positions), positions_P=positions
    )


def reference_order(z):
    """Ids by descending value, equal values by ascending id, in pure numpy."""
    return np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=-1)


HOSTILE = {
    "random": lambda g: torch.randn(P, V, generator=g) * 3,
    "ties": lambda g: torch.randint(-3, 4, (P, V), generator=g).float(),
    "flat": lambda g: torch.zeros(P, V),
    "one-hot": lambda g: torch.nn.functional.one_hot(torch.arange(P), V).float() * 1e4,
    "masked": lambda g: torch.randn(P, V, generator=g).index_fill(
        1, torch.arange(9, V), -torch.inf
    ),
    "bfloat16": lambda g: (torch.randn(P, V, generator=g) * 3).bfloat16(),
    "far tail": lambda g: torch.randn(P, V, generator=g) - 200.0 * (torch.arange(V) > 0),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("k", [1, 5, V])
def test_every_field_against_float64(name: str, k: int) -> None:
    g = torch.Generator().manual_seed(1)
    logits = HOSTILE[name](g)
    label = torch.randint(0, V, (P,), generator=g)
    label[3] = -1
    aux = [f for f in AUX_FIELDS if f not in ("top1_logprob", "byte_end")]
    header = make_header(f"topk:{k}", aux=aux, lse_at=[2.0])
    out = encode(header, logits, label)

    z = logits.double()
    lse = torch.logsumexp(z, -1)
    logp = z - lse[:, None]
    order = reference_order(z.numpy())
    np.testing.assert_array_equal(out["ids"], order[:, :k])
    kept = logp.gather(1, torch.from_numpy(order[:, :k].copy()))
    # float16 has 11 significant bits; float32 logits of size 1e4 carry an error of 1e-3 of their
    # own
    np.testing.assert_allclose(out["logprobs"], kept.numpy(), rtol=1e-3, atol=2e-3)
    assert out["lse"] == pytest.approx(lse.numpy(), rel=2e-7, abs=2e-5)
    assert out["lse_at_0"] == pytest.approx(torch.logsumexp(z / 2, -1).numpy(), rel=2e-7, abs=2e-5)
    assert out["entropy"] == pytest.approx(
        torch.special.entr(logp.exp()).sum(-1).numpy(), rel=2e-3, abs=1e-3
    )
    tail = z.scatter(1, torch.from_numpy(order[:, :k].copy()), -torch.inf)
    log_tail = torch.logsumexp(tail, -1) - lse
    np.testing.assert_allclose(out["log_tail"], log_tail.half().numpy(), rtol=2e-3, atol=2e-3)
    has = label >= 0
    expected = torch.where(has, logp.gather(1, label.clamp_min(0)[:, None])[:, 0], 0.0)
    np.testing.assert_allclose(out["label_logprob"], expected.half().numpy(), rtol=1e-3, atol=2e-3)
    rank = (order == label.numpy()[:, None]).argmax(1)
    np.testing.assert_array_equal(out["label_rank"], np.where(has.numpy(), rank, 0))


@given(
    vocab=st.integers(1, 700),
    k=st.integers(1, 70),
    levels=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_order_is_descending_then_lowest_id(vocab: int, k: int, levels: int, seed: int) -> None:
    k = min(k, vocab)
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, levels, (4, vocab), generator=g).float()
    found = exact_topk(z, k)
    np.testing.assert_array_equal(found.ids, reference_order(z.numpy())[:, :k])
    assert torch.equal(found.values, z.gather(1, found.ids))


def test_two_stage_search_equals_a_full_sort_on_a_large_vocabulary() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 151_936, generator=g).bfloat16().float()
    found = exact_topk(z, 64)
    np.testing.assert_array_equal(found.ids, reference_order(z.numpy())[:, :64])


def test_nucleus_keeps_the_smallest_prefix_that_reaches_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]]))
    out = encode(make_header("topk:3,p=0.9", 4), logits)
    assert out["num_ids"].tolist() == [3, 1]
    assert out["ids"].tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(np.exp(out["log_tail"].astype(float)), [0.05, 0.03], atol=1e-4)


def test_q8_error_stays_inside_half_a_step() -> None:
    g = torch.Generator().manual_seed(0)
    # Confident rows: what follows the first lies up to 100 nats below it.
    logits = torch.randn(P, V, generator=g) * 3 - torch.arange(P)[:, None] * 2.5
    logits[:, 0] = 0.0
    exact = torch.log_softmax(logits.double(), -1).sort(descending=True).values[:, :32].numpy()
    coarse = encode(make_header("topk:32,coding=q8"), logits)["logprobs"].astype(float)
    assert np.abs(exact - coarse).max() <= 1 / 32 + 2e-3
    assert np.all(coarse * 16 == np.round(coarse * 16))


@pytest.mark.parametrize("signal", ["topk:32,coding=q8", "topk:32,p=0.9,coding=q8"])
def test_q8_keeps_the_largest_probability_exact(signal: str) -> None:
    logits = torch.randn(P, V, generator=torch.Generator().manual_seed(1)) * 3
    header = make_header(signal, sample_kind="classification")
    arrays = {
        "sample_lengths": np.array([P], np.uint32),
        "num_sample_key": np.array([1], np.uint16),
        "sample_key": np.frombuffer(b"s", np.uint8),
        "label": np.zeros(P, header.schema_.column("label").dtype),
        **encode(header, logits),
    }
    targets = from_records([Record(header.schema_, arrays)], header)
    logprobs = torch.log_softmax(logits.double(), -1).sort(descending=True).values
    off = (targets.logprobs.double() - logprobs[:, : targets.logprobs.shape[1]]).abs()
    assert off[:, 0].max() <= 2e-3
    assert off[:, 1:][targets.ids[:, 1:] >= 0].max() <= 1 / 32 + 2e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_is_named(bad: float) -> None:
    logits = torch.zeros(9, V)
    logits[7, 3] = bad
    with pytest.raises(TeacherError, match="position 7") as caught:
        encode(make_header("topk:4"), logits)
    assert caught.value.kind == "teacher-nonfinite"
    logits[7] = -torch.inf
    with pytest.raises(TeacherError, match="position 7"):
        encode(make_header("topk:4"), logits)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(TeacherError) as caught:
        encode(make_header("topk:4"), torch.zeros(2, V + 1))
    assert caught.value.kind == "teacher-shape"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"signal": "topk:502"}, "k-exceeds-vocabulary"),
        ({"signal": "topk:5", "aux": ["entropi"]}, "unknown-aux"),
        ({"signal": "topk:5", "aux": ["top1_logprob"]}, "unknown-aux"),
        ({"signal": "topk:5", "always_ids": [501]}, "bad-argument"),
    ],
)
def test_impossible_headers_are_refused(options: dict, kind: str) -> None:
    with pytest.raises(LogitstoreError) as caught:
        make_header(**options)
    assert caught.value.kind == kind


def test_rows_do_not_depend_on_how_they_are_blocked() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2100, V, generator=g)
    header = make_header("topk:8")
    whole = encode(header, logits)
    parts = [encode(header, part) for part in logits.split(700)]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]))


@given(
    seed=st.integers(0, 2**63 - 1),
    key=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
    draw=st.integers(0, 2**20),
)
def test_random_bits_agree_between_numpy_and_torch(seed, key, position, draw) -> None:
    signed = key - 2**64 if key >= 2**63 else key
    ours = torch_random.bits(
        seed, torch.tensor([signed]), torch.tensor([position]), torch.tensor([draw])
    )
    assert int(ours[0]) % 2**64 == int(numpy_random.bits(seed, key, position, draw))
    uniform = torch_random.uniform(
        seed, torch.tensor([signed]), torch.tensor([position]), torch.tensor([draw])
    )
    assert float(uniform[0]) == float(numpy_random.uniform(seed, key, position, draw))


def sequence_record(header, logits_PV, lengths, segments, tokens):
    schema = header.schema_
    keys = [f"doc{i}" for i in range(len(lengths))]
    arrays = {
        "sample_lengths": np.array(lengths, np.uint32),
        "num_sample_key": np.array([len(k) for k in keys], np.uint16),
        "sample_key": np.frombuffer("".join(keys).encode(), np.uint8),
        "tokens": np.array(tokens, np.uint16),
        "segment_ids": np.array(segments, np.uint16),
    }
    bare = Record(
        build_schema(
            header.signal, vocab_size=V, sample_kind="sequence", aux=(), lse_at=header.lse_at
        ),
        arrays,
    )
    label = torch.from_numpy(labels(bare))
    arrays.update(encode(header, logits_PV, torch.where(label < 0, -1, label)))
    return Record(schema, arrays)


def test_labels_masks_positions_and_targets_of_a_packed_record() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, V, generator=g)
    header = make_header("topk:6")
    record = sequence_record(header, logits, [4, 3], [0, 0, 1, 1, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11])
    assert labels(record).tolist() == [6, -100, 8, -100, 10, 11, -100]
    assert loss_mask(record).tolist() == [True, False, True, False, True, True, False]
    assert position_ids(record).tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert record.sample_keys() == ["doc0", "doc1"]
    assert record.sample(1)["tokens"].tolist() == [9, 10, 11]

    targets = from_records([record.sample(0), record.sample(1)], header)
    assert targets.lengths.tolist() == [4, 3]
    padded = targets.padded()
    assert padded.ids.shape == (2, 4, 6)
    assert padded.ids[1, 3].tolist() == [-1] * 6
    assert torch.equal(padded.ids[1, :3], targets.ids[4:])
    expected = torch.log_softmax(logits, -1).gather(1, targets.ids)
    assert torch.allclose(targets.logprobs, expected, atol=4e-3)


def test_statistics_merge_to_those_of_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, V, generator=g) * 4
    header = make_header("topk:6")
    record = sequence_record(header, logits, [4, 3], [0, 0, 1, 1, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11])
    whole = statistics_of(record)
    merged = merge([statistics_of(record.sample(0)), statistics_of(record.sample(1))])
    assert whole.labels == merged.labels == 4
    assert set(whole.measures) == {
        "entropy",
        "kept_mass",
        "label_logprob",
        "label_rank_log2",
        "top1_prob",
    }
    for name, measure in whole.measures.items():
        other = merged.measures[name]
        assert measure.histogram == other.histogram
        assert measure.total == pytest.approx(other.total, rel=1e-12)
        assert (measure.least, measure.greatest, measure.count) == (
            other.least,
            other.greatest,
            other.count,
        )
    assert whole.measures["entropy"].mean == pytest.approx(
        record["entropy"].astype(np.float64).mean()
    )
    assert sum(whole.reliability.counts) == 4
    kept = whole.measures["kept_mass"].mean
    assert kept == pytest.approx(np.exp(record["logprobs"].astype(float)).sum(1).mean(), abs=2e-3)
