"""A transformers sequence classifier as teacher, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

import logitstore
from logitstore import store as stores
from logitstore_cli.main import run
from tests.conftest import TRAINING_TEXT

NAMES = ("prose", "code", "numbers")
MAX_LENGTH = 24
TEXTS = [line for line in TRAINING_TEXT.splitlines() if line] + ["one two " * 40]


def tokenizer() -> PreTrainedTokenizerFast:
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    pieces.train_from_iterator([TRAINING_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", model_max_length=512
    )


def config(vocab_size: int, **options) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=vocab_size,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=0,
        initializer_range=0.3,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
        **options,
    )


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory) -> Path:
    """A two-layer DistilBERT of random weights with three named classes."""
    folder = tmp_path_factory.mktemp("classifier")
    words = tokenizer()
    words.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DistilBertForSequenceClassification(config(len(words)))
    model.save_pretrained(folder)
    return folder


def words(teacher: Path, folder: Path, *more: str) -> list[str]:
    rows = [
        {"text": text, "kind": NAMES[number % 3] if number % 2 else number % 3}
        for number, text in enumerate(TEXTS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "precompute",
        "--task", "classification",
        "--teacher", f"hf:{teacher}",
        "--corpus", str(folder / "rows.jsonl"),
        "--signal", "dense:dtype=float32",
        "--out", str(folder / "s"),
        *more,
    ]  # fmt: skip


def test_the_store_holds_what_the_model_says(classifier_dir, tmp_path):
    options = ("--label-key", "kind", "--batch-samples", "4", "--aux", "label_logprob")
    assert run(words(classifier_dir, tmp_path, *options)) == 0
    assert run(["verify", "--full", str(tmp_path / "s")]) == 0
    dataset = logitstore.LogitDataset(tmp_path / "s")
    batch = logitstore.collate([dataset[i] for i in range(len(dataset))])
    assert batch.labels.tolist() == [number % 3 for number in range(len(TEXTS))]
    assert batch.tokens is None
    model = DistilBertForSequenceClassification.from_pretrained(classifier_dir).eval()
    pieces = PreTrainedTokenizerFast.from_pretrained(classifier_dir)
    for text, logits in zip(TEXTS, batch.targets.logits, strict=True):
        # Alone, without padding; a text that is too long is cut.
        ids = torch.tensor([pieces(text)["input_ids"][:MAX_LENGTH]])
        with torch.no_grad():
            expected = model(ids).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    own = batch.targets.logprobs.gather(-1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(batch.targets.label_logprob, own, atol=2e-3, rtol=1e-3)
    with stores.open(tmp_path / "s") as store:
        assert store.header.configuration["classes"] == list(NAMES)
        assert store.header.configuration["teacher"]["max_length"] == MAX_LENGTH
        assert store.header.teacher.compute_dtype == "float32"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (DistilBertModel, {}, "classifier.weight"),
        (DistilBertForSequenceClassification, {"problem_type": "regression"}, "no distribution"),
    ],
)
def test_what_is_no_trained_classifier_is_refused(tmp_path, capsys, model, options, says):
    folder = tmp_path / "model"
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    model(config(len(tokens), **options)).save_pretrained(folder)
    assert run(words(folder, tmp_path)) == 1
    told = capsys.readouterr().err
    assert "[teacher-load]" in told
    assert says in told
    assert not (tmp_path / "s").exists()


def test_a_label_that_no_class_has_is_named(classifier_dir, tmp_path, capsys):
    call = words(classifier_dir, tmp_path, "--label-key", "kind")
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('\n{"text": "x", "kind": "verse"}\n')
    assert run(call) == 1
    told = capsys.readouterr().err
    assert "[corpus-label]" in told
    assert f"rows.jsonl#{len(TEXTS)}" in told
    assert "prose, code, numbers" in told
