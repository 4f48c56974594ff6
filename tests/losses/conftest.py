"""Two real tokenizers that share no id."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from logitstore.corpora.tokenizer import FastTokenizer


@pytest.fixture(scope="session")
def word_tokenizer(kjv_path):
    """A byte-level BPE with 2,000 ids of its own, trained on the King James Bible."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with kjv_path.open(encoding="utf-8") as lines:
        bpe.train_from_iterator(
            [line for line, _ in zip(lines, range(2000), strict=False)], trainer
        )
    return FastTokenizer(bpe, name="kjv", bos_id=0, adds_bos=False)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir):
    backend = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return FastTokenizer(backend, name="smollm2", bos_id=None, adds_bos=False)
