"""Which columns a store has: a function of signal, aux fields and kind of sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from logitstore.record.views import VIEW_COLUMNS
from logitstore.spec.errors import UsageError
from logitstore.spec.header import AUX_FIELDS, Images
from logitstore.spec.schema import Column, Group, Schema
from logitstore.spec.signals import (
    HEAD_STEP,
    Q8_STEP,
    DenseSpec,
    GraphSpec,
    SampledSpec,
    ScoresSpec,
    ThresholdSpec,
    TopKSpec,
)

__all__ = ["aux_fields", "build_schema", "id_dtype"]

# dtype of each optional per-position field
_AUX_DTYPE: dict[str, Any] = {
    "label_logprob": "float16",
    "label_rank": "uint16",
    "entropy": "float16",
    "top1_logprob": "float16",
    "log_tail": "float16",
    "lse": "float32",
    "logit_mean": "float32",
    "byte_end": "uint32",
}

_SEQUENCE_ONLY = {"byte_end"}
_LABELLED_ONLY = {"label_logprob", "label_rank"}


def id_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Smallest unsigned type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


# signal kind -> (columns and groups of its own, aux fields it has by default, aux fields it cannot
# have)
_Layout = tuple[list[Column], list[Group], tuple[str, ...], frozenset[str]]


def _topk(spec: TopKSpec, vocab_size: int) -> _Layout:
    step = Q8_STEP if spec.coding == "q8" else None
    axis, inner = ("position", (spec.k,)) if spec.p is None else ("ids", ())
    columns = [
        Column(name="ids", dtype="uint32", axis=axis, inner=inner),
        Column(name="logprobs", dtype="float16", axis=axis, inner=inner, step=step),
    ]
    groups: list[Group] = []
    if spec.p is not None:
        columns.insert(0, Column(name="num_ids", dtype="uint16", axis="position"))
        groups.append(Group(name="ids", owner="position"))
    defaults = ("label_logprob", "label_rank", "entropy", "log_tail", "lse")
    if step is not None:
        # Most of what rounding to 1/16 nat costs is the largest probability, off by up to 3 %: 1.6
        # bytes a token keep it exact.
        return columns, groups, (*defaults, "top1_logprob"), frozenset()
    # the first stored log-prob is the top-1
    return columns, groups, defaults, frozenset({"top1_logprob"})


def _dense(spec: DenseSpec, vocab_size: int) -> _Layout:
    columns = [Column(name="logits", dtype=spec.dtype, axis="position", inner=(vocab_size,))]
    # everything else follows from the logits
    return columns, [], (), frozenset({"log_tail"})


def _sampled(spec: SampledSpec, vocab_size: int) -> _Layout:
    columns = [
        Column(name="num_ids", dtype="uint16", axis="position"),
        Column(name="ids", dtype="uint32", axis="ids"),
        Column(name="counts", dtype="uint16", axis="ids"),
    ]
    if spec.power != 1.0:
        columns.append(Column(name="weights", dtype="float16", axis="ids"))
    group = Group(name="ids", owner="position", id_column="ids", pairs="pairs")
    defaults = ("label_logprob", "label_rank", "entropy")
    # the mass outside a random sample says nothing about the teacher
    return columns, [group], defaults, frozenset({"log_tail"})


def _threshold(spec: ThresholdSpec, vocab_size: int) -> _Layout:
    count: Literal["uint8", "uint16"] = "uint8" if spec.budget <= 255 else "uint16"
    columns = [
        Column(name="tail_logprob", dtype="float32", axis="position", step=HEAD_STEP),
        Column(name="num_heads", dtype=count, axis="position"),
        Column(name="head_ids", dtype="uint32", axis="heads"),
        Column(name="head_logprobs", dtype="float32", axis="heads", step=HEAD_STEP),
        Column(name="num_tails", dtype=count, axis="position"),
        Column(name="tail_ids", dtype="uint32", axis="tails"),
    ]
    groups = [
        Group(name="heads", owner="position", id_column="head_ids", pairs="head_pairs"),
        Group(name="tails", owner="position", id_column="tail_ids", pairs="tail_pairs"),
    ]
    defaults = ("label_logprob", "label_rank", "entropy")
    # tail_logprob says it already
    return columns, groups, defaults, frozenset({"log_tail"})


def _graph(spec: GraphSpec, vocab_size: int) -> _Layout:
    columns = [
        Column(name="num_segments", dtype="uint16", axis="sample"),
        Column(name="graph_positions", dtype="uint32", axis="segments"),
    ]
    groups = [Group(name="segments", owner="sample")]
    if spec.form == "rank":
        triangle = spec.k * (spec.k + 1) // 2
        columns += [
            Column(name="row_sums", dtype="float32", axis="segments", inner=(spec.k,)),
            Column(name="coactivation", dtype="float32", axis="segments", inner=(triangle,)),
        ]
    else:
        columns += [
            Column(name="num_nodes", dtype="uint32", axis="sample"),
            Column(name="node_ids", dtype="uint32", axis="nodes"),
            Column(name="node_segments", dtype="uint16", axis="nodes"),
            Column(name="node_sums", dtype="float32", axis="nodes"),
            Column(name="num_edges", dtype="uint32", axis="sample"),
            Column(name="edge_ids", dtype="uint32", axis="edges", inner=(2,)),
            Column(name="edge_segments", dtype="uint16", axis="edges"),
            Column(name="edge_weights", dtype="float32", axis="edges"),
        ]
        groups += [Group(name="nodes", owner="sample"), Group(name="edges", owner="sample")]
    return columns, groups, ("label_logprob", "entropy"), frozenset({"log_tail"})


def _scores(spec: ScoresSpec, vocab_size: int) -> _Layout:
    columns = [
        Column(name="ids", dtype="uint32", axis="position", inner=(spec.candidates,)),
        Column(name="scores", dtype="float32", axis="position", inner=(spec.candidates,)),
    ]
    # the teacher scored these candidates and nothing else
    return columns, [], (), frozenset(AUX_FIELDS)


_LAYOUTS: dict[str, Callable[[Any, int], _Layout]] = {
    "dense": _dense,
    "graph": _graph,
    "scores": _scores,
    "sampled": _sampled,
    "threshold": _threshold,
    "topk": _topk,
}


def layout_of(signal: Any, vocab_size: int) -> _Layout:
    """The columns a signal brings.

    Raises: UsageError unknown-signal when this version cannot store the signal,
        k-exceeds-vocabulary.
    """
    build = _LAYOUTS.get(signal.kind)
    if build is None:
        raise UsageError(
            "unknown-signal",
            "this version cannot store this signal",
            got=str(signal),
            expected=", ".join(sorted(_LAYOUTS)),
        )
    k = getattr(signal, "k", None)
    if k is not None and k > vocab_size:
        raise UsageError(
            "k-exceeds-vocabulary",
            "more ids asked for than the vocabulary has",
            where=f"signal {signal}",
            got=k,
            expected=f"at most {vocab_size}",
        )
    return build(signal, vocab_size)


def aux_fields(
    signal: Any,
    vocab_size: int,
    requested: Iterable[str] | None,
    *,
    sample_kind: str,
    labelled: bool = True,
) -> tuple[str, ...]:
    """The aux fields a store will have, in stored order.

    Args:
        requested: names, or None for the signal's defaults. `label_logprob` is always there for
            sequences: load-time probes need it.
        labelled: whether classification samples have labels.

    Raises: UsageError unknown-aux.
    """
    _, _, defaults, impossible = layout_of(signal, vocab_size)
    if sample_kind != "sequence":
        impossible |= _SEQUENCE_ONLY
    if not labelled:
        impossible |= _LABELLED_ONLY
    names = set(defaults) - impossible if requested is None else set(requested)
    unknown = names - set(AUX_FIELDS)
    refused = names & impossible
    if unknown or refused:
        bad = ", ".join(sorted(unknown | refused))
        allowed = [f for f in AUX_FIELDS if f not in impossible]
        raise UsageError(
            "unknown-aux",
            "no such aux field for this signal",
            where=f"signal {signal}",
            got=bad,
            expected=", ".join(allowed),
            hint="the top-1 log-prob of a topk record is its first entry"
            if "top1_logprob" in refused
            else None,
        )
    if sample_kind == "sequence" or (signal.kind == "threshold" and labelled):
        # Probes need it for sequences; a threshold record does not store the label's probability
        # twice.
        names.add("label_logprob")
    return tuple(f for f in AUX_FIELDS if f in names)


def build_schema(
    signal: Any,
    *,
    vocab_size: int,
    sample_kind: Literal["sequence", "classification"],
    aux: Iterable[str],
    lse_at: Iterable[float] = (),
    labelled: bool = True,
    loss_mask: bool = False,
    num_always: int = 0,
    images: Images | None = None,
) -> Schema:
    """All columns in stored order.

    Args:
        aux: as `aux_fields` returned them.
        lse_at: temperatures; column `lse_at_<i>` per temperature.
        labelled: classification samples have labels.
        loss_mask: store a mask; without it the mask follows from the segments (last row of each is
            0).
        num_always: number of control tokens stored at every position.
        images: what is kept of images; None: nothing.
    """
    columns = [
        Column(name="sample_lengths", dtype="uint32", axis="sample"),
        Column(name="num_sample_key", dtype="uint16", axis="sample"),
        Column(name="sample_key", dtype="uint8", axis="sample_key"),
    ]
    groups = [Group(name="sample_key", owner="sample", text=True)]
    ids = id_dtype(vocab_size)
    if sample_kind == "sequence":
        columns.append(Column(name="tokens", dtype=ids, axis="position"))
        columns.append(Column(name="segment_ids", dtype="uint16", axis="position"))
    elif labelled:
        columns.append(Column(name="label", dtype=ids, axis="position"))
    if images is not None and images.augmentation is not None:
        columns += [
            Column(name=name, dtype=dtype, axis="sample") for name, dtype in VIEW_COLUMNS.items()
        ]
    if images is not None and images.thumbnail_shape is not None:
        columns.append(Column(name="num_thumbnail", dtype="uint8", axis="sample"))
        columns.append(
            Column(name="thumbnail", dtype="uint8", axis="thumbnail", inner=images.thumbnail_shape)
        )
        groups.append(Group(name="thumbnail", owner="sample"))
    if loss_mask:
        columns.append(Column(name="loss_mask", dtype="bool", axis="position"))
    for name in aux:
        columns.append(Column(name=name, dtype=_AUX_DTYPE[name], axis="position"))
    for number, _ in enumerate(lse_at):
        columns.append(Column(name=f"lse_at_{number}", dtype="float32", axis="position"))
    if num_always:
        columns.append(
            Column(name="always_logprobs", dtype="float16", axis="position", inner=(num_always,))
        )
    own_columns, own_groups, _, _ = layout_of(signal, vocab_size)
    return Schema(columns=(*columns, *own_columns), groups=(*groups, *own_groups))
