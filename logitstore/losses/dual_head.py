"""Dual-head distillation: an auxiliary head regresses the teacher's raw logits, the main head
learns labels.

Letters: N rows that count, V classes, K stored ids, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from logitstore.losses.contract import LossAndCount, Reduction, align, loss, require
from logitstore.losses.positions import Positions, counted_positions
from logitstore.losses.sparse_logprobs import chunk_rows, refuse_second_derivative
from logitstore.spec.errors import UsageError
from logitstore.targets import PAD_ID, DenseTargets, Targets, TopKTargets
from logitstore.targets.dense import at_least_float32

__all__ = ["AuxiliaryHead", "dual_head", "gradient_alignment"]


@loss(
    signals={"dense": "exact", "topk": "approximate", "threshold": "approximate"},
    missing={"topk": ("none", "one_sided"), "threshold": ("none",)},
    needs={"topk": ("lse",), "threshold": ("lse",)},
    source="arXiv:2411.08937 (KDD 2025), BinaryKL-Norm; log-cosh form derived for this project",
    aliases=("dhkd", "binary_kl_norm"),
)
def dual_head(
    student_logits: Tensor,
    targets: Targets,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    form: Literal["norm", "plain"] = "norm",
    temperature: float = 2.0,
    missing: Literal["none", "one_sided"] = "none",
    reduction: Reduction = "mean",
    with_count: bool = False,
) -> Tensor | LossAndCount:
    """Mean over rows of T^2 sum_c D(z_c, t_c): a second head matches raw teacher logits.

    z are the *auxiliary* head's logits, t the teacher's, c runs over classes:

        norm   D = log cosh((z - t) / (2 T))          gradient T/2 tanh((z - t) / (2 T))
        plain  D = KL(Bernoulli(sigmoid(t/T)) || Bernoulli(sigmoid(z/T)))

    "norm" is a log-cosh regression: (z - t)^2 / 8 for small differences, slope T/2 for large ones.
    Not shift-invariant, and a sum over classes, so its weight scales as 1 / V (released code: 1 for
    100 classes, 0.1 for 1000). Train `cross_entropy(main, labels) + weight * dual_head(aux,
    targets)` with aux from `AuxiliaryHead` and, as the released code does on CIFAR-100,
    `gradient_alignment`.

    From stored ids, always-ids included, the loss is exact on them (raw logit = log-prob + lse).
    For the others, `missing`:

    - "none": nothing. No bound in the residual mass exists: each omitted class may carry a gradient
      of up to T/2 whatever its probability.
    - "one_sided" (topk): where z exceeds the smallest stored teacher logit, it is pulled down to
      it. none <= one_sided <= dense, in value and, class by class, in the size of the gradient.

    A teacher logit of -inf (an id that cannot occur) is not matched, nor are ids that only the
    student has.

    Args:
        student_logits: float [..., V], the auxiliary head's.
        targets: dense; topk or threshold (its exact head) with `lse`.
        labels: only used to ignore positions (label -100) when there is no mask.
        mask: bool [...], True counts.
        form: "norm" or "plain".
        temperature: T > 0, tau of the paper.
        missing: see above.

    Raises: TargetsError aux-missing, missing-not-allowed, shape-mismatch, empty-mask; UsageError
        bad-argument.

    Published code and our choice: it clamps at 1e-8, so that in float32 a difference above 17 T
    gives infinity and NaN and one below -18.4 T no gradient; the closed forms here need no clamp
    and agree to 1e-15 elsewhere. Its ImageNet script steps the optimiser twice per batch.

    Source: arXiv:2411.08937; code penghui-yang/DHKD.
    """
    if form not in ("norm", "plain") or not temperature > 0:
        raise UsageError(
            "bad-argument",
            "dual_head has no such form or temperature",
            got=f"form={form!r}, temperature={temperature}",
            expected="form 'norm' or 'plain', temperature > 0",
        )
    dense = isinstance(targets, DenseTargets)
    at = counted_positions(align(student_logits, targets, labels, mask, upcast=dense))
    if dense:
        assert isinstance(at.targets, DenseTargets)
        teacher_NV = at.targets.logits.to(at.dtype)
        student_NV = at.student_NV[:, : teacher_NV.shape[-1]]
        # Equal logits give 0 in value and gradient. The student may rule out the same ids.
        possible_NV = teacher_NV > -math.inf
        teacher_NV = teacher_NV.masked_fill(~possible_NV, 0.0)
        student_NV = student_NV.masked_fill(~possible_NV, 0.0)
        loss_N = _class_sums(student_NV, teacher_NV, temperature, form)
    else:
        loss_N = _stored(at, temperature, form, one_sided=missing == "one_sided")
    return at.reduce(loss_N, reduction, with_count)


def _stored(at: Positions, temperature: float, form: str, *, one_sided: bool) -> Tensor:
    assert isinstance(at.targets, TopKTargets)
    ids_NK = at.targets.ids
    valid_NK = ids_NK != PAD_ID
    lse_N1 = require(at.targets, "lse", "dual_head").to(at.dtype)[:, None]
    student_NK = at.student_NV.gather(-1, ids_NK.clamp_min(0)).to(at.dtype)
    raw_NK = at.targets.logprobs.to(at.dtype) + lse_N1
    possible_NK = valid_NK & (raw_NK > -math.inf)
    loss_N = _class_sums(
        student_NK.masked_fill(~possible_NK, 0.0),
        raw_NK.masked_fill(~possible_NK, 0.0),
        temperature,
        form,
    )
    if one_sided:
        # Always-ids follow the list and say nothing about the ids that it lacks.
        assert isinstance(at.rows.targets, TopKTargets)
        slot_K = torch.arange(ids_NK.shape[-1], device=ids_NK.device)
        listed_NK = valid_NK & (slot_K < at.rows.targets.k)
        last_N1 = torch.where(listed_NK, raw_NK, math.inf).amin(-1, keepdim=True)
        shared_NV = at.student_NV[:, : at.targets.vocab_size]
        # A stored id above the last one is matched already; padding repeats the row's first id.
        stored_NK = torch.where(valid_NK, ids_NK, ids_NK[:, :1])
        # Where the last one cannot occur, nothing outside can.
        above_NV = (shared_NV.detach() > last_N1) & (last_N1 > -math.inf)
        above_NV = above_NV.scatter(-1, stored_NK, False)
        row_E, id_E = above_NV.nonzero(as_tuple=True)
        excess_E1 = shared_NV[row_E, id_E].to(at.dtype)[:, None]
        loss_E = _class_sums(excess_E1, last_N1[row_E], temperature, form)
        loss_N = loss_N.index_add(0, row_E, loss_E)
    return loss_N


def _class_sums(student_NC: Tensor, teacher_NC: Tensor, temperature: float, form: str) -> Tensor:
    """T^2 sum_c D(student, teacher) of each row, [N]."""
    value: Tensor = _ClassSums.apply(student_NC, teacher_NC, temperature, form)
    return value


class _ClassSums(torch.autograd.Function):
    # Row chunks that fit the cache, and the closed gradient formed on the way: five times faster at
    # V = 128k as operators over whole [N, V] tensors that each keep a result for the backward pass.
    @staticmethod
    def forward(
        ctx: Any, student_NC: Tensor, teacher_NC: Tensor, temperature: float, form: str
    ) -> Tensor:
        num_rows, width = student_NC.shape
        sum_N = student_NC.new_empty(num_rows)
        grad_NC = torch.empty_like(student_NC)
        # A compiler fuses the operators by itself.
        compiling = torch.compiler.is_compiling()
        rows = num_rows if compiling else chunk_rows(num_rows, width, student_NC.device)
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            divergence = _log_cosh if form == "norm" else _bernoulli_kl
            value, slope = divergence(
                student_NC[part] / temperature, teacher_NC[part] / temperature
            )
            sum_N[part] = temperature**2 * value.sum(-1)
            grad_NC[part] = temperature * slope
        ctx.save_for_backward(grad_NC)
        return sum_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        (grad_NC,) = ctx.saved_tensors
        return grad_NC * grad_N[:, None], None, None, None


def _log_cosh(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """log cosh(u / 2) of the difference u, and its slope."""
    half = (student - teacher) / 2
    size = half.abs()
    # = |x| + log((1 + e^-2|x|) / 2), without overflow and exactly 0 at 0.
    return size + torch.log1p(torch.expm1(-2 * size) / 2), torch.tanh(half) / 2


def _bernoulli_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL between Bernoulli distributions with these logits, and its slope in the student's."""
    yes = torch.sigmoid(teacher)
    value = yes * (logsigmoid(teacher) - logsigmoid(student))
    value = value + torch.sigmoid(-teacher) * (logsigmoid(-teacher) - logsigmoid(-student))
    return value, torch.sigmoid(student) - yes


class AuxiliaryHead(nn.Module):
    """The second head, trained by `dual_head` and dropped after training.

    Args:
        in_features: D.
        num_classes: V of the targets.
        kind: "nonlinear" (the paper's CIFAR-100 head: Linear, Dropout, BatchNorm, ReLU, Linear) or
            "linear" (its ImageNet head).
        hidden_features: width of the nonlinear head; the released code has 200.
        dropout: probability in the nonlinear head; the released code has 0.1.

    Source: arXiv:2411.08937; layer sizes from penghui-yang/DHKD.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: Literal["linear", "nonlinear"] = "nonlinear",
        hidden_features: int = 200,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if kind == "linear":
            self.layers: nn.Module = nn.Linear(in_features, num_classes)
        elif kind == "nonlinear":
            self.layers = nn.Sequential(
                nn.Linear(in_features, hidden_features),
                nn.Dropout(dropout),
                nn.BatchNorm1d(hidden_features),
                nn.ReLU(),
                nn.Linear(hidden_features, num_classes),
            )
        else:
            raise UsageError(
                "bad-argument", "unknown head", got=kind, expected="linear or nonlinear"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Logits [..., V] of features [..., D]; batch statistics run over all leading axes."""
        logits_RV: Tensor = self.layers(features.reshape(-1, features.shape[-1]))
        return logits_RV.reshape(*features.shape[:-1], -1)


def gradient_alignment(
    label_loss: Tensor, distill_loss: Tensor, parameters: Iterable[nn.Parameter]
) -> Tensor:
    """Backward passes of two losses that add one aligned gradient to `.grad`.

    With g0 the gradient of `label_loss` and g1 that of `distill_loss` over all parameters together,
    a conflicting g1 (g0 . g1 < 0) loses its component along g0; then g0 + g1 is accumulated.
    One-sided: g0 is never changed. A parameter that a loss does not reach has gradient 0 there; one
    that neither reaches is left alone. With g0 = 0 there is nothing to conflict with: g1 is used
    whole and the cosine is 0.

    Call it instead of `backward()`. It frees both graphs. Hooks of DistributedDataParallel do not
    run: average `.grad` over ranks afterwards. A scaled mixed-precision loss must scale both alike.

    Returns: the cosine of the two gradients, float32 scalar; negative where they conflicted.
    Raises: UsageError bad-argument when `parameters` is empty.

    Source: arXiv:2411.08937, gradient alignment; code penghui-yang/DHKD.
    """
    params = [p for p in parameters if p.requires_grad]
    if not params:
        raise UsageError(
            "bad-argument",
            "gradient_alignment got no parameter that requires a gradient",
            expected="parameters=model.parameters()",
        )
    label_grads = torch.autograd.grad(label_loss, params, retain_graph=True, allow_unused=True)
    distill_grads = torch.autograd.grad(distill_loss, params, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64, device=params[0].device)
    dot, label_square, distill_square = zero, zero, zero
    for g0, g1 in zip(label_grads, distill_grads, strict=True):
        # Sums over millions of parameters: float64 scalars of per-tensor sums.
        if g0 is not None:
            label_square = label_square + at_least_float32(g0).square().sum().double()
        if g1 is not None:
            distill_square = distill_square + at_least_float32(g1).square().sum().double()
        if g0 is not None and g1 is not None:
            dot = dot + (at_least_float32(g0) * at_least_float32(g1)).sum().double()
    conflict = (dot < 0) & (label_square > 0)
    projection = torch.where(conflict, dot / label_square, 0.0)
    for p, g0, g1 in zip(params, label_grads, distill_grads, strict=True):
        if g0 is None and g1 is None:
            continue
        merged = torch.zeros_like(p) if g1 is None else g1
        if g0 is not None:
            merged = merged + (1 - projection).to(g0.dtype) * g0
        p.grad = merged.detach() if p.grad is None else p.grad + merged
    norms = (label_square * distill_square).sqrt()
    return torch.where(norms > 0, dot / norms, 0.0).float()
