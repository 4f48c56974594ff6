"""Estimates against captures, and what they say of signals whose error has a closed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import logitstore as ls
from logitstore.analysis.estimate import advise
from logitstore.capture import CaptureSettings, precompute
from logitstore_cli.main import cli
from tests.capture_teachers import table

TEACHER = "py:tests.capture_teachers:Bigram"
SIGNALS = ("topk:16", "sampled:50", "threshold:tau=1/40", "threshold:tau=1/50", "dense")


@pytest.fixture
def settings(tmp_path: Path) -> CaptureSettings:
    corpus = tmp_path / "text.txt"
    words = [f"{i * 7919 % 1000} words make {i} texts. " for i in range(900)]
    corpus.write_text("".join(words))
    return CaptureSettings(
        teacher=TEACHER, corpus=(str(corpus),), out="", signal="topk:16", seq_len=128
    )


def test_bytes_are_those_of_a_capture(settings: CaptureSettings, tmp_path: Path) -> None:
    advice = advise(settings, SIGNALS, pilot_tokens=4096)
    assert not any(tmp_path.glob("*store*"))
    for option in advice.options:
        out = str(tmp_path / option.signal.replace("/", "-"))
        changes = {**vars(settings), "signal": option.signal, "out": out}
        done = precompute(CaptureSettings(**changes))
        assert done.tokens == advice.tokens
        assert option.total_bytes == pytest.approx(done.stored_bytes, rel=0.1)
        kept = ls.open(out).statistics().measures.get("kept_mass")
        assert (kept is None) == (option.kept_mass is None)
        if kept is not None:
            assert option.kept_mass == pytest.approx(kept.mean, abs=0.01)


def test_errors_are_those_of_the_closed_forms(settings: CaptureSettings) -> None:
    advice = advise(settings, SIGNALS, pilot_tokens=8192)
    by_signal = {o.signal: o for o in advice.options}
    p = torch.softmax(table().double(), -1)
    letters = torch.tensor([ord(c) for c in "0123456789 wordsmaketx."])
    rows = p[letters]
    rskd = float(((1 - rows.square().sum(-1)) / 50).mean())
    assert by_signal["sampled:50"].squared_error == pytest.approx(rskd, rel=0.25)
    outside = float((1 - rows.topk(16).values.sum(-1)).mean())
    assert by_signal["topk:16"].bias == pytest.approx(outside, rel=0.25)
    assert by_signal["topk:16"].bias == pytest.approx(1 - by_signal["topk:16"].kept_mass, abs=0.02)
    assert by_signal["dense"].squared_error < 1e-5
    assert by_signal["threshold:tau=1/40"].bias == 0
    exact, coarse = (by_signal[f"threshold:tau=1/{n}"].squared_error for n in (50, 40))
    assert exact < coarse < by_signal["sampled:50"].squared_error


def test_the_recommendation_is_the_cheapest_that_is_no_noisier_than_the_reference(
    settings: CaptureSettings,
) -> None:
    advice = advise(settings, SIGNALS, pilot_tokens=2048)
    by_signal = {o.signal: o for o in advice.options}
    best, reference = by_signal[advice.recommended], by_signal["sampled:50"]
    assert best.bias == 0
    assert best.squared_error <= reference.squared_error
    assert best.bytes_per_token <= reference.bytes_per_token or best is reference
    only_biased = advise(settings, ("topk:4", "topk:16"), pilot_tokens=512)
    assert only_biased.recommended == "topk:16"


def test_fields_are_counted_and_sums_have_no_error(settings: CaptureSettings) -> None:
    words = ["estimate", "--teacher", TEACHER, "--corpus", settings.corpus[0], "--json"]
    words += ["--pilot-tokens", "256", "--seq-len", "64", "--document-separator", "\\n\\n"]
    words += ["--signal", "sampled:9", "--signal", "graph:k=4"]
    plain = json.loads(CliRunner().invoke(cli, words).stdout)
    more = ["--aux", "lse,entropy", "--lse-at", "2,4", "--always-ids", "1,2,3"]
    full = json.loads(CliRunner().invoke(cli, [*words, *more]).stdout)
    assert plain["recommended"] == "sampled:9"
    for before, after in zip(plain["options"], full["options"], strict=True):
        assert after["bytes_per_token"] > before["bytes_per_token"] + 6
    graph = plain["options"][1]
    assert (graph["squared_error"], graph["bias"], graph["kept_mass"]) == (None, None, None)


def test_the_command_prints_a_table_and_json(settings: CaptureSettings) -> None:
    words = ["estimate", "--teacher", TEACHER, "--corpus", settings.corpus[0]]
    words += ["--pilot-tokens", "512", "--seq-len", "64", "--signal", "topk:8", "--signal", "dense"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.output
    assert "* recommended: dense" in shown.stdout
    # Files as a shell puts them in place of a pattern.
    second = Path(settings.corpus[0]).with_name("second.txt")
    second.write_text("Another document.")
    words.insert(words.index("--corpus") + 2, str(second))
    answer = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert answer["documents"] == 2
    assert answer["schema"] == "logitstore.estimate/1"
    assert [o["signal"] for o in answer["options"]] == ["topk:8", "dense"]
