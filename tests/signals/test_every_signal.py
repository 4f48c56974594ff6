"""Every signal through writer, container, verify and dataset, on hostile rows, with every field.

Letters: N rows, V vocabulary, K kept ids, A always-ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import logitstore as ls
from logitstore import store as stores
from logitstore.analysis.convert import convert
from logitstore.capture import precompute
from logitstore.record.schema import layout_of
from logitstore.spec.errors import UsageError
from logitstore.spec.header import AUX_FIELDS
from logitstore.spec.signals import parse_signal
from logitstore.targets import (
    DenseTargets,
    GraphTargets,
    ThresholdTargets,
    TopKTargets,
)
from logitstore.targets.weighted import WeightedTargets
from tests.test_capture import settings

# k=V and k=30 exceed the support of some rows below; tau=1/3 asks for more ids than two.
SIGNALS = (
    "dense:dtype=float32",
    "topk:V",
    "topk:V,p=0.9",
    "topk:V,coding=q8",
    "sampled:12",
    "sampled:12,power=0.8",
    "threshold:tau=1/3",
    "threshold:k=30",
    "graph:k=V",
    "graph:k=V,form=vocab",
)


def zipf(vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return -1.3 * torch.log(1 + torch.randperm(vocab, generator=generator).float())


def hostile(vocab: int) -> torch.Tensor:
    """[N, V]: flat, one-hot, ties, mostly impossible, power law, all on the label, power law."""
    one_hot = torch.zeros(vocab)
    one_hot[vocab // 2] = 1e4
    alone = torch.full((vocab,), -torch.inf)
    alone[1] = 3.0
    rows = [
        torch.zeros(vocab),
        one_hot,
        torch.arange(vocab).div(7, rounding_mode="floor").float().clamp(max=9),
        zipf(vocab).index_fill(0, torch.arange(min(20, vocab - 1), vocab), -torch.inf),
        zipf(vocab),
        alone,
        zipf(vocab),
    ]
    return torch.stack(rows)


def named(signal: str, vocab: int) -> str:
    return signal.replace("V", str(min(vocab, 40))).replace("k=30", f"k={min(vocab, 30)}")


# Every signal in both containers; a real vocabulary's width in one.
CASES = [
    (signal, vocab, container)
    for signal in SIGNALS
    for vocab, container in ((2, "zarr"), (2, "arrow"), (60, "zarr"), (60, "arrow"))
]
CASES += [(s, 262_144, "zarr") for s in SIGNALS if "power" not in s and "q8" not in s]


@pytest.mark.parametrize(("signal", "vocab", "container"), CASES)
def test_hostile_rows_with_every_field(
    tmp_path: Path, signal: str, vocab: int, container: str
) -> None:
    signal = named(signal, vocab)
    logits = hostile(vocab)
    tokens = np.array([0, 1, 0, 1, 1, 0, 1])
    impossible = layout_of(parse_signal(signal), vocab)[3]
    always = [1] if vocab == 2 else [17, 0]
    with ls.writer(
        tmp_path,
        signal=signal,
        vocab_size=vocab,
        container=container,
        aux=[name for name in AUX_FIELDS if name not in impossible],
        lse_at=[2.0],
        always_ids=always,
        loss_mask=True,
        chunk_positions=16,
    ) as w:
        ends, mask = np.arange(1, 8), np.array([1, 1, 0, 1, 1, 1, 0], bool)
        w.add(tokens, logits, byte_end=ends, loss_mask=mask, segment_ids=[0, 0, 0, 0, 1, 1, 1])
    assert stores.verify(tmp_path, full=True).ok
    item = ls.LogitDataset(tmp_path)[0]
    targets = item.targets
    assert item.labels.tolist() == [1, 0, 1, -100, 0, 1, -100]

    z = logits.double()
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    label = item.labels.clamp_min(0)
    has = item.labels >= 0
    close = {"rtol": 1.5e-3, "atol": 2e-3}
    label_logp = logp.gather(-1, label[:, None])[:, 0]
    order = torch.from_numpy(np.argsort(-z.numpy(), axis=-1, kind="stable").copy())
    torch.testing.assert_close(
        targets.label_logprob.double(), torch.where(has, label_logp, 0.0), **close
    )
    rank = (order == label[:, None]).int().argmax(-1).clamp_max(65_535)
    assert targets.label_rank.tolist() == torch.where(has, rank, 0).tolist()
    torch.testing.assert_close(targets.entropy.double(), torch.special.entr(p).sum(-1), **close)
    torch.testing.assert_close(targets.lse.double(), torch.logsumexp(z, -1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        targets.lse_at[2.0].double(), torch.logsumexp(z / 2, -1), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(targets.logit_mean.double(), z.mean(-1), rtol=1e-5, atol=1e-5)
    assert targets.byte_end.tolist() == ends.tolist()
    torch.testing.assert_close(targets.always_logprobs.double(), logp[:, always], **close)
    _check(targets, z, logp, order, always, item.loss_mask, item.labels)


def _check(targets, z, logp, order, always, counted, labels) -> None:
    """The signal's own part against float64."""
    p = logp.exp()
    if isinstance(targets, DenseTargets):
        assert torch.equal(targets.logits, z.float())
    elif isinstance(targets, TopKTargets):
        ids = targets.ids
        kept = ids >= 0
        width = ids.shape[-1]
        assert torch.equal(ids[kept], order[:, :width][kept])
        want = logp.gather(-1, ids.clamp_min(0))
        # q8 ends at -127.9 nats
        error = (targets.logprobs.double().clamp_min(-127) - want.clamp_min(-127))[kept].abs()
        assert error.max() <= 1 / 32 + 2e-3
        outside = 1 - (p.gather(-1, ids.clamp_min(0)) * kept).sum(-1)
        torch.testing.assert_close(
            targets.log_tail.double().exp(), outside.clamp_min(0), rtol=2e-3, atol=2e-3
        )
    elif isinstance(targets, GraphTargets):
        k = min(len(z[0]), 40)
        x = torch.zeros_like(z)
        best = order[:, :k]
        x.scatter_(-1, best, z.gather(-1, best).clamp_min(-1e30).nan_to_num(neginf=0.0))
        x = torch.where(x < -1e29, 0.0, x)
        for segment, rows in enumerate(([0, 1, 2, 3], [4, 5, 6])):
            rows = [r for r in rows if counted[r]]
            if targets.coactivation is not None:
                v = x[rows].gather(-1, best[rows])
                torch.testing.assert_close(
                    targets.coactivation[segment].double(), v.T @ v, rtol=1e-5, atol=1e-3
                )
                continue
            nodes = targets.node_ids[segment]
            held = nodes[nodes >= 0]
            assert torch.equal(held, best[rows].unique())
            sums = (x[rows] * x[rows].sum(-1, keepdim=True)).sum(0)[held]
            got = targets.row_sums[segment][: len(held)].double()
            torch.testing.assert_close(got, sums, rtol=1e-5, atol=1e-2)
    else:
        assert isinstance(targets, WeightedTargets)
        position = targets.position_of_entry()
        assert not torch.isin(targets.ids, torch.tensor(always)).any()
        # The label stands in the head whatever its probability.
        assert ((p[position, targets.ids] > 0) | (targets.ids == labels[position])).all()
        assert (targets.weights >= 0).all()
        assert len(torch.unique(position * z.shape[-1] + targets.ids)) == len(targets.ids)
        total = torch.zeros(len(z), dtype=torch.float64)
        total.index_add_(0, position, targets.weights.double())
        if getattr(targets, "power", 1.0) == 1.0:
            total += targets.always_logprobs.double().exp().sum(-1)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-3)
        if isinstance(targets, ThresholdTargets):
            head = targets.head_mask().flatten()
            exact = p[position, targets.ids][head]
            error = (targets.weights.double()[head] - exact).abs()
            assert (error <= exact / 32 + 2e-3).all()


def test_a_graph_counts_answers_about_images_without_labels(tmp_path: Path) -> None:
    options = {"vocab_size": 9, "sample_kind": "classification", "labelled": False}
    with ls.writer(tmp_path, signal="graph:k=3", **options) as w:
        w.add(None, torch.arange(9.0))
    targets = ls.LogitDataset(tmp_path)[0].targets
    assert targets.num_positions.tolist() == [1]
    best = torch.tensor([8.0, 7.0, 6.0])
    assert torch.equal(targets.coactivation[0], torch.outer(best, best))


@pytest.mark.parametrize("vocab", [2, 262_144])
def test_scores_of_any_width(tmp_path: Path, vocab: int) -> None:
    """Ties, negative scores, float32's largest, no candidate at all, and every slot filled."""
    contexts = [([vocab - 1, 0], [3.0, 3.0]), ([0], [-3.4e38]), ([], [])]
    with ls.writer(
        tmp_path, signal="scores:2", vocab_size=vocab, sample_kind="classification", labelled=False
    ) as w:
        for ids, scores in contexts:
            w.add_scores(ids, scores)
    assert stores.verify(tmp_path, full=True).ok
    dataset = ls.LogitDataset(tmp_path)
    for number, (ids, scores) in enumerate(contexts):
        targets = dataset[number].targets
        given = targets.ids[0] >= 0
        assert targets.ids[0][given].tolist() == ids
        assert targets.scores[0][given].tolist() == np.float32(scores).tolist()


@pytest.mark.parametrize("options", [{"always_ids": [1]}, {"lse_at": [2.0]}, {"loss_mask": True}])
def test_scores_have_no_fields_of_a_distribution(tmp_path: Path, options: dict) -> None:
    with pytest.raises(UsageError, match="scores") as caught:
        ls.writer(
            tmp_path / "s",
            signal="scores:4",
            vocab_size=9,
            sample_kind="classification",
            **options,
        )
    assert caught.value.kind == "bad-argument"


def test_a_capture_of_every_signal_is_what_its_logits_give(tmp_path: Path) -> None:
    """The batch job on a language model's corpus: each signal equals the conversion of dense."""
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(f"line {i} of some text" for i in range(9)), encoding="utf-8")
    options = {"always_ids": (3, 1), "lse_at": (2.0,)}

    def capture(name: str, signal: str, aux: tuple[str, ...] | None = None) -> Path:
        precompute(settings(str(text), tmp_path / name, signal=signal, aux=aux, **options))
        return tmp_path / name

    aux = ("label_logprob", "label_rank", "entropy", "lse", "logit_mean", "byte_end")
    dense = capture("dense", "dense:dtype=float32", aux)
    for number, signal in enumerate(
        ("sampled:12", "threshold:tau=1/12", "graph:k=4", "graph:k=4,form=vocab", "topk:8,p=0.9")
    ):
        direct = capture(f"s{number}", signal, aux)
        convert(dense, tmp_path / f"c{number}", signal=signal)
        with ls.open(direct) as a, ls.open(tmp_path / f"c{number}") as b:
            assert a.num_samples == b.num_samples > 1
            for i in range(a.num_samples):
                got, want = a.sample(i), b.sample(i)
                for column in a.header.schema_.columns:
                    if column.name in want:
                        np.testing.assert_array_equal(got[column.name], want[column.name])
