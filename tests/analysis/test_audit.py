"""An audit finds nothing in an honest store, and finds another teacher at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from logitstore.analysis.audit import TOLERANCE, audit
from logitstore.capture import CaptureSettings, precompute
from logitstore.spec.errors import AlignmentError
from logitstore.teachers import TeacherOptions
from logitstore_cli.main import cli, run
from tests.capture_teachers import Bigram

TEACHER = "py:tests.capture_teachers:Bigram"
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form. "


class Other(Bigram):
    """The same tokenizer and vocabulary, another distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = self.table.roll(1, 0)


def store_of(tmp_path: Path, signal: str, **options: Any) -> str:
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT * 12)
    out = str(tmp_path / "store")
    precompute(
        CaptureSettings(
            corpus=(str(corpus),),
            out=out,
            signal=signal,
            seq_len=64,
            **{"teacher": TEACHER, "aux": ("entropy", "label_logprob", "lse"), **options},
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


@pytest.mark.parametrize("signal", ["sampled:12,power=0.8", "threshold:tau=1/12"])
def test_draws_from_the_rest_are_honest_beside_always_ids(tmp_path: Path, signal: str) -> None:
    """Always-ids that are labels and most probable ids: never drawn, and no doubt about that."""
    common = tuple(sorted({ord(c) for c in " eta"}))
    likely = Bigram().table.argmax(-1).unique()[:120].tolist()
    aux = ("top1_logprob", "logit_mean", "entropy")
    options = {"always_ids": (*common, *(i for i in likely if i not in common)), "lse_at": (2.0,)}
    found = audit(store_of(tmp_path, signal, aux=aux, **options), TEACHER, samples=100)
    assert found.ok, found.doubts
    assert found.same_weights
    assert set(found.aux) == {*aux, "label_logprob", "always_logprobs", "lse_at 2"}
    assert sum(h.expected for h in found.hit_rates.values()) > 20


def test_a_wrong_teacher_ends_with_an_exit_code(tmp_path: Path, capsys) -> None:
    store = store_of(tmp_path, "topk:16")
    words = ["audit", store, "--samples", "2", "--teacher", "py:tests.analysis.test_audit:Other"]
    assert run(words) == 4
    told = capsys.readouterr()
    assert "log-probs: " in told.out
    assert "does not give what the store holds" in told.out
    assert "not the weights" in told.err
    assert run([*words, "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["same_weights"]) == (False, False)
    assert len(found["doubts"]) >= 3
    assert run([*words, "--tolerance", "1000"]) == 0


def test_a_store_in_half_precision_is_audited_in_it(tmp_path: Path, tiny_lm_dir: Path) -> None:
    teacher = f"hf:{tiny_lm_dir}"
    store = store_of(tmp_path, "topk:16", teacher=teacher, dtype="bfloat16", check_bos=False)
    again = audit(store, teacher, samples=2)
    other = audit(store, teacher, samples=2, options=TeacherOptions(dtype="float32"))
    assert again.logprobs.mean < 2e-3 < other.logprobs.mean
    assert other.ok, other.doubts


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
    assert answer["tolerance"] == TOLERANCE
    # threshold heads are kept in steps of 1/64 nat
    assert answer["logprobs"]["mean"] < 1 / 64
