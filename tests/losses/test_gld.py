"""GLD: vectors, exact Gromov-Wasserstein by enumeration and by POT, records, segments, refusals."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses.gld import gld, gromov_wasserstein_square, topk_wasserstein
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import (
    DenseTargets,
    GraphTargets,
    SampledTargets,
    ThresholdTargets,
    TopKTargets,
)
from tests.losses.cases import Vectors, assert_vector, random_logits, seeds, value_and_gradient

CASES = ["case0", "case1"]


def written_f(logits_TV, mask_T, k):
    """Row sums of C = sum_t v v^T, formed as a matrix."""
    v_Tk = logits_TV[mask_T].sort(-1, descending=True).values[:, :k]
    return (v_Tk[:, :, None] * v_Tk[:, None, :]).sum(0).sum(-1)


def written_vocab_f(logits_TV, mask_T, k):
    """Row sums of X^T X over the ids that are in any counted row's top k, X zero elsewhere."""
    z = logits_TV[mask_T]
    ids = z.argsort(-1, descending=True)[:, :k]
    selected = torch.zeros_like(z).scatter_(-1, ids, 1.0)
    x = (z * selected)[:, selected.any(0)]
    return (x.T @ x).sum(-1)


def sorted_difference(f, g):
    f, g = (x.sort(descending=True).values for x in (f, g))
    width = max(f.numel(), g.numel())
    f, g = (torch.nn.functional.pad(x, (0, width - x.numel())) for x in (f, g))
    return (f - g).abs().sum()


def record(kind, logits, k, lengths=None):
    """One position a row, as a store would give it."""
    if kind == "dense":
        return DenseTargets(
            logits=logits
            if lengths is None
            else torch.cat([x[:n] for x, n in zip(logits, lengths, strict=True)]),
            vocab_size=logits.shape[-1],
            lengths=None if lengths is None else torch.tensor(lengths),
        )
    return TopKTargets.from_logits(logits, k)


def threshold_from(logits_NV, heads, lengths, labels=None):
    """Threshold targets: `heads` largest ids exact, the realised one among them, two tail ids."""
    order = logits_NV.argsort(-1, descending=True)
    logp = torch.log_softmax(logits_NV, -1)
    ids, weights, num_ids, num_heads, log_tail = [], [], [], [], []
    for n in range(logits_NV.shape[0]):
        head = order[n, :heads].tolist()
        if labels is not None and int(labels[n]) not in head:
            head = [*order[n, : heads - 1].tolist(), int(labels[n])]
        rest = [i for i in range(logits_NV.shape[1]) if i not in head]
        tail = rest[:2]
        outside = torch.logsumexp(logp[n, rest], 0)
        ids += head + tail
        weights += logp[n, head].exp().tolist() + [float(outside.exp()) / 2] * 2
        num_ids.append(len(head) + 2)
        num_heads.append(len(head))
        log_tail.append(float(outside))
    extra = {}
    if labels is not None:
        rank = (order == labels[:, None]).int().argmax(-1)
        extra = {"label_rank": rank}
    return ThresholdTargets(
        vocab_size=logits_NV.shape[1],
        lengths=torch.tensor(lengths),
        ids=torch.tensor(ids),
        weights=torch.tensor(weights, dtype=torch.float64),
        num_ids=torch.tensor(num_ids),
        num_heads=torch.tensor(num_heads),
        log_tail=torch.tensor(log_tail, dtype=torch.float64),
        lse=torch.logsumexp(logits_NV, -1),
        **extra,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["rank", "vocab"])
def test_vectors(name, form):
    case = Vectors("gld.npz", name)
    prefix = "" if form == "rank" else "vocab_"
    options = {
        "mask": case("student_mask").bool(),
        "target_mask": case("teacher_mask").bool(),
        "k": int(case("k")),
        "form": form,
    }
    assert_vector(
        gld,
        case("student_logits"),
        DenseTargets.from_logits(case("teacher_logits")),
        case(prefix + "loss"),
        case(prefix + "grad_student_logits"),
        **options,
    )
    each = gld(
        case("student_logits"),
        DenseTargets.from_logits(case("teacher_logits")),
        reduction="none",
        **options,
    )
    assert torch.allclose(each, case(prefix + "gw_tilde_per_sample"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_token_term_vector(name):
    case = Vectors("gld.npz", name)
    both = case("student_mask").bool() & case("teacher_mask").bool()
    got = topk_wasserstein(
        case("student_logits"),
        DenseTargets.from_logits(case("teacher_logits")),
        mask=both,
        k=int(case("k")),
    )
    assert abs(got - case("wd_tilde_token_mean")) <= 1e-10


@pytest.mark.parametrize("name", CASES)
def test_exact_distance_against_vectors_and_pot(name):
    case = Vectors("gld.npz", name)
    for b in range(case("C_teacher").shape[0]):
        first, second = case("C_teacher")[b], case("C_student")[b]
        square, perm = gromov_wasserstein_square(first, second)
        assert abs(square - case("exact_gw2_square_per_sample")[b]) <= 1e-9 * square
        assert perm.tolist() == case("exact_perm")[b].tolist()
        n = first.shape[0]
        uniform = np.full(n, 1 / n)
        local = ot.gromov.gromov_wasserstein2(
            first.numpy(), second.numpy(), uniform, uniform, "square_loss", symmetric=True
        )
        assert local >= float(square) - 1e-8 * max(1.0, float(square))
        assert case("pot_gw2_square_per_sample")[b] >= square - 1e-8


@given(seed=seeds, n=st.integers(2, 5), rows=st.integers(1, 5), offset=st.floats(-8, 8))
@settings(max_examples=30)
def test_closed_form_is_a_scaled_lower_bound(seed, n, rows, offset):
    student = random_logits(seed, 1, rows, 9) + offset
    teacher = random_logits(seed + 1, 1, rows, 9) + offset
    value = gld(student, DenseTargets.from_logits(teacher), k=n)
    graphs = []
    for logits in (teacher, student):
        v = logits[0].topk(n).values
        graphs.append(v.T @ v)
    f, g = (graph.sum(-1).sort(descending=True).values for graph in graphs)
    first_lower_bound = ((f - g) / n).square().mean().sqrt()
    gw2 = gromov_wasserstein_square(*graphs)[0].sqrt()
    slack = 1e-9 * float(graphs[0].abs().max() + graphs[1].abs().max())
    assert value / n**2 <= first_lower_bound + slack
    assert first_lower_bound <= gw2 + slack


@pytest.mark.parametrize("form", ["rank", "vocab"])
@pytest.mark.parametrize("offset", [0.0, 5.0, -20.0])
def test_matches_the_matrix_form_with_other_lengths_and_vocabularies(form, offset):
    student = random_logits(0, 2, 5, 13) + offset
    teacher = random_logits(1, 2, 7, 8) + offset
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    target_mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
    written = written_f if form == "rank" else written_vocab_f
    expected = torch.stack(
        [
            sorted_difference(
                written(student[b], mask[b], 4), written(teacher[b], target_mask[b], 4)
            )
            for b in range(2)
        ]
    )
    options = {"mask": mask, "target_mask": target_mask, "k": 4, "form": form}
    targets = DenseTargets.from_logits(teacher)
    assert torch.allclose(gld(student, targets, reduction="none", **options), expected)
    assert torch.allclose(gld(student, targets, **options), expected.mean())
    total, count = gld(student, targets, reduction="sum", with_count=True, **options)
    assert torch.allclose(total, expected.sum())
    assert count == 2


@pytest.mark.parametrize("form", ["rank", "vocab"])
def test_every_record_gives_the_dense_value(form):
    lengths = [6, 4]
    student, teacher = random_logits(2, 2, 6, 11), random_logits(3, 2, 6, 11)
    flat = torch.cat([teacher[0, :6], teacher[1, :4]])
    dense = record("dense", teacher, 11, lengths)
    expected, gradient = value_and_gradient(gld, student, dense, k=3, form=form)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    topk = TopKTargets.from_logits(flat, 5)
    flat_topk = TopKTargets(
        vocab_size=11,
        lengths=torch.tensor(lengths),
        ids=topk.ids,
        logprobs=topk.logprobs,
        lse=topk.lse,
    )
    for targets in (flat_topk, threshold_from(flat, 4, lengths, labels)):
        got, got_gradient = value_and_gradient(gld, student, targets, k=3, form=form)
        assert abs(got - expected) <= 1e-9
        assert torch.allclose(got_gradient, gradient, rtol=0, atol=1e-9)
    token = topk_wasserstein(student, dense, k=3)
    for targets in (flat_topk, threshold_from(flat, 4, lengths)):
        assert abs(topk_wasserstein(student, targets, k=3) - token) <= 1e-9


def test_graph_records_per_segment():
    student, teacher = random_logits(4, 2, 6, 10), random_logits(5, 2, 6, 10)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [3, 3, 3, 3, 4, 4]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 0]]).bool()
    k = 4
    pieces = [(b, s) for b in range(2) for s in segments[b].unique().tolist()]
    graphs = []
    for b, s in pieces:
        v = teacher[b, mask[b] & (segments[b] == s)].topk(k).values
        graphs.append(v.T @ v)
    c = torch.stack(graphs)
    stored = GraphTargets(
        vocab_size=10,
        coactivation=c,
        row_sums=c.sum(-1),
        num_positions=torch.tensor([2, 2, 3, 1]),
        num_segments=torch.tensor([2, 2]),
    )
    dense = DenseTargets.from_logits(teacher)
    options = {"mask": mask, "segment_ids": segments, "reduction": "none"}
    expected = gld(student, dense, k=k, **options)
    assert expected.shape == (4,)
    assert torch.allclose(gld(student, stored, **options), expected)
    assert torch.allclose(gld(student, stored, k=2, **options), gld(student, dense, k=2, **options))
    assert torch.allclose(
        gld(student, stored, per_position=True, **options),
        gld(student, dense, k=k, per_position=True, **options),
    )
    # A segment of one token has a graph without positions and no row that counts.
    short = mask.clone()
    short[1, 4] = False
    emptied = GraphTargets(
        vocab_size=10,
        row_sums=c.sum(-1),
        num_positions=torch.tensor([2, 2, 3, 0]),
        num_segments=torch.tensor([2, 2]),
    )
    got = gld(student, emptied, mask=short, segment_ids=segments, reduction="none")
    assert torch.allclose(got, expected[:3])
    with pytest.raises(TargetsError, match="row sums only"):
        gld(student, emptied, mask=mask, segment_ids=segments, k=2)
    with pytest.raises(TargetsError, match="segment_ids"):
        gld(student, stored, mask=mask)
    with pytest.raises(TargetsError, match="other form"):
        gld(student, stored, mask=mask, segment_ids=segments, form="vocab")


def test_graph_record_of_the_vocabulary_form():
    student, teacher = random_logits(6, 1, 5, 10), random_logits(7, 1, 5, 10) - 6
    k = 3
    z = teacher[0]
    ids = z.topk(k).indices
    x = torch.zeros_like(z).scatter_(-1, ids, z.gather(-1, ids))
    nodes = ids.unique()
    f = (x.T @ x).sum(-1)[nodes]
    stored = GraphTargets(
        vocab_size=10,
        row_sums=torch.nn.functional.pad(f, (0, 2))[None],
        node_ids=torch.nn.functional.pad(nodes, (0, 2), value=-1)[None],
        num_positions=torch.tensor([5]),
        num_segments=torch.tensor([1]),
    )
    expected = gld(student, DenseTargets.from_logits(teacher), k=k, form="vocab")
    assert torch.allclose(gld(student, stored, k=k, form="vocab"), expected)


def test_segments_equal_separate_samples():
    student, teacher = random_logits(8, 1, 7, 9), random_logits(9, 1, 7, 9)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    packed = gld(
        student, DenseTargets.from_logits(teacher), segment_ids=segments, k=3, reduction="none"
    )
    for index, part in enumerate((slice(0, 3), slice(3, 7))):
        alone = gld(student[:, part], DenseTargets.from_logits(teacher[:, part]), k=3)
        assert torch.allclose(packed[index], alone)


@pytest.mark.parametrize("form", ["rank", "vocab"])
def test_masked_rows_do_not_matter(form):
    student, teacher = random_logits(10, 2, 4, 8), random_logits(11, 2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()
    targets = DenseTargets.from_logits(teacher)
    expected = value_and_gradient(gld, student, targets, mask=mask, k=3, form=form)
    for junk in (torch.nan, torch.inf, 1e30):
        dirty = student.masked_fill(~mask[..., None], junk)
        dirty_teacher = DenseTargets.from_logits(teacher.masked_fill(~mask[..., None], junk))
        got = value_and_gradient(gld, dirty, dirty_teacher, mask=mask, k=3, form=form)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("form", ["rank", "vocab"])
def test_gradcheck_invariances_and_scale(form):
    student = random_logits(12, 2, 3, 6).requires_grad_()
    teacher = random_logits(13, 2, 3, 6)
    targets = DenseTargets.from_logits(teacher)
    assert torch.autograd.gradcheck(lambda s: gld(s, targets, k=3, form=form), student)
    assert gld(teacher, targets, k=3, form=form) == 0
    perm = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    # Renaming ids changes nothing in either form, and the two sides may be renamed apart.
    assert torch.allclose(
        gld(student[..., perm], targets, k=3, form=form), gld(student, targets, k=3, form=form)
    )
    # Not shift-invariant: raw logits are compared.
    assert not torch.allclose(
        gld(student + 1, targets, k=3, form=form), gld(student, targets, k=3, form=form)
    )
    huge = torch.zeros(1, 2, 6, dtype=torch.float32)
    huge[..., 0] = 1e4
    value, gradient = value_and_gradient(gld, huge, targets.map(lambda t: t[:1, :2]), k=3)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_half_precision_is_accumulated_in_float32():
    student = (random_logits(14, 1, 64, 50) + 20).bfloat16()
    teacher = random_logits(15, 1, 64, 50)
    targets = DenseTargets.from_logits(teacher)
    got, gradient = value_and_gradient(gld, student, targets, k=10)
    assert got.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    expected = gld(student.double(), targets, k=10)
    assert abs(got - expected) <= 1e-5 * expected


def test_refusals():
    student = random_logits(16, 1, 3, 8)
    few = TopKTargets.from_logits(student, 4)
    with pytest.raises(TargetsError, match="pass a smaller k") as caught:
        gld(student, few, k=5)
    assert caught.value.kind == "targets-mismatch"
    bare = TopKTargets(vocab_size=8, ids=few.ids, logprobs=few.logprobs)
    with pytest.raises(TargetsError, match="--aux lse"):
        gld(student, bare, k=3)
    with pytest.raises(TargetsError, match="--aux lse"):
        topk_wasserstein(student, bare, k=3)
    with pytest.raises(TargetsError) as caught:
        gld(student, few, k=3, mask=torch.zeros(1, 3, dtype=torch.bool))
    assert caught.value.kind == "empty-mask"
    with pytest.raises(TargetsError, match="target_mask"):
        gld(student[:, :2], few, k=3)
    with pytest.raises(TargetsError, match=r"\[B, T, V\]"):
        gld(student[0], few, k=3)
    with pytest.raises(TargetsError) as caught:
        gld(student, few, k=9)
    assert caught.value.kind in ("k-exceeds-vocabulary", "targets-mismatch")
    counts = torch.ones(1, 3, 2, dtype=torch.int64)
    sampled = SampledTargets.from_counts(few.ids[..., :2], counts, rounds=2, vocab_size=8)
    with pytest.raises(TargetsError, match="sampled"):
        gld(student, sampled, k=3)
    with pytest.raises(UsageError):
        gld(student, few, k=3, form="edges")
    with pytest.raises(UsageError):
        gromov_wasserstein_square(torch.eye(10), torch.eye(10))
    # The head holds the realised token for its own sake: it is not the fourth largest.
    worst = student[0].argmin(-1)
    outranked = threshold_from(student[0], 4, [3], worst)
    assert torch.isfinite(gld(student, outranked, k=3))
    with pytest.raises(TargetsError, match="pass a smaller k"):
        gld(student, outranked, k=4)
