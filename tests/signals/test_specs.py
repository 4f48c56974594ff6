"""Signal specs as typed: canonical forms, and messages that say what and how."""

from __future__ import annotations

import pytest

from logitstore.spec.errors import UsageError
from logitstore.spec.signals import ThresholdSpec, parse_signal


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        (" topk: 64 , p = 49/50", "topk:64,p=0.98"),
        ("topk:k=64", "topk:64"),
        ("sampled:50,power=1", "sampled:50"),
        ("sampled:50,power=9/10", "sampled:50,power=0.9"),
        ("threshold:0.025", "threshold:tau=1/40"),
        ("threshold:tau=2/80", "threshold:tau=1/40"),
        ("threshold:tau=2.5e-2,tail=pairs", "threshold:tau=1/40"),
        ("threshold:tau=1/3", "threshold:tau=1/3"),
        ("threshold:k=12", "threshold:k=12"),
        ("graph:10,form=rank", "graph:k=10"),
        ("graph:k=10,form=vocab", "graph:k=10,form=vocab"),
        ("dense:float32", "dense:dtype=float32"),
        ("dense", "dense"),
        ("scores:12", "scores:12"),
    ],
)
def test_the_canonical_form_reads_back(typed: str, canonical: str) -> None:
    spec = parse_signal(typed)
    assert str(spec) == canonical
    assert parse_signal(canonical) == spec


def test_a_spec_that_is_built_is_canonical_too() -> None:
    assert ThresholdSpec(tau="0.025") == parse_signal("threshold:tau=2/80")
    with pytest.raises(ValueError, match="fraction"):
        ThresholdSpec(tau="many")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("topk", ["k is missing", "topk:64"]),
        ("topk:6.5", ["k='6.5' is not a whole number"]),
        ("topk:0", ["greater than or equal to 1"]),
        ("topk:64,k=32", ["k is given twice"]),
        ("topk:64,,p=0.9", ["not name=value"]),
        ("topk:64,0.9", ["'0.9' is not name=value"]),
        ("topk:64,q=3", ["topk has no parameter 'q'", "topk:64,p="]),
        ("topk:64,p=nan", ["p: ", "finite"]),
        ("topk:64,coding=q9", ["'f16' or 'q8'"]),
        ("TOPK:64", ["did you mean topk:64"]),
        ("rskd:50", ["one of dense, topk, sampled"]),
        ("sampled:0", ["rounds", "sampled:50"]),
        ("threshold", ["either tau", "threshold:tau=1/40"]),
        ("threshold:40", ["tau=1/40?"]),
        ("threshold:tau=1/0", ["tau='1/0' is not a number"]),
        ("threshold:k=12,tau=1/40", ["not both"]),
        ("graph", ["k is missing", "graph:k=10"]),
        ("scores", ["candidates is missing", "scores:12"]),
        (None, ["a signal is text or a spec"]),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_would_do(typed: str, says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_signal(typed)
    assert caught.value.kind == "unknown-signal"
    for words in says:
        assert words in str(caught.value)
    assert "Value error" not in str(caught.value)
