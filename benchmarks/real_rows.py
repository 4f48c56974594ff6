"""Rows of logits of real language models over real texts, for benchmarks.

The default is SmolLM2-135M (49,152 ids), which `demo/fetch_assets.py` fetches. Models with larger
vocabularies are used where their folders are found in `.cache/models/`.

Letters: W positions of a window, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitstore.spec.tokenizer_pieces import table_of

__all__ = [
    "MODELS",
    "TEXTS",
    "Window",
    "cached_rows",
    "model_folder",
    "token_bytes",
    "windows",
]

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CACHE = Path(__file__).resolve().parent.parent / ".cache"

# name -> (folder below .cache/models, whether windows need a BOS token in front)
MODELS = {
    "smollm2": ("smollm2-135m", False),
    "qwen": ("qwen2.5-coder-0.5b", False),
    "gemma": ("gemma3-270m", True),
}
TEXTS = ("kjv", "python-docs")


@dataclass(frozen=True)
class Window:
    """Consecutive tokens int64 [W] of one text, their logits float32 [W, V], and what the output
    layer makes these from, float32 [W, d]."""

    text: str
    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [W]: the next token, -1 at the end."""
        return np.append(self.tokens[1:], -1)

    def first(self, count: int) -> Window:
        """The window's first positions."""
        return Window(self.text, self.tokens[:count], self.logits[:count], self.hidden[:count])


def model_folder(name: str) -> Path | None:
    """The model's folder, or None when it has not been fetched."""
    folder = CACHE / "models" / MODELS[name][0]
    return folder if folder.exists() else None


def text_of(name: str) -> str:
    if name == "kjv":
        whole = (CACHE / "corpora" / "kjv.txt").read_text(encoding="utf-8")
        return whole[len(whole) // 4 :]
    files = sorted((CACHE / "corpora" / "python-docs").rglob("*.rst.txt"))
    return "\n".join(path.read_text(encoding="utf-8") for path in files[10::25])


def token_bytes(model: str) -> NDArray[np.int64]:
    """int64 [V]: bytes of text that each id stands for."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder(model))
    table = table_of(tokenizer.backend_tokenizer)
    return np.array([len(token or b"") for token in table.tokens])


def windows(model: str, per_text: int, length: int) -> Iterator[Window]:
    """`per_text` windows of `length` tokens of each text, with the model's logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(model)
    assert folder is not None, f"{model} is not there"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bos = [tokenizer.bos_token_id] if MODELS[model][1] else []
    fresh = length - len(bos)
    streams = {
        text: tokenizer(text_of(text)[: 8 * per_text * length], add_special_tokens=False).input_ids
        for text in TEXTS
    }
    for text, stream in streams.items():
        for number in range(per_text):
            tokens = torch.tensor(bos + stream[number * fresh : (number + 1) * fresh])
            with torch.inference_mode():
                hidden_Wd = network.model(tokens[None]).last_hidden_state[0]
                logits_WV = network.lm_head(hidden_Wd)[:, : len(tokenizer)]
            yield Window(text, tokens.numpy(), logits_WV.numpy(), hidden_Wd.numpy())


def cached_rows(model: str, per_text: int, length: int) -> list[Window]:
    """The windows, their logits memory-mapped from `.cache/benchmarks` and made there once."""
    folder = CACHE / "benchmarks" / f"{model}-{per_text}x{length}"
    names = [(text, number) for text in TEXTS for number in range(per_text)]
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for (text, number), window in zip(names, windows(model, per_text, length), strict=True):
            for part in ("logits", "tokens", "hidden"):
                np.save(unfinished / f"{text}-{number}-{part}.npy", getattr(window, part))
        unfinished.rename(folder)
    return [
        Window(
            text,
            np.load(folder / f"{text}-{number}-tokens.npy"),
            np.load(folder / f"{text}-{number}-logits.npy", mmap_mode="r"),
            np.load(folder / f"{text}-{number}-hidden.npy"),
        )
        for text, number in names
    ]
