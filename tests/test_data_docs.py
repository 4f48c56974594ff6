"""docs/training.md: every block runs, and its worked example is what a batch holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from logitstore.data import LogitDataset, collate
from tests.data_stores import Sample, make_store, random_samples

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


# What the Trainer's own checkpoint resume reads, beside an uninterrupted run.
RESUME = """
class Recording(DistillationTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(inputs["batch"].sample_keys)
        return super().compute_loss(model, inputs, *args, **kwargs)


def recorded(steps, **resume):
    seen.clear()
    arguments = TrainingArguments(
        "resume-out", max_steps=steps, save_steps=9, per_device_train_batch_size=8,
        report_to=[], remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )
    data = ls.LogitDataset("STORE", shuffle=True, seed=0, rank=0, world_size=1)
    Recording(
        model=student, args=arguments, train_dataset=data, data_collator=trainer.data_collator
    ).train(**resume)
    return list(seen)


whole = recorded(14)  # eight batches an epoch
assert len(set(whole)) == 14
resumed = recorded(14, resume_from_checkpoint="resume-out/checkpoint-9")
assert resumed == whole[9:], (resumed, whole)
print("done")
"""


def test_every_block_runs_in_order(tmp_path):
    make_store(tmp_path / "STORE", random_samples(61), shards=3).close()
    script = tmp_path / "page.py"
    body = "\n".join([*blocks(), RESUME])
    indented = body.replace("\n", "\n    ")
    script.write_text(f"if __name__ == '__main__':\n    {indented}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"


def test_the_trainer_recipe_is_short():
    recipe = blocks()[-1]
    assert "Trainer" in recipe
    assert len(recipe.splitlines()) < 60


def test_the_worked_example_is_what_a_batch_holds(tmp_path):
    samples = [Sample("a", [4, 5, 6, 7, 8], [0, 0, 0, 1, 1]), Sample("b", [1, 2, 3])]
    make_store(tmp_path, samples, shards=1).close()
    batch = collate([*LogitDataset(tmp_path)])
    example = PAGE.read_text(encoding="utf-8").split("t=4\n", 1)[1].split("```")[0]
    rows: dict[str, list[list[object]]] = {}
    for line in filter(None, example.splitlines()):
        name, *values = line.split()
        words = {"True": True, "False": False}
        rows.setdefault(name, []).append([words.get(v, v) for v in values[:5]])
    assert set(rows) == {"tokens", "segment_ids", "position_ids", "labels", "loss_mask"}
    for name, expected in rows.items():
        field: torch.Tensor = getattr(batch, name)
        assert field.tolist() == [[int(v) for v in row] for row in expected], name
