"""What a dataset refuses when it opens a store: another tokenizer, rows beside the wrong tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.record import Record
from logitstore.record.sequences import IGNORE, has_label, labels
from logitstore.spec.errors import AlignmentError
from logitstore.spec.header import Header
from logitstore.spec.tokenizer_pieces import table_of
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore.store import Store

__all__ = ["check_alignment", "check_tokenizer"]

# A shifted store fails at most positions, a sound one at none.
_TOLERATED_SHARE = 0.01
# A language model's rows one position off are some 3 nats worse. Rows of a teacher that cannot
# predict the text at all are equally bad anywhere; noise must not refuse those.
_SLIP_NATS = 0.5
_SLIP_DEVIATIONS = 5.0
_LEAST_ROWS = 32


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

    In two ways. The realised next token's log-prob is stored as `label_logprob` and, when the
    signal keeps that token, inside the signal: columns that slipped against each other disagree.
    And a row must not expect the next token of the row before or after it clearly better than its
    own: this finds logits that were one position off when they were stored, for any text that the
    teacher can predict.

    Raises: AlignmentError store-misaligned.
    """
    header = store.header
    look_up = _LOOK_UPS.get(header.signal.kind)
    if header.alignment != "next-token" or look_up is None:
        return
    names = {c.name for c in header.schema_.columns}
    columns = names & {"tokens", "segment_ids", "label_logprob", "ids", "logprobs"}
    for shard, chunk in _probed(store):
        record = store.read_chunk(shard, chunk, columns)
        got = _contradiction(record, header, look_up) or _slip(record, header, look_up)
        if got is not None:
            raise AlignmentError(
                "store-misaligned",
                "stored distributions do not belong to the tokens they stand beside",
                where=f"{store.location} shard {store.shards[shard].shard} chunk {chunk}",
                got=got,
                expected="row t is the distribution over token t + 1 of the same segment",
                hint="capture again; a loop of one's own must pass logits unshifted",
            )


class _Kept(NamedTuple):
    """What a signal holds of one token id per position.

    Attributes:
        logprob: float64 [P], nats; NaN where the id is not kept.
        least: float64 [P], the least kept log-prob, which no id that is not kept can exceed.
        rest: float64 [P], log-prob of an id that is not kept if all of them were equal.
    """

    logprob: NDArray[np.float64]
    least: NDArray[np.float64]
    rest: NDArray[np.float64]


def _contradiction(record: Record, header: Header, look_up: _LookUp) -> str | None:
    """Where `label_logprob` and the signal disagree about the realised token."""
    column = header.schema_.column("logprobs")
    step = column.step if column is not None and column.step is not None else 0.0
    has_label_P = has_label(record)
    label_logprob_P = record["label_logprob"].astype(np.float64)
    kept = look_up(record, labels(record), header.vocab_size)
    # Both copies were rounded to float16 from one float32.
    tolerance_P = 2.0**-9 * np.abs(label_logprob_P) + 1e-3 + step
    wrong_P = np.where(
        np.isnan(kept.logprob),
        label_logprob_P > kept.least + tolerance_P,
        np.abs(kept.logprob - label_logprob_P) > tolerance_P,
    )
    wrong = int(np.where(has_label_P, wrong_P, label_logprob_P != 0).sum())
    if wrong <= _TOLERATED_SHARE * record.num_positions:
        return None
    return f"{wrong} of {record.num_positions} positions contradict their label_logprob"


def _slip(record: Record, header: Header, look_up: _LookUp) -> str | None:
    """Whether the rows one before or one after expect a token clearly better than its own row."""
    labels_P = labels(record)
    for shift, name in ((1, "after"), (-1, "before")):
        # Row r beside the label of row r - shift; both in one segment, so that each has a label.
        others_P = np.roll(labels_P, shift)
        both_P = (labels_P != IGNORE) & (others_P != IGNORE)
        both_P &= record["segment_ids"] == np.roll(record["segment_ids"], shift)
        both_P[0 if shift > 0 else -1] = False
        if both_P.sum() < _LEAST_ROWS:
            continue
        own_P = _completed(look_up(record, labels_P, header.vocab_size))
        other_P = _completed(look_up(record, others_P, header.vocab_size))
        better = (other_P - own_P)[both_P]
        noise = better.std() / len(better) ** 0.5
        if better.mean() > max(_SLIP_NATS, _SLIP_DEVIATIONS * noise):
            return (
                f"tokens are expected better by the row {name} their own: mean log-prob "
                f"{other_P[both_P].mean():.2f} against {own_P[both_P].mean():.2f} nats"
            )
    return None


def _completed(kept: _Kept) -> NDArray[np.float64]:
    """float64 [P]: log-prob of the ids asked for, kept or not."""
    return np.where(np.isnan(kept.logprob), kept.rest, kept.logprob)


def _probed(store: Store) -> list[tuple[int, int]]:
    """(shard, chunk) of the first, a middle and the last chunk."""
    shards = [i for i, shard in enumerate(store.shards) if shard.samples]
    if not shards:
        return []
    found = set()
    for shard, share in ((shards[0], 0.0), (shards[len(shards) // 2], 0.5), (shards[-1], 1.0)):
        found.add((shard, round(share * (len(store.commit(shard).chunks) - 1))))
    return sorted(found)


def _look_up_topk(record: Record, ids_P: NDArray[np.int64], vocab_size: int) -> _Kept:
    ids_E, logprobs_E = record["ids"].reshape(-1), record["logprobs"].astype(np.float64).reshape(-1)
    counts_P = record.get("num_ids")
    if counts_P is None:
        counts_P = np.full(record.num_positions, record["ids"].shape[1])
    position_E = np.repeat(np.arange(record.num_positions), counts_P)
    least_P = np.full(record.num_positions, np.inf)
    np.minimum.at(least_P, position_E, logprobs_E)
    hit_E = ids_E == ids_P[position_E]
    logprob_P = np.full(record.num_positions, np.nan)
    logprob_P[position_E[hit_E]] = logprobs_E[hit_E]
    outside_P = 1 - np.bincount(position_E, np.exp(logprobs_E), record.num_positions)
    # Rounded log-probs may add up to 1 and more; the floor is what float16 could still tell from 1.
    rest_P = np.log(np.maximum(outside_P, 2.0**-10) / np.maximum(vocab_size - counts_P, 1))
    return _Kept(logprob_P, least_P, np.minimum(rest_P, least_P))


_LookUp = Callable[[Record, NDArray[np.int64], int], _Kept]
# signal kind -> (record, int64 [P] one id per position, V) -> what the signal holds of them
_LOOK_UPS: dict[str, _LookUp] = {"topk": _look_up_topk}
