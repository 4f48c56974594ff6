"""An audit finds nothing in an honest store, and finds another teacher at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from logitstore.analysis.audit import audit
from logitstore.capture import CaptureSettings, precompute
from logitstore.spec.errors import AlignmentError
from logitstore_cli.main import cli
from tests.capture_teachers import Bigram

TEACHER = "py:tests.capture_teachers:Bigram"
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form. "


class Other(Bigram):
    """The same tokenizer and vocabulary, another distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = self.table.roll(1, 0)


def store_of(tmp_path: Path, signal: str) -> str:
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT * 12)
    out = str(tmp_path / "store")
    precompute(
        CaptureSettings(
            teacher=TEACHER,
            corpus=(str(corpus),),
            out=out,
            signal=signal,
            seq_len=64,
            aux=("entropy", "label_logprob", "lse"),
        )
    )
    return out


@pytest.mark.parametrize("signal", ["topk:16", "topk:16,p=0.9", "dense:dtype=float32"])
def test_an_exact_record_agrees_to_float16(tmp_path: Path, signal: str) -> None:
    found = audit(store_of(tmp_path, signal), TEACHER, samples=5)
    assert found.samples == 5
    assert 64 * 4 < found.positions <= 64 * 5
    assert found.logprobs.count > 1000
    assert found.logprobs.largest < 0.01
    assert found.aux["entropy"].largest < 0.01
    assert found.aux["label_logprob"].largest < 0.01
    assert found.aux["lse"].largest < 1e-4


@pytest.mark.parametrize("signal", ["sampled:12", "threshold:tau=1/12"])
def test_sampled_ids_are_hit_as_often_as_they_should(tmp_path: Path, signal: str) -> None:
    store = store_of(tmp_path, signal)
    honest = audit(store, TEACHER, samples=100)
    assert all(abs(h.z) < 4 for h in honest.hit_rates.values()), honest.hit_rates
    assert all(h.expected > 20 for h in honest.hit_rates.values())
    lying = audit(store, "py:tests.analysis.test_audit:Other", samples=100)
    assert any(abs(h.z) > 6 for h in lying.hit_rates.values()), lying.hit_rates


def test_another_teacher_is_seen_in_every_number(tmp_path: Path) -> None:
    found = audit(store_of(tmp_path, "topk:16"), "py:tests.analysis.test_audit:Other", samples=2)
    assert found.logprobs.mean > 1
    assert found.aux["label_logprob"].mean > 0.5


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path, tiny_lm_dir: Path) -> None:
    store = store_of(tmp_path, "topk:16")
    with pytest.raises(AlignmentError) as caught:
        audit(store, f"hf:{tiny_lm_dir}")
    assert caught.value.kind == "tokenizer-mismatch"


def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    store = store_of(tmp_path, "threshold:tau=1/12")
    words = ["audit", store, "--teacher", TEACHER, "--samples", "3"]
    table = CliRunner().invoke(cli, words)
    assert table.exit_code == 0, table.output
    assert "log-probs" in table.stdout
    assert "largest of the tail" in table.stdout
    for_one = ["audit", store, "--teacher", TEACHER, "--sample", "1", "--sample", "1", "--json"]
    assert json.loads(CliRunner().invoke(cli, for_one).stdout)["samples"] == 1
    missing = CliRunner().invoke(cli, ["audit", store, "--teacher", TEACHER, "--sample", "99999"])
    assert missing.exit_code != 0
    answer = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert answer["schema"] == "logitstore.audit/1"
    assert answer["samples"] == 3
    # threshold heads are kept in steps of 1/64 nat
    assert answer["logprobs"]["mean"] < 1 / 64
