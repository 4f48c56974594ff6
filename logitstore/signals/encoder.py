"""From a block of logits to record columns, on the device the logits are on.

Rows are worked on a few at a time: the float32 copy of a chunk stays in cache on a CPU, and no
second [P, V] array ever exists. Nothing loops over positions in Python.

Letters: P positions of the block, R rows of a chunk, V vocabulary, K kept ids, E ragged entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitstore.signals.mass import MassCurve, taken
from logitstore.spec.errors import TeacherError, UsageError
from logitstore.spec.header import Header
from logitstore.spec.schema import Schema

__all__ = ["ENCODERS", "Completion", "Encoder", "Rows", "SignalEncoder", "encoder", "register"]


@dataclass
class Rows:
    """A chunk of rows with the quantities that several fields share, computed once.

    Attributes:
        z: float32 [R, V], raw logits. Encoders may overwrite neither z nor exp_z.
        top: float32 [R], largest logit.
        exp_z: float32 [R, V], exp(z - top).
        lse: float32 [R].
        labels: int64 [R], realised next token, -1 where there is none.
        keys, positions: int64 [R], arguments of the random function.
        seed: of the store.
    """

    z: Tensor
    top: Tensor
    exp_z: Tensor
    lse: Tensor
    labels: Tensor
    keys: Tensor
    positions: Tensor
    seed: int


@dataclass(frozen=True)
class Completion:
    """What a signal that sums over positions needs once all of them are encoded.

    Attributes:
        sample_lengths: int [S], positions of each sample.
        segment_ids_P: int [P], segment of each position inside its sample.
        mask_P: bool [P], positions that count.
    """

    sample_lengths: NDArray[Any]
    segment_ids_P: NDArray[Any]
    mask_P: NDArray[np.bool_]

    def segment_of_position(self) -> NDArray[np.int64]:
        """int64 [P]: number of the position's segment among those of all samples, ascending."""
        starts = np.zeros(len(self.segment_ids_P), np.int64)
        starts[1:] = self.segment_ids_P[1:] != self.segment_ids_P[:-1]
        ends = np.cumsum(self.sample_lengths)[:-1]
        starts[ends] = 1
        return np.cumsum(starts)

    def segments_per_sample(self) -> NDArray[np.int64]:
        """int64 [S]."""
        segment = self.segment_of_position()
        last = np.cumsum(self.sample_lengths) - 1
        return np.diff(segment[last], prepend=-1)


class SignalEncoder(Protocol):
    """What a signal adds: its own columns for a chunk of rows.

    A signal that sums over positions also has `intermediate`, column name -> dtype of what
    `columns` gives per position, and `complete(columns, completion)`, which turns that into stored
    columns.
    """

    def __init__(self, spec: Any, header: Header) -> None: ...

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        """Column name -> tensor [R, ...] or, for a group, its entries [E] and `num_<group>` [R].

        May include aux fields that depend on what is kept (`log_tail`); they are dropped when the
        store does not have them.
        """
        ...


# signal kind -> encoder class
ENCODERS: dict[str, type[SignalEncoder]] = {}


def register(kind: str) -> Callable[[type[SignalEncoder]], type[SignalEncoder]]:
    """Class decorator: the encoder of a signal kind."""

    def add(cls: type[SignalEncoder]) -> type[SignalEncoder]:
        ENCODERS[kind] = cls
        return cls

    return add


def encoder(header: Header) -> Encoder:
    """The encoder of a store.

    Raises: UsageError unknown-signal.
    """
    return Encoder(header)


class Encoder:
    """Encodes blocks of logits for one store.

    Attributes:
        schema: columns of the store; `encode` gives those that depend on logits.
    """

    # Bytes of float32 logits worked on at once. CPU: about the size of a core's share of cache.
    _CHUNK_BYTES: ClassVar[dict[str, int]] = {"cpu": 4 << 20}
    _CHUNK_BYTES_ACCELERATOR = 256 << 20
    # A draw takes several numbers of 8 bytes on its way; so many floats weigh the same.
    _FLOATS_PER_DRAW = 8

    def __init__(self, header: Header) -> None:
        cls = ENCODERS.get(header.signal.kind)
        if cls is None:
            raise UsageError(
                "unknown-signal",
                "this version cannot capture this signal",
                got=str(header.signal),
                expected=", ".join(sorted(ENCODERS)),
            )
        self.schema: Schema = header.schema_
        self._header = header
        self._signal = cls(header.signal, header)
        # Draws of a position may outnumber its ids.
        self._draws = getattr(header.signal, "rounds", 0)
        self._wanted = {c.name: np.dtype(c.dtype) for c in self.schema.columns}
        self._wanted.update(getattr(self._signal, "intermediate", {}))
        self._always: Tensor | None = (
            torch.tensor(header.always_ids, dtype=torch.int64) if header.always_ids else None
        )

    @torch.no_grad()
    def encode(
        self,
        logits_PV: Tensor,
        *,
        labels_P: Tensor,
        keys_P: Tensor,
        positions_P: Tensor,
        sample_names: Sequence[str] | None = None,
        curve: MassCurve | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Columns of P positions as numpy arrays in the schema's dtypes.

        Args:
            logits_PV: float [P, V] of any float dtype, raw logits; -inf marks ids that cannot
                occur.
            labels_P: int64 [P], realised next token, -1 where there is none.
            keys_P: int64 [P], key of the position's sample (`record.random.key_of`, as signed).
            positions_P: int64 [P], index of the position inside its sample.
            sample_names: P names used in error messages.
            curve: takes its share of the positions.

        Raises: TeacherError teacher-nonfinite, teacher-shape.
        """
        num_positions, width = logits_PV.shape
        if width != self._header.vocab_size:
            raise TeacherError(
                "teacher-shape",
                "logits do not have the store's vocabulary",
                got=f"{width} columns",
                expected=self._header.vocab_size,
            )
        device = logits_PV.device
        budget = self._CHUNK_BYTES.get(device.type, self._CHUNK_BYTES_ACCELERATOR)
        step = max(1, budget // (4 * max(width, self._draws * self._FLOATS_PER_DRAW)))
        chosen = None if curve is None else taken(keys_P.cpu().numpy(), positions_P.cpu().numpy())
        labels_P, keys_P, positions_P = (t.to(device) for t in (labels_P, keys_P, positions_P))
        parts: list[dict[str, Tensor]] = []
        for start in range(0, num_positions, step):
            stop = min(start + step, num_positions)
            z = logits_PV[start:stop].float()
            top = z.amax(-1)
            # Below -1e4 the exponential is 0 anyway, and 0 * -1e4 is 0 where 0 * -inf would be NaN.
            shifted = (z - top[:, None]).clamp_(min=-1e4)
            exp_z = shifted.exp()
            total = exp_z.sum(-1)
            lse = top + total.log()
            self._check_finite(lse, start, positions_P, sample_names)
            rows = Rows(
                z,
                top,
                exp_z,
                lse,
                labels_P[start:stop],
                keys_P[start:stop],
                positions_P[start:stop],
                self._header.seed,
            )
            columns = self._scalars(rows, shifted, total)
            columns.update(self._signal.columns(rows))
            if curve is not None and chosen is not None:
                curve.add(exp_z, chosen[start:stop])
            parts.append({n: t for n, t in columns.items() if n in self._wanted})
        return {name: self._numpy(name, [p[name] for p in parts]) for name in parts[0]}

    def complete(
        self, columns: dict[str, NDArray[Any]], completion: Completion
    ) -> dict[str, NDArray[Any]]:
        """Columns of whole samples from those of all their positions, for signals that sum."""
        finish = getattr(self._signal, "complete", None)
        return columns if finish is None else finish(columns, completion)

    def _scalars(self, rows: Rows, shifted: Tensor, total: Tensor) -> dict[str, Tensor]:
        """The aux fields that do not depend on what the signal keeps."""
        out: dict[str, Tensor] = {}
        wanted = self._wanted
        has_label = rows.labels >= 0
        label = rows.labels.clamp_min(0)[:, None]
        z_label = rows.z.gather(-1, label)
        if "label_logprob" in wanted:
            out["label_logprob"] = torch.where(has_label, z_label[:, 0] - rows.lse, 0.0)
        if "label_rank" in wanted:
            ahead = (rows.z > z_label).sum(-1)
            # Ties go to the lowest id; almost no row has any, so the second pass is over few rows.
            tied = ((rows.z == z_label).sum(-1) > 1).nonzero()[:, 0]
            if tied.numel():
                ids = torch.arange(rows.z.shape[-1], device=rows.z.device)
                equal_before = (rows.z[tied] == z_label[tied]) & (ids < label[tied])
                ahead[tied] += equal_before.sum(-1)
            out["label_rank"] = torch.where(has_label, ahead, 0).clamp_max(65_535)
        if "entropy" in wanted:
            mean_shifted = torch.einsum("rv,rv->r", rows.exp_z, shifted) / total
            out["entropy"] = (total.log() - mean_shifted).clamp_min(0)
        if "top1_logprob" in wanted:
            out["top1_logprob"] = rows.top - rows.lse
        if "lse" in wanted:
            out["lse"] = rows.lse
        if "logit_mean" in wanted:
            out["logit_mean"] = rows.z.mean(-1)
        for number, temperature in enumerate(self._header.lse_at):
            out[f"lse_at_{number}"] = torch.logsumexp(rows.z / temperature, -1)
        if self._always is not None:
            self._always = self._always.to(rows.z.device)
            out["always_logprobs"] = rows.z[:, self._always] - rows.lse[:, None]
        return out

    def _numpy(self, name: str, parts: list[Tensor]) -> NDArray[Any]:
        dtype = self._wanted[name]
        joined = torch.cat(parts)
        if dtype == np.float16:
            joined = joined.half()
        return joined.cpu().numpy().astype(dtype, copy=False)

    def _check_finite(
        self,
        lse_R: Tensor,
        start: int,
        positions_P: Tensor,
        sample_names: Sequence[str] | None,
    ) -> None:
        bad = (~torch.isfinite(lse_R)).nonzero()
        if not bad.numel():
            return
        row = start + int(bad[0, 0])
        value = float(lse_R[row - start])
        name = sample_names[row] if sample_names else "the block"
        raise TeacherError(
            "teacher-nonfinite",
            "a row of logits is no distribution: it holds NaN or +inf, or no finite value at all",
            where=f"{name}, position {int(positions_P[row])}",
            got=f"logsumexp {value}",
            expected="finite logits (-inf is allowed for ids that cannot occur)",
            hint="check the teacher's dtype (float16 overflows easily: try --dtype float32)",
        )
