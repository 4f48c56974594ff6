"""`hf:PATH_OR_ID`: a causal language model of transformers.

The backbone runs over whole windows; the output layer is applied to a block of rows at a time, in
float32, so that logits of a whole micro-batch never exist. Segments are kept apart through position
ids that restart, which transformers turns into block-diagonal attention. Neither is taken on trust:
a probe at load compares both with plain runs of the model, and where they differ the plain way is
taken.

Letters: B samples, T positions of each, S of a segment, D hidden size, R rows of a block,
V vocabulary.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitstore.corpora import FastTokenizer, Sample, Tokenizer
from logitstore.spec.errors import TeacherError
from logitstore.spec.header import TeacherInfo
from logitstore.teachers.base import TeacherOptions, block_rows
from logitstore.teachers.folder import LoadedFolder, load_folder

__all__ = ["CausalLM"]

# Largest difference between two ways to the same logits, in standard deviations of the logits.
# Leaks between segments and forgotten scalings are 0.1 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}


class CausalLM:
    """A transformers causal language model with its tokenizer."""

    def __init__(self, loaded: LoadedFolder, tokenizer: Tokenizer) -> None:
        self._loaded = loaded
        self._model = model = loaded.model
        self.tokenizer = tokenizer
        head = model.get_output_embeddings()
        self._head_rows = int(head.weight.shape[0])
        self.vocab_size = min(self._head_rows, len(tokenizer.table))
        self._rows = block_rows(self.vocab_size)
        # A product of half-precision numbers ties two thirds of positions at rank 64.
        self._weight_VD = head.weight[: self.vocab_size].float()
        bias = getattr(head, "bias", None)
        self._bias_V = None if bias is None else bias[: self.vocab_size].float()
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._packs = self._takes_positions and self._probe_packing()
        self._blocks = type(head) is nn.Linear and self._probe_head()
        self.settings: dict[str, str | int] = {
            "block_rows": self._rows,
            "segments": "packed" if self._packs else "apart",
            "head": "blocks" if self._blocks else "whole",
        }

    @classmethod
    def load(cls, name: str, options: TeacherOptions) -> CausalLM:
        """Load weights and tokenizer from a folder, or from the hub's cache or the hub.

        Only safetensors, no code from the model's folder.

        Raises: TeacherError teacher-load; UsageError bad-argument, missing-dependency.
        """
        loaded = load_folder(
            name,
            options,
            architecture="AutoModelForCausalLM",
            expected="a causal language model",
            otherwise="a classifier is captured with --task classification",
        )
        hf_tokenizer = loaded.tokenizer
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TeacherError(
                "teacher-load",
                "its tokenizer has no fast form",
                where=f"hf:{name}",
                got=type(hf_tokenizer).__name__,
                expected="a tokenizer with tokenizer.json",
            )
        bos_id = hf_tokenizer.bos_token_id
        first = hf_tokenizer("a")["input_ids"][:1]
        tokenizer = FastTokenizer(
            backend,
            name=os.path.basename(name.rstrip("/")),
            bos_id=bos_id,
            adds_bos=bos_id is not None and first == [bos_id],
        )
        return cls(loaded, tokenizer)

    def describe(self) -> TeacherInfo:
        return self._loaded.describe(masked_rows=self._head_rows - self.vocab_size)

    @torch.no_grad()
    def blocks(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        tokens_BT = torch.from_numpy(np.stack([s.tokens for s in samples]))
        positions_BT = torch.from_numpy(np.stack([s.position_ids for s in samples]))
        tokens_BT = tokens_BT.to(self._model.device)
        positions_BT = positions_BT.to(self._model.device)
        if self._packs:
            yield from self._run(tokens_BT, positions_BT)
            return
        for tokens_T, positions_T in zip(tokens_BT, positions_BT, strict=True):
            begins = (positions_T == 0).nonzero()[:, 0].tolist()
            for start, stop in zip(begins, [*begins[1:], len(tokens_T)], strict=True):
                yield from self._run(tokens_T[None, start:stop], positions_T[None, start:stop])

    def _run(self, tokens_BT: Tensor, positions_BT: Tensor) -> Iterator[Tensor]:
        if not self._blocks:
            logits_BTV = self._whole(tokens_BT, positions_BT)
            yield from logits_BTV.flatten(0, 1)[:, : self.vocab_size].split(self._rows)
            return
        inputs = self._inputs(tokens_BT, positions_BT)
        hidden_BTD = self._model.base_model(**inputs).last_hidden_state
        for hidden_RD in hidden_BTD.flatten(0, 1).split(self._rows):
            yield self._head(hidden_RD)

    def _inputs(self, tokens_BT: Tensor, positions_BT: Tensor) -> dict[str, Any]:
        # A cache would make transformers ignore that position ids restart.
        inputs: dict[str, Any] = {"input_ids": tokens_BT, "use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = positions_BT
        return inputs

    def _whole(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        logits: Tensor = self._model(**self._inputs(tokens_BT, positions_BT)).logits
        return logits

    def _head(self, hidden_RD: Tensor) -> Tensor:
        """The output layer with the scalings that models put behind it."""
        config = self._model.config.get_text_config()
        logits_RV = F.linear(hidden_RD.float(), self._weight_VD, self._bias_V)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits_RV *= scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits_RV /= scale
        if scale := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
            logits_RV *= scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits_RV = torch.tanh(logits_RV / cap) * cap
        return logits_RV

    @torch.no_grad()
    def _probe_packing(self) -> bool:
        """Whether two segments in one window give what each gives alone."""
        first_S, second_S = self._probe_tokens()
        tokens_BT = torch.cat([first_S, second_S])[None]
        positions_BT = torch.cat([torch.arange(len(s)) for s in (first_S, second_S)])[None]
        packed_TV = self._whole(tokens_BT, positions_BT.to(tokens_BT.device))[0]
        apart_TV = torch.cat(
            [
                self._whole(s[None], torch.arange(len(s), device=s.device)[None])[0]
                for s in (first_S, second_S)
            ]
        )
        return self._same(packed_TV, apart_TV)

    @torch.no_grad()
    def _probe_head(self) -> bool:
        """Whether backbone, output layer and scalings by hand give what the model gives."""
        tokens_BT = self._probe_tokens()[0][None]
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        inputs = self._inputs(tokens_BT, positions_BT)
        try:
            hidden_TD = self._model.base_model(**inputs).last_hidden_state[0]
            by_hand_TV = self._head(hidden_TD)
        except (TypeError, AttributeError, RuntimeError):
            return False
        whole_TV = self._whole(tokens_BT, positions_BT)[0, :, : self.vocab_size]
        return self._same(by_hand_TV, whole_TV)

    def _probe_tokens(self) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(1, 24, device=self._model.device) * 7919 % self.vocab_size
        return tokens[:12], tokens[12:]

    def _same(self, one: Tensor, other: Tensor) -> bool:
        difference = (one.float() - other.float()).abs().max() / other.float().std()
        return bool(difference <= _TOLERANCE.get(self._model.dtype, 1e-3))
