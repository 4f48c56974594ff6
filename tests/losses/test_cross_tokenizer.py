"""From a store captured with one tokenizer to a student with another: batches and training."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import logitstore as ls
from logitstore import losses
from logitstore.corpora.tokenizer import ByteTokenizer
from logitstore.data import retokenizer
from logitstore.spec.errors import AlignmentError, TargetsError
from logitstore.spec.tokenizer_table import TokenizerTable
from logitstore_cli.main import run
from tests.source_tree import REPOSITORY

SEQ_LEN = 48


def tiny_llama(vocab_size: int, seed: int, **options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def store(tmp_path_factory, smollm2_dir, kjv_path):
    """A store of a small random model that reads SmolLM2's tokens, captured by the command."""
    folder = tmp_path_factory.mktemp("cross")
    teacher = folder / "teacher"
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    # Wide weights: distributions that differ from row to row.
    tiny_llama(tokenizer.get_vocab_size(), 0, initializer_range=0.3).save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (smollm2_dir / name).exists():
            shutil.copy(smollm2_dir / name, teacher / name)
    with kjv_path.open(encoding="utf-8") as lines:
        verses = [line for line, _ in zip(lines, range(40), strict=False)]
    # Characters of several bytes, which windows cut.
    verses += ["Zażółć gęślą jaźń — 東京は雨 🙂🙂🙂\n" * 4]
    (folder / "corpus.txt").write_text("".join(verses), encoding="utf-8")
    words = ["precompute", "--teacher", f"hf:{teacher}", "--corpus", str(folder / "corpus.txt")]
    words += ["--document-separator", r"\n", "--signal", "topk:32", "--seq-len", str(SEQ_LEN)]
    words += ["--aux", "byte_end,label_logprob,log_tail,lse", "--threads-per-worker", "1"]
    assert run([*words, "--out", str(folder / "store")]) == 0
    return folder / "store"


@pytest.fixture(scope="module")
def batches(store, word_tokenizer):
    with ls.LogitDataset(store) as dataset:
        plain = list(ls.loader(dataset, batch_size=4))
        convert = retokenizer(dataset.store, word_tokenizer)
        table = TokenizerTable.decode(dataset.store.table("tokenizer.json"), where="table")
        return plain, [convert(batch) for batch in plain], table


def test_both_sides_hold_the_same_text(batches, word_tokenizer):
    plain, own, table = batches
    num_counted = num_cut = 0
    for theirs, ours in zip(plain, own, strict=True):
        assert ours.targets is theirs.targets
        byte_end = theirs.targets.padded().byte_end
        for b, length in enumerate(theirs.targets.lengths.tolist()):
            text = b"".join(table.tokens[i] for i in theirs.tokens[b, :length].tolist())
            assert len(text) == byte_end[b, length - 1]
            predicted = np.zeros(len(text), bool)
            for u in range(length - 1):
                if theirs.loss_mask[b, u]:
                    predicted[byte_end[b, u] : byte_end[b, u + 1]] = True
            held = ours.segment_ids[b] >= 0
            tokens, ends = ours.tokens[b, held].tolist(), ours.byte_end[b, held].tolist()
            for t, token in enumerate(tokens):
                piece = word_tokenizer.table.tokens[token]
                assert text[ends[t] - len(piece) : ends[t]] == piece
                if t and ours.segment_ids[b, t] == ours.segment_ids[b, t - 1]:
                    assert ours.labels[b, t - 1] == token
                    begin = ends[t - 1]
                    assert ours.loss_mask[b, t - 1] == predicted[begin : ends[t]].all()
                    assert ours.position_ids[b, t] == ours.position_ids[b, t - 1] + 1
                elif t:
                    assert ours.labels[b, t - 1] == -100
                    assert ours.position_ids[b, t] == 0
            num_counted += int(ours.loss_mask[b].sum())
            num_cut += len(text) - sum(len(word_tokenizer.table.tokens[i]) for i in tokens)
            assert not ours.loss_mask[b, ~held].any()
    assert num_counted > 500
    # Only bytes of characters that a window cuts are left out.
    assert 0 <= num_cut <= 3 * 2 * sum(len(batch) for batch in plain)


def steps(batches, loss, vocab_size, count=12):
    model = tiny_llama(vocab_size, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    values = []
    for step in range(count):
        batch = batches[step % len(batches)]
        logits = model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask(),
        ).logits
        value = loss(logits, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def gold_loss(logits, batch, **options):
    return losses.gold(
        logits,
        batch.targets,
        labels=batch.labels,
        mask=batch.loss_mask,
        byte_end=batch.byte_end,
        target_mask=batch.target_mask,
        same_bytes=True,
        **options,
    )


def uld_loss(logits, batch):
    return losses.uld(
        logits,
        batch.targets,
        labels=batch.labels,
        mask=batch.loss_mask,
        segment_ids=batch.segment_ids,
        target_mask=batch.target_mask,
        target_segment_ids=batch.target_segment_ids,
    )


@pytest.mark.parametrize("name", ["gold", "gold, hybrid", "uld"])
def test_training_lowers_the_loss(batches, word_tokenizer, name):
    _, own, table = batches
    loss = gold_loss if name.startswith("gold") else uld_loss
    if "hybrid" in name:
        ids = losses.matched_ids(word_tokenizer.table.tokens, table.tokens)

        def loss(logits, batch):
            return gold_loss(logits, batch, matched_ids=ids)

    values = steps(own[:3], loss, len(word_tokenizer.table))
    assert all(np.isfinite(values))
    assert sum(values[-3:]) < 0.9 * sum(values[:3])


def test_the_recipe_of_the_page_runs(store, word_tokenizer):
    page = (REPOSITORY / "docs" / "losses" / "gold.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```python with-store\n(.*?)^```$", page, re.M | re.S)
    model = tiny_llama(len(word_tokenizer.table), 2)
    names = {
        "STORE": store,
        "student_tokenizer": PreTrainedTokenizerFast(tokenizer_object=word_tokenizer._backend),
        "student": lambda tokens, positions, attention: (
            model(input_ids=tokens, position_ids=positions, attention_mask=attention).logits
        ),
    }
    exec(compile(recipe, "gold.md", "exec"), names)
    assert all(p.grad is not None for p in model.parameters())
    assert names["loss"] > 0
    names["dataset"].close()


def pushed(folder, texts, byte_ends):
    """A store over bytes whose samples are given texts and offsets."""
    table = ByteTokenizer().table
    rng = np.random.default_rng(0)
    with ls.writer(
        folder, signal="topk:4", vocab_size=256, tokenizer=table, aux=["label_logprob", "byte_end"]
    ) as writer:
        for text, ends in zip(texts, byte_ends, strict=True):
            tokens = np.frombuffer(text, np.uint8)
            writer.add(tokens, rng.standard_normal((len(tokens), 256)), byte_end=ends)
    return folder


def test_characters_cut_by_a_window_are_left_out(tmp_path):
    text = "a東b".encode() + b"\xe6\x9d"
    texts = [text[2:], text]
    folder = pushed(tmp_path / "store", texts, [range(1, len(t) + 1) for t in texts])
    with ls.LogitDataset(folder) as dataset:
        convert = retokenizer(dataset.store, ByteTokenizer(257, bos_id=256))
        (batch,) = map(convert, ls.loader(dataset, batch_size=2))
    assert batch.tokens.tolist() == [[98, 0, 0, 0, 0], [97, *"東".encode(), 98]]
    assert batch.byte_end.tolist() == [[3, 0, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.loss_mask.tolist() == [[False] * 5, [True] * 4 + [False]]


def test_a_beginning_without_text_becomes_the_student_s_own(tmp_path):
    folder = pushed(tmp_path / "store", [b"\0abc"], [[0, 1, 2, 3]])
    with ls.LogitDataset(folder) as dataset:
        convert = retokenizer(dataset.store, ByteTokenizer(257, bos_id=256))
        (batch,) = map(convert, ls.loader(dataset, batch_size=1))
    assert batch.tokens.tolist() == [[256, 97, 98, 99]]
    assert batch.byte_end.tolist() == [[0, 1, 2, 3]]
    assert batch.loss_mask.tolist() == [[True, True, True, False]]


def test_text_that_tokens_do_not_hold_is_refused(tmp_path):
    folder = pushed(tmp_path / "store", [b"abc"], [[2, 3, 4]])
    with ls.LogitDataset(folder) as dataset:
        convert = retokenizer(dataset.store, ByteTokenizer())
        with pytest.raises(AlignmentError, match="2 bytes for id 97") as error:
            convert(next(iter(ls.loader(dataset, batch_size=1))))
        assert error.value.kind == "tokenizer-mismatch"
    with ls.writer(tmp_path / "without", signal="topk:4", vocab_size=256) as writer:
        writer.add(np.arange(5), np.random.default_rng(0).standard_normal((5, 256)))
    with (
        ls.LogitDataset(tmp_path / "without") as dataset,
        pytest.raises(TargetsError, match="--aux byte_end"),
    ):
        retokenizer(dataset.store, ByteTokenizer())
