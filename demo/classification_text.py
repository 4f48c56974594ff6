"""Text classification end to end on the King James Bible: `python demo/classification_text.py`.

    a two-layer DistilBERT, trained for a minute to tell from two verses which part of the Bible
    they are from -> its logits in a store -> verified -> a bag-of-words student trained from the
    store, with the labels alone and with the teacher's logits -> demo-out/classification-text

Passages are JSONL rows with a label by name. The students never see the teacher. `--quick` takes a
thirtieth of everything, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import zlib
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import logitstore as ls  # noqa: E402  (runs from a checkout, which is not on the path yet)
from demo import fetch_assets  # noqa: E402
from demo.classification import kd_loss, label_loss  # noqa: E402
from demo.run import logitstore  # noqa: E402

OUT = Path(os.environ.get("LOGITSTORE_DEMO_OUT", REPOSITORY / "demo-out")) / "classification-text"
MODEL = OUT / "teacher"
# Part of the Bible -> its last book, in the order of the text.
PARTS = {
    "law": "Deu",
    "history": "Est",
    "poetry": "SSol",
    "prophets": "Mal",
    "gospels": "Acts",
    "letters": "Rev",
}
VERSES = 2
TRAIN_STEPS = 500
CAPTURED = 3000
STUDENT_EPOCHS = 20
SEEDS = 3
_VERSE = re.compile(r"([0-9]?[A-Za-z]+)\d+:\d+ (.*)")


def passages(text: str) -> list[dict[str, str]]:
    """Two verses of one book after another, with the part they are from."""
    verses = [match.groups() for match in map(_VERSE.match, text.splitlines()) if match]
    parts = iter(PARTS.items())
    part, last = next(parts)
    rows = []
    for book, of_book in groupby(verses, key=lambda verse: verse[0]):
        words = [verse for _, verse in of_book]
        for start in range(0, len(words) - VERSES + 1, VERSES):
            rows.append({"text": " ".join(words[start : start + VERSES]), "part": part})
        if book == last:
            part, last = next(parts, ("", ""))
    return rows


def is_test(row: dict[str, str]) -> bool:
    """A fifth of the passages, by a hash of the text."""
    return zlib.crc32(row["text"].encode()) % 5 == 0


def new_teacher(texts: list[str]) -> tuple[Any, Any]:
    """A fresh classifier of 0.8 million parameters and its tokenizer of 4,096 pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    pieces = Tokenizer(models.BPE(unk_token="[UNK]"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", model_max_length=96
    )
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=128,
        hidden_dim=256,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=96,
        pad_token_id=0,
        id2label=dict(enumerate(PARTS)),
        label2id={name: number for number, name in enumerate(PARTS)},
    )
    return DistilBertForSequenceClassification(config), tokenizer


def train_teacher(rows: list[dict[str, str]], steps: int) -> None:
    """Train on labels and keep the folder."""
    model, tokenizer = new_teacher([row["text"] for row in rows])
    labels = torch.tensor([list(PARTS).index(row["part"]) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(rows), (48,), generator=generator)
        texts = [rows[i]["text"] for i in chosen]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        loss = model(**inputs, labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)


def teacher_accuracy(rows: list[dict[str, str]]) -> float:
    """Of the trained teacher."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL).eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            texts = [row["text"] for row in part]
            inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            best = model(**inputs).logits.argmax(-1).tolist()
            right += sum(list(PARTS)[i] == row["part"] for i, row in zip(best, part, strict=True))
    return right / len(rows)


def bags(texts: list[str], buckets: int = 4096) -> Tensor:
    """float32 [B, buckets]: which hashed words a text holds."""
    out = torch.zeros(len(texts), buckets)
    for row, text in enumerate(texts):
        words = re.findall(r"[a-z]+", text.lower())
        out[row, [zlib.crc32(word.encode()) % buckets for word in words]] = 1
    return out


def train_student(store: Path, inputs: dict[str, Tensor], loss: Any, seed: int) -> nn.Module:
    """A linear student from the store; texts are looked up by the samples' names."""
    dataset = ls.LogitDataset(store, shuffle=True, seed=seed)
    torch.manual_seed(seed)
    net = nn.Linear(4096, len(PARTS))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    for epoch in range(STUDENT_EPOCHS):
        dataset.set_epoch(epoch)
        for batch in ls.loader(dataset, batch_size=64):
            student_BV = net(torch.stack([inputs[key] for key in batch.sample_keys]))
            optimizer.zero_grad()
            loss(student_BV, batch).backward()
            optimizer.step()
    return net


def main() -> None:
    """Everything; prints and keeps the accuracies on the held-out passages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a thirtieth of everything, one seed")
    part = 30 if parser.parse_args().quick else 1
    start_s = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    rows = passages(fetch_assets.kjv().read_text(encoding="utf-8"))
    test = [row for row in rows if is_test(row)][::part]
    train = [row for row in rows if not is_test(row)]
    # Evenly spaced, so that every part has its share.
    captured = train[:: len(train) * part // CAPTURED][: CAPTURED // part]
    corpus = OUT / "passages.jsonl"
    corpus.write_text("\n".join(json.dumps(row) for row in captured) + "\n", encoding="utf-8")
    if not MODEL.exists():
        train_teacher(train, TRAIN_STEPS // part)
    store = OUT / "store"
    logitstore(
        "precompute",
        "--task", "classification",
        "--teacher", f"hf:{MODEL}",
        "--corpus", str(corpus),
        "--label-key", "part",
        "--signal", "dense",
        "--out", str(store),
    )  # fmt: skip
    logitstore("verify", str(store), "--full")
    features = bags([row["text"] for row in captured])
    inputs = {f"passages.jsonl#{number}": bag for number, bag in enumerate(features)}
    test_bags = bags([row["text"] for row in test])
    answers = torch.tensor([list(PARTS).index(row["part"]) for row in test])
    lines = [
        "| what | accuracy on held-out passages | seeds |",
        "|---|---|---|",
        f"| teacher, {len(train):,} passages | {teacher_accuracy(test):.2%} | |",
    ]
    seeds = SEEDS if part == 1 else 1
    arms = {
        "labels alone": label_loss,
        "teacher's logits (forward KL at T = 4, 0.1 labels)": kd_loss,
    }
    for name, loss in arms.items():
        values = []
        for seed in range(seeds):
            net = train_student(store, inputs, loss, seed)
            right = net(test_bags).argmax(-1) == answers
            values.append(right.float().mean().item())
        each = ", ".join(f"{value:.2%}" for value in values)
        lines.append(f"| student, {name} | {sum(values) / seeds:.2%} | {each} |")
    table = "\n".join(lines) + "\n"
    head = f"Which part of the Bible two verses are from; students train on {len(captured):,}."
    (OUT / "report.md").write_text(f"# Text classification demo\n\n{head}\n\n{table}")
    print("\n" + table)
    print(f"{OUT / 'report.md'}; {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
