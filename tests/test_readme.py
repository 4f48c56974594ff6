"""README.md: its commands and its Python run as they stand there, on a tiny model and store."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from logitstore_cli.main import run
from tests.conftest import TRAINING_TEXT
from tests.data_stores import make_header, make_store, random_samples
from tests.source_tree import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# What the reader of a block brings: a student, its optimizer, a teacher of their own. The tests'
# stores have 40 ids.
STUDENT = """
import types

import torch

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)


class Model(torch.nn.Module):
    def forward(self, tokens, position_ids=None, attention_mask=None):
        return types.SimpleNamespace(logits=network(tokens))


model = Model()
student = network


def my_teacher():
    for length in (5, 3):
        yield torch.arange(length), torch.randn(length, V)
"""

# Every name that the main path has, in one go.
MAIN_PATH = """
import logitstore as ls
store = ls.open("STORE")
ds = ls.LogitDataset("STORE", shuffle=True, seed=0)
assert ds[0].tokens.shape == ds[0].labels.shape
ds[0].targets
for batch in ls.loader(ds, batch_size=8, num_workers=2):
    batch.tokens, batch.labels, batch.loss_mask, batch.segment_ids, batch.position_ids
    t = batch.targets.padded()
    B, T = batch.tokens.shape
    assert t.ids.shape == t.logprobs.shape == (B, T, 8)
    assert t.log_tail.shape == t.lse.shape == (B, T)
    student_logits_BTV = student(batch.tokens)
    loss = ls.losses.forward_kl(
        student_logits_BTV, batch.targets, mask=batch.loss_mask, missing="ghost"
    )
    assert loss.isfinite()
plain = torch.utils.data.DataLoader(ds, batch_size=8, collate_fn=ls.collate)
assert sum(len(batch.tokens) for batch in plain) == len(ds) == store.num_samples
tokens, logits_TV = torch.arange(5), torch.randn(5, V)
with ls.writer("STORE3", signal="topk:64", vocab_size=V) as w:
    w.add(tokens, logits_TV)
assert ls.open("STORE3").num_samples == 1
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run_script(folder: Path, *parts: str) -> None:
    """Runs the parts as one script, below a guard, since loaders start processes."""
    body = "\n".join([STUDENT, *parts]).replace("\n", "\n    ")
    script = folder / "script.py"
    script.write_text(f"V = 50_257\nif __name__ == '__main__':\n    {body}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_python_blocks_run(tmp_path):
    make_store(
        tmp_path / "STORE", random_samples(20), header=make_header("threshold:tau=1/4")
    ).close()
    assert len(blocks("python")) >= 2
    run_script(tmp_path, *blocks("python"))
    assert (tmp_path / "STORE2" / "store.json").exists()


def test_the_main_path_has_every_name(tmp_path):
    make_store(tmp_path / "STORE", random_samples(20)).close()
    run_script(tmp_path, MAIN_PATH)


def test_commands_run(tmp_path: Path, tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text(TRAINING_TEXT, encoding="utf-8")
    (tmp_path / "FOLDER").symlink_to(tiny_lm_dir)
    lines = [line for block in blocks("") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line[:11] == "logitstore "]
    assert {words[1] for words in commands} >= {"precompute", "verify", "inspect", "seal"}
    for words in commands:
        assert run(words[1:]) == 0, words
