"""What a dataset refuses when it opens a store: another tokenizer, rows beside the wrong tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.record import Record
from logitstore.record.sequences import IGNORE, has_label, labels
from logitstore.record.threshold import decode_threshold
from logitstore.record.views import VIEW_COLUMNS, check_views
from logitstore.spec.errors import AlignmentError
from logitstore.spec.header import Header
from logitstore.spec.signals import Q8_MOST_STEPS, SampledSpec, ThresholdSpec
from logitstore.spec.tokenizer_pieces import table_of
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["check_alignment", "check_stored_views", "check_tokenizer"]

# A shifted store fails at most positions, a sound one at none.
_TOLERATED_SHARE = 0.01
# A language model's rows one position off are one or two nats worse, with 1/64 as the floor. Rows
# of a teacher that cannot predict the text at all are equally bad anywhere; noise must not refuse
# those.
_FLOOR_NATS = float(np.log(1 / 64))
_SLIP_NATS = 0.5
_SLIP_DEVIATIONS = 5.0
_LEAST_ROWS = 32
_HIT_DEVIATIONS = 6.0
_LEAST_MISSING = 2.0**-10

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def check_tokenizer(store: Store, tokenizer: Any) -> None:
    """Refuse a student whose token ids do not mean what the teacher's did.

    A student that keeps every id of the teacher and adds further ones is accepted.

    Args:
        tokenizer: a transformers fast tokenizer, a `tokenizers.Tokenizer` or a `TokenizerTable`.

    Raises: AlignmentError tokenizer-mismatch.
    """
    if isinstance(tokenizer, TokenizerTable):
        student = tokenizer
    else:
        student = table_of(getattr(tokenizer, "backend_tokenizer", tokenizer))
    info = store.header.tokenizer
    if info is not None and info.fingerprint == student.fingerprint:
        return
    difference = "the store does not name its tokenizer"
    if info is not None:
        difference = "the store holds no table to compare with"
        if info.table is not None:
            where = f"{store.location}/tables/{info.table}"
            teacher = TokenizerTable.decode(store.table(info.table), where=where)
            if teacher.is_prefix_of(student):
                return
            difference = _first_difference(teacher, student)
    raise AlignmentError(
        "tokenizer-mismatch",
        f"the student's tokenizer is not the teacher's ({difference})",
        where=store.location,
        got=f"fingerprint {student.fingerprint} of {len(student)} ids",
        expected="no fingerprint"
        if info is None
        else f"fingerprint {info.fingerprint} of {info.size} ids ({info.name})",
        hint="use a store made for this student, or a loss for different tokenizers",
    )


def _first_difference(teacher: TokenizerTable, student: TokenizerTable) -> str:
    if len(student) < len(teacher):
        return f"it lacks ids from {len(student)} on"
    for number, (a, b) in enumerate(zip(teacher.tokens, student.tokens, strict=False)):
        if a != b:
            return f"id {number} is {b!r}, was {a!r}"
    return "other ids are control tokens"


def check_alignment(store: Store) -> None:
    """Look at a few chunks and refuse a store whose rows do not belong to its tokens.

    In two ways. `label_logprob` and the signal must agree about the realised next token: columns
    that slipped against each other do not. And a row must not expect the next token of the row
    before or after it clearly better than that row does: this finds logits that were one position
    off when they were stored, for any text that the teacher can predict.

    Raises: AlignmentError store-misaligned.
    """
    header = store.header
    evidence = _EVIDENCE.get(header.signal.kind)
    if header.alignment != "next-token" or evidence is None:
        return
    contradiction, look_up = evidence
    for shard, chunk in _probed(store):
        record = store.read_chunk(shard, chunk)
        got = contradiction(record, header) or _slip(record, header, look_up)
        if got is not None:
            raise AlignmentError(
                "store-misaligned",
                "stored distributions do not belong to the tokens they stand beside",
                where=f"{store.location} shard {store.shards[shard].shard} chunk {chunk}",
                got=got,
                expected="row t is the distribution over token t + 1 of the same segment",
                hint="capture again; a loop of one's own must pass logits unshifted",
            )


def check_stored_views(store: Store) -> None:
    """Draw the views of a few chunks again, and refuse a store that holds others.

    Raises: AlignmentError store-misaligned.
    """
    if store.header.images is None or store.header.images.augmentation is None:
        return
    for shard, chunk in _probed(store):
        where = f"{store.location} shard {store.shards[shard].shard} chunk {chunk}"
        record = store.read_chunk(shard, chunk, {"sample_key", *VIEW_COLUMNS})
        check_views(record, store.header, where=where)


def _slip(record: Record, header: Header, look_up: _LookUp) -> str | None:
    """Whether the rows one before or one after expect a token clearly better than its own row."""
    labels_P = labels(record)
    own_P = record["label_logprob"].astype(np.float64)
    for shift, name in ((1, "after"), (-1, "before")):
        # Row r is asked about the label of row r - shift, of the same segment.
        asked_P = np.roll(labels_P, shift)
        both_P = (labels_P != IGNORE) & (asked_P != IGNORE)
        both_P &= record["segment_ids"] == np.roll(record["segment_ids"], shift)
        both_P[0 if shift > 0 else -1] = False
        if both_P.sum() < _LEAST_ROWS:
            continue
        # Below the floor a sparse record knows little, and what it leaves out must not weigh much.
        other = np.maximum(look_up(record, header, asked_P)[both_P], _FLOOR_NATS)
        own = np.maximum(np.roll(own_P, shift)[both_P], _FLOOR_NATS)
        better = other - own
        noise = better.std() / len(better) ** 0.5
        if better.mean() > max(_SLIP_NATS, _SLIP_DEVIATIONS * noise):
            return (
                f"tokens are expected better by the row {name} their own: mean log-prob "
                f"{other.mean():.2f} against {own.mean():.2f} nats"
            )
    return None


def _probed(store: Store) -> list[tuple[int, int]]:
    """(shard, chunk) of the first, a middle and the last chunk."""
    shards = [i for i, shard in enumerate(store.shards) if shard.samples]
    if not shards:
        return []
    found = set()
    for shard, share in ((shards[0], 0.0), (shards[len(shards) // 2], 0.5), (shards[-1], 1.0)):
        found.add((shard, round(share * (len(store.commit(shard).chunks) - 1))))
    return sorted(found)


def _entries(record: Record, header: Header) -> tuple[Ints, Floats, Ints]:
    """(ids [E], probabilities or weights [E], entries of each position [P]) of a sparse signal."""
    spec = header.signal
    if isinstance(spec, ThresholdSpec):
        found = decode_threshold(record, header.always_ids)
        return found.ids, found.weights, found.num_heads + found.num_tails
    ids_E = record["ids"].astype(np.int64).reshape(-1)
    counts_P = record.get("num_ids")
    if counts_P is None:
        counts_P = np.full(record.num_positions, record["ids"].shape[1])
    if isinstance(spec, SampledSpec):
        return ids_E, record["counts"] / spec.rounds, counts_P.astype(np.int64)
    return (
        ids_E,
        np.exp(record["logprobs"].astype(np.float64)).reshape(-1),
        counts_P.astype(np.int64),
    )


def _look_up_sparse(record: Record, header: Header, ids_P: Ints) -> Floats:
    """float64 [P]: log-prob of one id per position; what is not kept shares the missing mass."""
    ids_E, probs_E, counts_P = _entries(record, header)
    position_E = np.repeat(np.arange(record.num_positions), counts_P)
    missing_P = 1 - np.bincount(position_E, probs_E, record.num_positions)
    # Sampled weights always add up to 1, and rounded ones may exceed it.
    probs_P = np.maximum(missing_P, _LEAST_MISSING) / np.maximum(header.vocab_size - counts_P, 1)
    hit_E = ids_E == ids_P[position_E]
    probs_P[position_E[hit_E]] = probs_E[hit_E]
    return np.log(np.maximum(probs_P, np.finfo(np.float64).tiny))


def _look_up_dense(record: Record, header: Header, ids_P: Ints) -> Floats:
    """float64 [P]: log-prob of one id per position."""
    logits_PV = record["logits"].astype(np.float64)
    peak_P = logits_PV.max(-1)
    lse_P = np.log(np.exp(logits_PV - peak_P[:, None]).sum(-1)) + peak_P
    asked_P = np.clip(ids_P, 0, header.vocab_size - 1)
    return np.take_along_axis(logits_PV, asked_P[:, None], -1)[:, 0] - lse_P


def _contradicted(record: Record, wrong_P: NDArray[np.bool_]) -> str | None:
    """The finding, when more rows are wrong than a sound store has; rows without a label hold 0."""
    wrong_P = np.where(has_label(record), wrong_P, record["label_logprob"] != 0)
    wrong = int(wrong_P.sum())
    if wrong <= _TOLERATED_SHARE * record.num_positions:
        return None
    return f"{wrong} of {record.num_positions} positions contradict their label_logprob"


def _contradiction_topk(record: Record, header: Header) -> str | None:
    """A kept label must have its log-prob, another one at most the least kept one."""
    column = header.schema_.column("logprobs")
    step = column.step if column is not None and column.step is not None else 0.0
    ids_E, probs_E, counts_P = _entries(record, header)
    position_E = np.repeat(np.arange(record.num_positions), counts_P)
    # An impossible label is compared with what the list can say of it.
    floor = -step * Q8_MOST_STEPS if step else float(np.log(np.finfo(np.float64).tiny))
    label_logprob_P = np.maximum(record["label_logprob"].astype(np.float64), floor)
    tolerance_P = _rounding(label_logprob_P) + step
    with np.errstate(divide="ignore"):
        logprobs_E = np.maximum(np.log(probs_E), floor)
    least_P = np.full(record.num_positions, np.inf)
    np.minimum.at(least_P, position_E, logprobs_E)
    wrong_P = label_logprob_P > least_P + tolerance_P
    hit_E = ids_E == labels(record)[position_E]
    hit_P = position_E[hit_E]
    wrong_P[hit_P] = np.abs(logprobs_E[hit_E] - label_logprob_P[hit_P]) > tolerance_P[hit_P]
    return _contradicted(record, wrong_P)


def _contradiction_dense(record: Record, header: Header) -> str | None:
    """The label's log-prob follows from the logits."""
    label_logprob_P = record["label_logprob"].astype(np.float64)
    found_P = _look_up_dense(record, header, labels(record))
    size_P = np.abs(np.where(np.isfinite(record["logits"]), record["logits"], 0)).max(-1)
    tolerance_P = _rounding(label_logprob_P) + 2.0**-9 * size_P
    return _contradicted(record, np.abs(found_P - label_logprob_P) > tolerance_P)


def _contradiction_threshold(record: Record, header: Header) -> str | None:
    """The label is never among the stored ids: `label_logprob` says all about it."""
    label_P = labels(record)
    wrong_P = np.zeros(record.num_positions, bool)
    for group in ("head", "tail"):
        position_E = np.repeat(np.arange(record.num_positions), record[f"num_{group}s"])
        wrong_P[position_E[record[f"{group}_ids"] == label_P[position_E]]] = True
    return _contradicted(record, wrong_P)


def _contradiction_sampled(record: Record, header: Header) -> str | None:
    """Labels must be among the N draws as often as 1 - (1 - p)^N says."""
    spec = header.signal
    assert isinstance(spec, SampledSpec)
    if spec.power != 1.0 or header.always_ids:
        return None  # draws from another distribution than p
    ids_E, _, counts_P = _entries(record, header)
    position_E = np.repeat(np.arange(record.num_positions), counts_P)
    labelled_P = has_label(record)
    label_probs = np.exp(record["label_logprob"].astype(np.float64))[labelled_P].clip(max=1)
    chance = 1 - (1 - label_probs) ** spec.rounds
    hits = int((ids_E == labels(record)[position_E]).sum())
    deviation = (chance * (1 - chance)).sum() ** 0.5
    if abs(hits - chance.sum()) <= _HIT_DEVIATIONS * deviation + 0.01 * len(chance):
        return None
    return (
        f"{hits} of {len(chance)} labels were drawn; their label_logprob says {chance.sum():.0f} "
        f"with deviation {deviation:.1f}"
    )


def _rounding(logprob_P: Floats) -> Floats:
    """How far two float16 copies of one log-prob may differ, nats."""
    return 2.0**-9 * np.abs(logprob_P) + 1e-3


_Contradiction = Callable[[Record, Header], str | None]
_LookUp = Callable[[Record, Header, Ints], Floats]
# signal kind -> (what contradicts label_logprob, log-prob of one id per position)
_EVIDENCE: dict[str, tuple[_Contradiction, _LookUp]] = {
    "topk": (_contradiction_topk, _look_up_sparse),
    "sampled": (_contradiction_sampled, _look_up_sparse),
    "threshold": (_contradiction_threshold, _look_up_sparse),
    "dense": (_contradiction_dense, _look_up_dense),
}
