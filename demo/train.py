"""Train one small student from a store, with the labels alone or with the teacher's record.

Runs in a process of its own, so that no teacher can be in it. `demo/run.py` calls it twice:

    python demo/train.py --store STORE --loss ce|kd --out RESULT.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import logitstore as ls

# Learns visibly within minutes on a CPU, and reads the teacher's tokens.
STUDENT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "use_cache": False,
}
HOLDOUT = 0.15


def fresh_student(vocab_size: int, seq_len: int, seed: int) -> Any:
    """A randomly initialised Llama of `STUDENT`'s size."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=seq_len, **STUDENT
    )
    return transformers.LlamaForCausalLM(config)


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    """[B, T, V] for the batch's tokens; segments do not see each other, as at capture."""
    return model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask(),
    ).logits


@torch.no_grad()
def validation_loss(model: Any, dataset: Any, batch_size: int) -> float:
    """Mean cross-entropy, nats per token, over the samples held out."""
    model.eval()
    total, count = 0.0, 0
    for batch in ls.loader(dataset, batch_size=batch_size):
        loss, counted = ls.losses.cross_entropy(
            logits_of(model, batch),
            batch.targets,
            labels=batch.labels,
            mask=batch.loss_mask,
            reduction="sum",
            with_count=True,
        )
        total, count = total + float(loss), count + int(counted)
    model.train()
    return total / count


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and return the figures."""
    torch.set_num_threads(arguments.threads)
    options = {"seed": arguments.seed, "holdout": HOLDOUT}
    samples = ls.LogitDataset(arguments.store, shuffle=True, **options)
    held_out = ls.LogitDataset(arguments.store, split="validation", **options)
    header = samples.header
    assert header.packing is not None
    batch_size = max(1, arguments.step_tokens // header.packing.seq_len)
    model = fresh_student(header.vocab_size, header.packing.seq_len, arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=arguments.steps, pct_start=0.1
    )
    curve = [(0, validation_loss(model, held_out, batch_size))]
    batches = ls.loader(samples, batch_size=batch_size)
    endless = itertools.chain.from_iterable(batches for _ in itertools.count())
    seconds = tokens = 0.0
    for step, batch in zip(range(1, arguments.steps + 1), endless, strict=False):
        start = time.perf_counter()
        student_logits_BTV = logits_of(model, batch)
        if arguments.loss == "ce":
            loss = ls.losses.cross_entropy(
                student_logits_BTV, batch.targets, labels=batch.labels, mask=batch.loss_mask
            )
        else:
            loss = ls.losses.forward_kl(
                student_logits_BTV, batch.targets, mask=batch.loss_mask, missing="ghost"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seconds += time.perf_counter() - start
        tokens += batch.tokens.numel()
        if step % arguments.eval_every == 0 or step == arguments.steps:
            curve.append((step, validation_loss(model, held_out, batch_size)))
            print(
                f"{arguments.loss} step {step}: loss {loss.item():.3f}, "
                f"validation {curve[-1][1]:.3f}",
                file=sys.stderr,
            )
    return {
        "loss": arguments.loss,
        "steps": arguments.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_samples": len(samples),
        "validation_samples": len(held_out),
        "tokens_per_s": tokens / seconds,
        "validation_curve": curve,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--loss", choices=["ce", "kd"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--eval-every", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    result = train(arguments)
    partial = arguments.out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(arguments.out)


if __name__ == "__main__":
    main()
