"""Audits and estimates of classifiers: the corpus is named again, and must be the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_digits

from logitstore.analysis.audit import audit
from logitstore.analysis.estimate import advise
from logitstore.capture import CaptureSettings, precompute
from logitstore.spec.errors import CorpusError, UsageError
from logitstore_cli.main import cli
from tests.capture_classifiers import Digits, Letters

DIGITS = "py:tests.capture_classifiers:digits"


class Other(Digits):
    """The same classes, other logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.weights.roll(1, 1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CaptureSettings:
    """A capture of three views of digits."""
    folder = tmp_path_factory.mktemp("digits")
    np.save(folder / "images.npy", load_digits().images.astype(np.uint8)[:400])
    np.save(folder / "labels.npy", load_digits().target[:400])
    return CaptureSettings(
        teacher=DIGITS,
        corpus=(str(folder / "images.npy"),),
        labels=(str(folder / "labels.npy"),),
        out=str(folder / "store"),
        signal="dense",
        task="classification",
        views=3,
        crop_padding=1,
        threads_per_worker=1,
    )


@pytest.fixture(scope="module")
def stores(settings: CaptureSettings) -> dict[str, str]:
    """Signal -> store."""
    out = {}
    for signal in ("dense", "topk:3", "sampled:9", "threshold:tau=1/6"):
        place = f"{settings.out}-{signal.partition(':')[0]}"
        precompute(CaptureSettings(**{**vars(settings), "signal": signal, "out": place}))
        out[signal] = place
    return out


def test_an_honest_store_agrees_and_another_teacher_is_seen(settings, stores) -> None:
    for signal, store in stores.items():
        found = audit(store, DIGITS, corpus=settings.corpus)
        assert (found.samples, found.positions) == (256, 256)
        assert all(abs(h.z) < 4.5 for h in found.hit_rates.values()), (signal, found.hit_rates)
        # Float16 logits up to 32 are off by 1/128, steps of a threshold record by 1/64.
        assert found.logprobs.largest < 0.05
        lying = audit(store, "py:tests.analysis.test_classifiers:Other", corpus=settings.corpus)
        if signal == "sampled:9":
            assert max(abs(h.z) for h in lying.hit_rates.values()) > 6
        else:
            assert lying.logprobs.mean > 1


def test_the_corpus_must_be_that_of_the_capture(settings, stores, tmp_path) -> None:
    with pytest.raises(UsageError, match="name the corpus"):
        audit(stores["dense"], DIGITS)
    other = tmp_path / "images.npy"
    np.save(other, np.load(settings.corpus[0])[::-1])
    with pytest.raises(CorpusError, match=r"images\.npy: content changed"):
        audit(stores["dense"], DIGITS, corpus=[str(other)])


def test_rows_of_text_are_found_again(tmp_path) -> None:
    rows = ["banana", "eerie", "", "mississippi", "igloo"]
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("\n".join(json.dumps({"body": row}) for row in rows) + "\n")
    teacher = "py:tests.capture_classifiers:letters"
    store = str(tmp_path / "store")
    words = ["--teacher", teacher, "--corpus", str(corpus)]
    task = ["--task", "classification", "--text-key", "body"]
    start = ["precompute", *words, *task, "--signal", "dense", "--out", store]
    assert CliRunner().invoke(cli, start).exit_code == 0
    done = CliRunner().invoke(cli, ["audit", store, *words, "--json"])
    answer = json.loads(done.stdout)
    assert answer["samples"] == 4
    assert answer["logprobs"]["count"] == 4 * Letters.num_classes
    assert answer["logprobs"]["max"] < 0.01


def test_an_estimate_is_that_of_the_capture(settings, stores) -> None:
    advice = advise(settings, tuple(stores), pilot_tokens=600)
    assert (advice.documents, advice.tokens, advice.pilot_tokens) == (400, 1200, 600)
    for option in advice.options:
        done = CaptureSettings(**{**vars(settings), "signal": option.signal, "out": "unused"})
        place = Path(stores[option.signal])
        stored_bytes = sum(f.stat().st_size for f in (place / "shards").iterdir())
        assert option.total_bytes == pytest.approx(stored_bytes, rel=0.1), done.signal
    by_signal = {o.signal: o for o in advice.options}
    assert by_signal["dense"].squared_error < 1e-5
    assert by_signal["sampled:9"].squared_error > by_signal["threshold:tau=1/6"].squared_error
    assert advice.recommended == "dense"


def test_the_command_takes_the_options_of_a_capture(settings) -> None:
    words = ["estimate", "--task", "classification", "--teacher", DIGITS, "--views", "2"]
    words += ["--corpus", settings.corpus[0], "--labels", settings.labels[0]]
    shown = CliRunner().invoke(cli, [*words, "--pilot-tokens", "128", "--max-samples", "300"])
    assert shown.exit_code == 0, shown.output
    assert "bytes/sample" in shown.stdout
    assert "about" not in shown.stdout
    assert "400 documents, 300 samples" in shown.stdout
    assert "* recommended: dense" in shown.stdout
