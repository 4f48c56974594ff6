"""Rows of a real model, for tests of statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from logitstore.corpora import Sample
from logitstore.teachers import TeacherOptions, load_teacher


@pytest.fixture(scope="session")
def real_rows_PV(smollm2_dir: Path, kjv_path: Path) -> torch.Tensor:
    """float32 [384, V]: logits of SmolLM2 over a page of a real text."""
    teacher = load_teacher(f"hf:{smollm2_dir}", TeacherOptions())
    text = kjv_path.read_text(encoding="utf-8")[:4000]
    tokens = np.array(teacher.tokenizer.encode(text).ids[:384], np.int64)
    nothing = np.zeros_like(tokens)
    sample = Sample(key="s", tokens=tokens, segment_ids=nothing, byte_end=nothing)
    return torch.cat([block.float() for block in teacher.blocks([sample])])
