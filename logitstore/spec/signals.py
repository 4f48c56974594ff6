"""Signal specs: what is kept of a position's distribution, as typed on the command line.

    topk:64          topk:64,p=0.98       topk:64,coding=q8
    sampled:50       sampled:50,power=0.9
    threshold:tau=1/40                    threshold:k=12
    graph:k=10       graph:k=10,form=vocab
    dense            scores:12

`parse_signal` reads that form; `str(spec)` gives it back in canonical form.
"""

from __future__ import annotations

import difflib
import math
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from logitstore.spec.document import Strict
from logitstore.spec.errors import UsageError

__all__ = [
    "EMPTY_SLOT",
    "DenseSpec",
    "GraphSpec",
    "SampledSpec",
    "ScoresSpec",
    "SignalSpec",
    "ThresholdSpec",
    "TopKSpec",
    "parse_signal",
]

MAX_IDS = 65_535

# Edges kept per segment of a vocabulary-form graph, times k.
GRAPH_EDGES_PER_NODE = 8

# Id of a candidate slot of `scores` that a sample leaves empty.
EMPTY_SLOT = 0xFFFFFFFF

# Step of threshold head log-probs, nats.
HEAD_STEP = 1 / 64

# Step of q8 log-probs, nats, and the most steps: float16 holds all multiples down to -128.
Q8_STEP = 1 / 16
Q8_MOST_STEPS = 2047


class DenseSpec(Strict):
    """Every raw logit."""

    kind: Literal["dense"] = "dense"
    dtype: Literal["float16", "float32"] = "float16"

    def __str__(self) -> str:
        return "dense" if self.dtype == "float16" else f"dense:dtype={self.dtype}"


class TopKSpec(Strict):
    """The k most probable ids with log-probs; with p, only the smallest prefix that holds mass p
    (nucleus)."""

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=1, le=MAX_IDS)]
    p: Annotated[float, Field(gt=0, le=1)] | None = None
    # q8: log-probs in steps of 1/16 nat, within 1/32; the largest exact in top1_logprob.
    coding: Literal["f16", "q8"] = "f16"

    def __str__(self) -> str:
        p = "" if self.p is None else f",p={self.p!r}"
        return f"topk:{self.k}{p}" + ("" if self.coding == "f16" else f",coding={self.coding}")


class SampledSpec(Strict):
    """RS-KD: ids of `rounds` draws with replacement from the proposal p^power, with their
    counts."""

    kind: Literal["sampled"] = "sampled"
    rounds: Annotated[int, Field(ge=1, le=MAX_IDS)]
    power: Annotated[float, Field(gt=0, le=4)] = 1.0

    def __str__(self) -> str:
        return f"sampled:{self.rounds}" + ("" if self.power == 1.0 else f",power={self.power!r}")


class ThresholdSpec(Strict):
    """Threshold sampling: probabilities of at least tau exactly, the rest sampled; or a fixed k per
    position.

    tau is kept as the fraction the user wrote ("1/40"), so that 1/3 is exactly 1/3.
    """

    kind: Literal["threshold"] = "threshold"
    tau: str | None = None
    k: Annotated[int, Field(ge=1, le=MAX_IDS)] | None = None
    tail: Literal["pairs"] = "pairs"

    @field_validator("tau")
    @classmethod
    def _canonical(cls, tau: str | None) -> str | None:
        try:
            return tau if tau is None else str(Fraction(tau))
        except (ValueError, ZeroDivisionError):
            return tau  # refused below

    @model_validator(mode="after")
    def _one_of(self) -> ThresholdSpec:
        if (self.tau is None) == (self.k is None):
            raise ValueError("give either tau (such as 1/40) or k, not both")
        if self.tau is not None:
            try:
                tau = Fraction(self.tau)
            except (ValueError, ZeroDivisionError):
                raise ValueError("tau must be a fraction such as 1/40") from None
            if not Fraction(1, MAX_IDS - 1) <= tau <= 1:
                raise ValueError(
                    f"tau must lie between 1/{MAX_IDS - 1} and 1 (tau=1/{self.tau}?)"
                    if tau.denominator == 1 and 1 < tau < MAX_IDS
                    else f"tau must lie between 1/{MAX_IDS - 1} and 1"
                )
        return self

    @property
    def tau_value(self) -> float | None:
        """tau as a float, None for fixed k."""
        return None if self.tau is None else float(Fraction(self.tau))

    @property
    def budget(self) -> int:
        """Most ids a position stores beside the realised next token."""
        if self.k is not None:
            return self.k
        assert self.tau is not None
        return math.floor(1 / Fraction(self.tau)) + 1

    def __str__(self) -> str:
        return f"threshold:tau={self.tau}" if self.tau is not None else f"threshold:k={self.k}"


class GraphSpec(Strict):
    """Top-k outer products of raw logits, summed over each segment's valid positions."""

    kind: Literal["graph"] = "graph"
    k: Annotated[int, Field(ge=1, le=1024)]
    form: Literal["rank", "vocab"] = "rank"

    def __str__(self) -> str:
        return f"graph:k={self.k}" + ("" if self.form == "rank" else f",form={self.form}")


class ScoresSpec(Strict):
    """Raw scores of `candidates` given ids per position."""

    kind: Literal["scores"] = "scores"
    candidates: Annotated[int, Field(ge=1, le=MAX_IDS)]

    def __str__(self) -> str:
        return f"scores:{self.candidates}"


SignalSpec = Annotated[
    DenseSpec | TopKSpec | SampledSpec | ThresholdSpec | GraphSpec | ScoresSpec,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(SignalSpec)

# kind -> the parameter a bare value means ("topk:64" is k=64)
_POSITIONAL = {
    "dense": "dtype",
    "topk": "k",
    "sampled": "rounds",
    "threshold": "tau",
    "graph": "k",
    "scores": "candidates",
}
_INTEGERS = {"k", "rounds", "candidates"}
_FLOATS = {"p", "power"}
_EXAMPLES = {
    "topk": "topk:64 or topk:64,p=0.98",
    "sampled": "sampled:50",
    "threshold": "threshold:tau=1/40 or threshold:k=12",
    "graph": "graph:k=10 or graph:k=10,form=vocab",
    "dense": "dense or dense:dtype=float32",
    "scores": "scores:12",
}


def parse_signal(text: str) -> Any:
    """`kind[:value][,name=value...]` -> a spec.

    Raises: UsageError unknown-signal, naming the nearest kind or the parameters there are.
    """
    if not isinstance(text, str):
        raise UsageError(
            "unknown-signal",
            "a signal is text or a spec",
            where="signal",
            got=repr(text)[:80],
            expected=f"for example {_EXAMPLES['topk']}",
        )
    kind, _, rest = text.strip().partition(":")
    if kind not in _POSITIONAL:
        near = difflib.get_close_matches(kind.lower(), _POSITIONAL, 1)
        raise UsageError(
            "unknown-signal",
            "no such signal",
            where=f"signal {text!r}",
            got=kind,
            expected=f"one of {', '.join(_POSITIONAL)}",
            hint=f"did you mean {_EXAMPLES[near[0]]}?" if near else None,
        )
    fields: dict[str, Any] = {"kind": kind}
    for number, part in enumerate(rest.split(",") if rest else ()):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals:
            if number > 0 or not name:
                raise _bad(text, kind, f"{part!r} is not name=value")
            name, value = _POSITIONAL[kind], name
        if name in fields:
            raise _bad(text, kind, f"{name} is given twice")
        fields[name] = _value(text, kind, name, value.strip())
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(p) for p in first["loc"][1:])
        if first["type"] == "extra_forbidden":
            raise _bad(text, kind, f"{kind} has no parameter {where!r}") from None
        said = {"missing": f"{where} is missing"}.get(first["type"])
        said = said or f"{where}: {first['msg']}".removeprefix(": Value error, ")
        raise _bad(text, kind, said) from None


def _value(text: str, kind: str, name: str, value: str) -> Any:
    try:
        if name in _INTEGERS:
            return int(value)
        if name in _FLOATS:
            return float(Fraction(value)) if "/" in value else float(value)
        if name == "tau":
            return str(Fraction(value))
    except (ValueError, ZeroDivisionError):
        wanted = "a whole number" if name in _INTEGERS else "a number"
        raise _bad(text, kind, f"{name}={value!r} is not {wanted}") from None
    return value


def _bad(text: str, kind: str, what: str) -> UsageError:
    return UsageError(
        "unknown-signal",
        what,
        where=f"signal {text!r}",
        expected=f"for example {_EXAMPLES[kind]}",
    )
