"""GOLD: vectors, groups written out, hybrid distance, records, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.losses.byte_alignment import byte_groups
from logitstore.losses.gold import gold
from logitstore.spec.errors import TargetsError, UsageError
from logitstore.targets import DenseTargets, TopKTargets
from tests.losses.cases import (
    Vectors,
    assert_vector,
    log_softmax64,
    random_logits,
    seeds,
    value_and_gradient,
)


class Side:
    """Logits, labels, mask and byte ends of one side; tokens `start..start+n-1` are the answer."""

    def __init__(self, logits, ids, start, ends):
        num = len(ends)
        self.logits, self.ids, self.start = logits, ids, start
        self.labels = torch.full_like(ids, -100)
        self.labels[:, :-1] = ids[:, 1:]
        self.mask = torch.zeros(ids.shape, dtype=torch.bool)
        self.mask[:, start - 1 : start - 1 + num] = True
        self.byte_end = torch.zeros_like(ids)
        self.byte_end[0, start : start + num] = torch.as_tensor(ends)
        self.byte_end[0, start + num :] = int(ends[-1])


def vector_sides(name):
    case = Vectors("uld_gold.npz", name)
    sides = [
        Side(
            case(f"{who}_logits"),
            case(f"{who}_ids"),
            int(case(f"{who}_answer_start_len")[0]),
            case(f"{who}_byte_end"),
        )
        for who in ("student", "teacher")
    ]
    return case, *sides


def dense_of(teacher):
    return dataclasses.replace(DenseTargets.from_logits(teacher.logits), byte_end=teacher.byte_end)


def topk_of(teacher, k, **options):
    stored = TopKTargets.from_logits(teacher.logits, k, labels=teacher.labels, **options)
    return dataclasses.replace(stored, byte_end=teacher.byte_end)


def common(student, teacher):
    return {
        "labels": student.labels,
        "mask": student.mask,
        "byte_end": student.byte_end,
        "target_mask": teacher.mask,
    }


def random_case(seed, student_ends=(1, 4, 6, 7, 9), teacher_ends=(3, 4, 9, 10)):
    g = torch.Generator().manual_seed(seed)
    sides = []
    for vocab, ends, start in ((11, student_ends, 2), (9, teacher_ends, 1)):
        length = start + len(ends) + 1
        ids = torch.randint(vocab, (1, length), generator=g)
        sides.append(
            Side(random_logits(seed + vocab, 1, length, vocab, scale=2.0), ids, start, ends)
        )
    return sides


def written_groups(side, groups, strategy, temperature=1.0):
    """[G, V] P_g of groups of answer-token indices, one product at a time."""
    shift = 0 if strategy == "observed" else -1
    probs = log_softmax64(side.logits[0], temperature).exp()
    out = []
    for group in groups:
        tokens = [side.start + m for m in group]
        base = tokens[0] if strategy == "observed" else tokens[-1]
        row = probs[base + shift]
        for other in tokens:
            if other != base:
                row = row * probs[other + shift, side.ids[0, other]].clamp_min(1e-8)
        out.append(row)
    return torch.stack(out)


def sorted_l1(q, p):
    q, p = (x.sort(-1, descending=True).values for x in (q, p))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


def written_hybrid(q, p, student_ids, teacher_ids, beta, weights):
    qm, pm = q[:, student_ids], p[:, teacher_ids]
    if beta == 0:
        matched = pm * (pm / qm).log()
    elif beta == 1:
        matched = qm * (qm / pm).log()
    else:
        m = beta * pm + (1 - beta) * qm
        matched = beta * pm * (pm / m).log() + (1 - beta) * qm * (qm / m).log()
    rest_q = q[:, [i for i in range(q.shape[1]) if i not in student_ids.tolist()]]
    rest_p = p[:, [i for i in range(p.shape[1]) if i not in teacher_ids.tolist()]]
    return weights[0] * matched.sum(-1) + weights[1] * sorted_l1(rest_q, rest_p)


@pytest.mark.parametrize(("name", "strategy"), [("case0", "observed"), ("case1", "bayesian")])
def test_vectors(name, strategy):
    case, student, teacher = vector_sides(name)
    assert_vector(
        gold,
        student.logits,
        dense_of(teacher),
        case("loss"),
        case("grad_student_logits"),
        target_labels=teacher.labels,
        strategy=strategy,
        **common(student, teacher),
    )
    groups = byte_groups(case("student_byte_end").tolist(), case("teacher_byte_end").tolist())
    first_last = [[g.student[0], g.student[-1]] for g in groups]
    assert first_last == case("student_groups_first_last").tolist()
    first_last = [[g.target[0], g.target[-1]] for g in groups]
    assert first_last == case("teacher_groups_first_last").tolist()


GROUPS = [((0, 1), (0, 1)), ((2, 3, 4), (2,))]


@pytest.mark.parametrize("strategy", ["bayesian", "observed"])
@pytest.mark.parametrize("beta", [None, 0.0, 0.3, 1.0])
def test_matches_the_products_written_out(strategy, beta):
    student, teacher = random_case(0)
    # Byte 10 of the teacher has no counterpart: a leftover group with an empty side, dropped.
    q = written_groups(student, [g[0] for g in GROUPS], strategy, 2.0)
    p = written_groups(teacher, [g[1] for g in GROUPS], strategy, 1.5)
    options = common(student, teacher) | {
        "target_labels": teacher.labels,
        "strategy": strategy,
        "student_temperature": 2.0,
        "teacher_temperature": 1.5,
    }
    expected = sorted_l1(q, p).mean()
    if beta is not None:
        ids = (torch.tensor([1, 7, 4, 10]), torch.tensor([0, 2, 5, 8]))
        weights = (4 / 9, 5 / 9)
        expected = written_hybrid(q, p, *ids, beta, weights).mean()
        options |= {"matched_ids": ids, "beta": beta}
    assert torch.allclose(gold(student.logits, dense_of(teacher), **options), expected)
    if beta is not None:
        fixed = written_hybrid(q, p, *ids, beta, (0.2, 0.8)).mean()
        got = gold(student.logits, dense_of(teacher), matched_weight=0.2, **options)
        assert torch.allclose(got, fixed)
        fixed = written_hybrid(q, p, *ids, beta, (0.2, 0.5)).mean()
        options |= {"matched_weight": 0.2, "unmatched_weight": 0.5}
        assert torch.allclose(gold(student.logits, dense_of(teacher), **options), fixed)


def test_a_side_without_unmatched_ids_still_counts():
    student, teacher = random_case(1)
    # Every teacher id is matched: the student's other ids stand against zeros.
    ids = (torch.arange(9), torch.arange(9))
    q = written_groups(student, [g[0] for g in GROUPS], "bayesian")
    p = written_groups(teacher, [g[1] for g in GROUPS], "bayesian")
    expected = written_hybrid(q, p, *ids, 0.5, (0.5, 0.5)).mean()
    got = gold(
        student.logits,
        dense_of(teacher),
        target_labels=teacher.labels,
        matched_ids=ids,
        matched_weight=0.5,
        **common(student, teacher),
    )
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("hybrid", [False, True])
def test_complete_record_is_exact(hybrid):
    student, teacher = random_case(2)
    options = common(student, teacher)
    if hybrid:
        options["matched_ids"] = (torch.tensor([1, 7, 4]), torch.tensor([0, 2, 5]))
    dense = value_and_gradient(
        gold, student.logits, dense_of(teacher), target_labels=teacher.labels, **options
    )
    stored = value_and_gradient(gold, student.logits, topk_of(teacher, 9), **options)
    assert abs(dense[0] - stored[0]) <= 1e-12
    assert torch.allclose(dense[1], stored[1], rtol=0, atol=1e-12)
    softened = {"teacher_temperature": 2.0}
    stored = gold(student.logits, topk_of(teacher, 9, temperatures=(2.0,)), **options, **softened)
    dense = gold(
        student.logits, dense_of(teacher), target_labels=teacher.labels, **options, **softened
    )
    assert abs(dense - stored) <= 1e-12


@given(seed=seeds, k=st.integers(1, 9), hybrid=st.booleans(), beta=st.floats(0.05, 0.95))
@settings(max_examples=60)
def test_record_gives_a_lower_bound_within_its_distance(seed, k, hybrid, beta):
    student, teacher = random_case(seed)
    options = common(student, teacher)
    student_ids, teacher_ids = torch.tensor([1, 7, 4, 9]), torch.tensor([0, 2, 5, 6])
    if hybrid:
        options |= {"matched_ids": (student_ids, teacher_ids), "beta": beta}
    exact = gold(student.logits, dense_of(teacher), target_labels=teacher.labels, **options)
    bound = gold(student.logits, topk_of(teacher, k), **options)
    q = written_groups(student, [g[0] for g in GROUPS], "bayesian")
    p = written_groups(teacher, [g[1] for g in GROUPS], "bayesian")
    top = p.topk(k)
    r = p.sum(-1) - top.values.sum(-1)
    s = q.sum(-1) - q.sort(-1, descending=True).values[:, :k].sum(-1)
    slack = 2 * torch.minimum(s, r)
    if hybrid:
        stored = [set(row) for row in top.indices.tolist()]
        s_m = torch.stack(
            [
                sum(
                    (
                        q[g, i]
                        for i, j in zip(student_ids.tolist(), teacher_ids.tolist(), strict=True)
                        if j not in stored[g]
                    ),
                    start=torch.zeros((), dtype=torch.float64),
                )
                for g in range(2)
            ]
        )
        w = 4 / 9
        jsd_slack = beta * r * math.log(1 / beta) + (1 - beta) * s_m * math.log(1 / (1 - beta))
        slack = w * jsd_slack + (1 - w) * 2 * r
    assert bound <= exact + 1e-12
    assert exact <= bound + slack.mean() + 1e-12


def test_single_token_groups_are_uld():
    from logitstore.losses.uld import uld

    ends = (2, 5, 6)
    student, teacher = random_case(3, ends, ends)
    options = {"mask": student.mask, "target_mask": teacher.mask}
    expected = uld(student.logits, dense_of(teacher), **options)
    got = gold(
        student.logits,
        dense_of(teacher),
        target_labels=teacher.labels,
        **common(student, teacher),
    )
    assert torch.allclose(got, expected)


def test_impossible_tokens_keep_a_floor():
    student, teacher = random_case(4)
    student.logits[0, 1:, :] = 0.0
    student.logits[0, 1, student.labels[0, 1]] = -1e4
    targets = dense_of(teacher)
    options = common(student, teacher) | {"target_labels": teacher.labels}
    value, gradient = value_and_gradient(gold, student.logits, targets, **options)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    q = written_groups(student, [g[0] for g in GROUPS], "bayesian")
    assert torch.allclose(q[0].sum(), torch.tensor(1e-8, dtype=torch.float64))
    p = written_groups(teacher, [g[1] for g in GROUPS], "bayesian")
    assert torch.allclose(value, sorted_l1(q, p).mean())


@pytest.mark.parametrize("signal", ["dense", "topk", "hybrid", "hybrid_topk"])
def test_gradcheck_and_masked_rows(signal):
    student, teacher = random_case(5)
    options = common(student, teacher)
    if "hybrid" in signal:
        options["matched_ids"] = (torch.tensor([1, 7, 4]), torch.tensor([0, 2, 5]))
    if "topk" in signal:
        targets = topk_of(teacher, 3)
    else:
        targets = dense_of(teacher)
        options["target_labels"] = teacher.labels
    leaf = student.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: gold(s, targets, **options), leaf)
    expected = value_and_gradient(gold, student.logits, targets, **options)
    for junk in (torch.nan, torch.inf):
        dirty = student.logits.masked_fill(~student.mask[..., None], junk)
        got = value_and_gradient(gold, dirty, targets, **options)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    halves = gold(student.logits.bfloat16(), targets, **options)
    assert torch.allclose(
        halves.double(), gold(student.logits.bfloat16().double(), targets, **options), atol=1e-6
    )


def test_batch_of_samples_and_reductions():
    cases = [random_case(6), random_case(7)]
    dense = DenseTargets.from_logits(torch.cat([t.logits for _, t in cases]))
    targets = dataclasses.replace(dense, byte_end=torch.cat([t.byte_end for _, t in cases]))
    each = torch.stack(
        [gold(s.logits, dense_of(t), target_labels=t.labels, **common(s, t)) for s, t in cases]
    )
    options = {key: torch.cat([common(s, t)[key] for s, t in cases]) for key in common(*cases[0])}
    options["target_labels"] = torch.cat([t.labels for _, t in cases])
    logits = torch.cat([s.logits for s, _ in cases])
    assert torch.allclose(gold(logits, targets, reduction="none", **options), each)
    assert torch.allclose(gold(logits, targets, **options), each.mean())
    total, count = gold(logits, targets, reduction="sum", with_count=True, **options)
    assert torch.allclose(total, each.sum())
    assert count == 2


def test_groups_that_cover_other_bytes_can_be_left_out():
    # The student counts bytes 1 to 10, the teacher 2 to 8.
    student, teacher = random_case(9, (3, 5, 6, 8, 10), (3, 6, 7, 8))
    student.byte_end[0, student.start - 1] = 1
    teacher.byte_end[0, teacher.start - 1] = 2
    options = common(student, teacher) | {"target_labels": teacher.labels, "reduction": "none"}

    def expected(groups):
        q = written_groups(student, [g[0] for g in groups], "bayesian")
        p = written_groups(teacher, [g[1] for g in groups], "bayesian")
        return sorted_l1(q, p).mean()

    every = [((0,), (0,)), ((1, 2), (1,)), ((3,), (2, 3))]
    got = gold(student.logits, dense_of(teacher), **options)
    assert torch.allclose(got, expected(every))
    got = gold(student.logits, dense_of(teacher), same_bytes=True, **options)
    assert torch.allclose(got, expected(every[1:]))
    # A hole inside a group: its bytes are no longer all there.
    holed = student.mask.clone()
    holed[0, student.start - 1 + 1] = False
    options["mask"] = holed
    got = gold(student.logits, dense_of(teacher), same_bytes=True, **options)
    assert torch.allclose(got, expected(every[2:]))
    inside, other = random_case(11, (2, 3, 5), (5,))
    inside.mask[0, inside.start] = False
    options = common(inside, other) | {"target_labels": other.labels, "with_count": True}
    assert gold(inside.logits, dense_of(other), **options).count == 1
    assert gold(inside.logits, dense_of(other), same_bytes=True, **options).count == 0
    # A side that was cut off in the middle of the other's token.
    cut, whole = random_case(10, (3, 5), (3, 9))
    options = common(cut, whole) | {"target_labels": whole.labels, "with_count": True}
    loss, count = gold(cut.logits, dense_of(whole), same_bytes=True, **options)
    q = written_groups(cut, [(0,)], "bayesian")
    p = written_groups(whole, [(0,)], "bayesian")
    assert torch.allclose(loss, sorted_l1(q, p).mean())
    assert count == 1


def test_refusals():
    student, teacher = random_case(8)
    options = common(student, teacher)
    stored = topk_of(teacher, 3)
    with pytest.raises(TargetsError, match="--aux byte_end"):
        gold(student.logits, dataclasses.replace(stored, byte_end=None), **options)
    with pytest.raises(TargetsError, match="--aux label_logprob"):
        gold(student.logits, dataclasses.replace(stored, label_logprob=None), **options)
    with pytest.raises(TargetsError, match="byte_ends"):
        gold(student.logits, stored, **(options | {"byte_end": None}))
    with pytest.raises(TargetsError, match="target_labels"):
        gold(student.logits, dense_of(teacher), **options)
    with pytest.raises(TargetsError, match="bayesian"):
        gold(student.logits, stored, strategy="observed", **options)
    with pytest.raises(UsageError, match="strategy"):
        gold(student.logits, stored, strategy="viterbi", **options)
    with pytest.raises(TargetsError) as caught:
        gold(student.logits, stored, **(options | {"labels": None}))
    assert caught.value.kind == "label-missing"
    ids = (torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(UsageError, match="beta"):
        gold(student.logits, stored, matched_ids=ids, beta=0.0, **options)
    with pytest.raises(TargetsError) as caught:
        gold(student.logits, stored, matched_ids=ids, missing="zero", **options)
    assert caught.value.kind == "missing-not-allowed"
    unlabelled = options | {"labels": torch.full_like(student.labels, -100)}
    with pytest.raises(TargetsError) as caught:
        gold(student.logits, stored, **unlabelled)
    assert caught.value.kind == "label-missing"
