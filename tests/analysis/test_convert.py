"""Conversions that are exact equal a fresh capture; the others are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import logitstore as ls
from logitstore.analysis.convert import convert
from logitstore.record import Record
from logitstore.spec.errors import CommitError, UsageError
from logitstore.store import Store

V, T = 90, 23
AUX = ["label_logprob", "label_rank", "entropy", "log_tail", "lse"]


def capture(path: Path, signal: str, aux: list[str] | None = None, **options: object) -> Path:
    """The same five sequences of teacher logits, under any signal."""
    g = torch.Generator().manual_seed(4)
    with ls.writer(path, signal=signal, vocab_size=V, aux=aux, **options) as w:
        for i in range(5):
            tokens = torch.randint(0, V, (T - i,), generator=g)
            logits = (torch.randn(T - i, V, generator=g) * 3).half().float()
            w.add(tokens, logits, sample_key=f"doc{i}")
    return path


def everything(store: Store) -> Record:
    return Record.concat(
        [
            store.read_chunk(s, c)
            for s in range(len(store.shards))
            for c in range(len(store.commit(s).chunks))
        ]
    )


def records_equal(a: Path, b: Path, *, but: dict[str, float] | None = None) -> None:
    """Every column of both stores equal, `but` these within a tolerance."""
    with ls.open(a) as first, ls.open(b) as second:
        assert first.header.schema_ == second.header.schema_
        left, right = everything(first), everything(second)
    for name, values in left.arrays.items():
        if but and name in but:
            np.testing.assert_allclose(
                right[name].astype(float), values.astype(float), atol=but[name]
            )
        else:
            np.testing.assert_array_equal(right[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("topk:32", "topk:8"),
        ("topk:32", "topk:32,p=0.9"),
        ("topk:32,p=0.95", "topk:16,p=0.9"),
        ("topk:16", "topk:16,coding=q8"),
    ],
)
def test_fewer_ids_equal_a_fresh_capture(tmp_path: Path, source: str, target: str) -> None:
    wide = capture(tmp_path / "wide", source, AUX)
    fresh = capture(tmp_path / "fresh", target, AUX + ["top1_logprob"] * ("q8" in target))
    done = convert(wide, tmp_path / "copy", signal=target)
    assert (done.samples, done.skipped) == (5, 0)
    # log_tail is summed from stored float16 log-probs here, from logits there; a mass cut may fall
    # one id apart for the same reason, which this seed does not meet; q8 rounds an f16 value
    tolerance = {"log_tail": 8e-3}
    if "q8" in target:
        tolerance["logprobs"] = 1 / 16
    records_equal(fresh, tmp_path / "copy", but=tolerance)
    with ls.open(tmp_path / "copy") as copy:
        conversion = copy.header.configuration["converted_from"]
        assert conversion["signal"] == source


@pytest.mark.parametrize("signal", ["topk:8", "sampled:20", "threshold:tau=1/20", "graph:k=4"])
def test_another_container_holds_the_same_values(tmp_path: Path, signal: str) -> None:
    zarr = capture(tmp_path / "zarr", signal)
    convert(zarr, tmp_path / "arrow", container="arrow")
    convert(tmp_path / "arrow", tmp_path / "back", container="zarr")
    records_equal(zarr, tmp_path / "arrow")
    records_equal(zarr, tmp_path / "back")


@pytest.mark.parametrize("signal", ["topk:8", "sampled:20", "threshold:tau=1/20", "graph:k=4"])
def test_dense_logits_encode_as_a_capture_would(tmp_path: Path, signal: str) -> None:
    dense = capture(tmp_path / "dense", "dense")
    fresh = capture(tmp_path / "fresh", signal)
    convert(dense, tmp_path / "copy", signal=signal)
    records_equal(fresh, tmp_path / "copy")


def test_fields_that_logits_do_not_tell_go_along(tmp_path: Path) -> None:
    with ls.writer(tmp_path / "dense", signal="dense", vocab_size=V, aux=["byte_end"]) as w:
        w.add([1, 2, 3], torch.randn(3, V), byte_end=[4, 5, 9])
    convert(tmp_path / "dense", tmp_path / "copy", signal="topk:4")
    assert ls.LogitDataset(tmp_path / "copy")[0].targets.byte_end.tolist() == [4, 5, 9]


def test_logits_that_do_not_fit_are_no_infinities(tmp_path: Path) -> None:
    with ls.writer(tmp_path / "dense", signal="dense:dtype=float32", vocab_size=V) as w:
        w.add([1, 2, 3], torch.randn(3, V) * 1e5)
    with pytest.raises(UsageError, match="does not fit") as caught:
        convert(tmp_path / "dense", tmp_path / "copy", signal="dense")
    assert caught.value.kind == "conversion-refused"


def test_fewer_ranks_of_a_graph(tmp_path: Path) -> None:
    wide = capture(tmp_path / "wide", "graph:k=6")
    fresh = capture(tmp_path / "fresh", "graph:k=3")
    convert(wide, tmp_path / "copy", signal="graph:k=3")
    records_equal(fresh, tmp_path / "copy", but={"row_sums": 1e-2})


def test_threshold_head_becomes_an_ordered_prefix(tmp_path: Path) -> None:
    source = capture(tmp_path / "source", "threshold:tau=1/60")
    convert(source, tmp_path / "copy", signal="topk:1")
    exact = capture(tmp_path / "exact", "topk:1")
    with ls.open(tmp_path / "copy") as copy, ls.open(exact) as fresh:
        got, expected = everything(copy), everything(fresh)
    np.testing.assert_array_equal(got["ids"], expected["ids"])
    np.testing.assert_allclose(
        np.exp(got["logprobs"].astype(float)), np.exp(expected["logprobs"].astype(float)), atol=0.02
    )
    with pytest.raises(UsageError, match="positions is shorter"):
        convert(source, tmp_path / "no", signal="topk:40")


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("topk:8", "sampled:20", "never stored"),
        ("topk:8", "threshold:tau=1/20", "never stored"),
        ("topk:8", "topk:9", "beyond the 8 stored"),
        ("topk:8,coding=q8", "topk:8", "do not become exact"),
        ("topk:8,p=0.5", "topk:8", "cut at mass 0.5"),
        ("sampled:20", "topk:8", "neither the largest ids"),
        ("sampled:20", "sampled:10", "neither the largest ids"),
        ("topk:8", "graph:k=4", "sums are taken over raw logits"),
        ("threshold:tau=1/20", "threshold:tau=1/10", "order below the head"),
        ("threshold:tau=1/20", "topk:1,coding=q8", "rounded twice"),
        ("graph:k=4", "topk:4", "taken apart"),
        ("dense", "scores:4", "which candidates"),
    ],
)
def test_what_would_be_a_lie_is_refused(
    tmp_path: Path, source: str, target: str, reason: str
) -> None:
    capture(tmp_path / "source", source)
    with pytest.raises(UsageError, match=reason) as caught:
        convert(tmp_path / "source", tmp_path / "copy", signal=target)
    assert caught.value.kind == "conversion-refused"
    assert not (tmp_path / "copy").exists()


def test_a_finished_conversion_does_nothing_again_and_another_is_refused(tmp_path: Path) -> None:
    source = capture(tmp_path / "source", "topk:8", shard_positions=40)
    first = convert(source, tmp_path / "copy", signal="topk:4")
    again = convert(source, tmp_path / "copy", signal="topk:4")
    assert first.shards > 1
    assert (again.shards, again.skipped) == (0, first.shards)
    with pytest.raises(CommitError, match="topk:2"):
        convert(source, tmp_path / "copy", signal="topk:2")
