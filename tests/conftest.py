"""What tests share: real assets, a tiny model, and settings that make runs repeatable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

# Before torch is first imported: the cores are shared, results do not depend on how many there are,
# and nothing may be looked up on a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# A suite started in the background inherits an ignored SIGINT, and so would every command that a
# test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and none refused for being slow on a busy machine.
hypothesis.settings.register_profile("logitstore", deadline=None, derandomize=True)
hypothesis.settings.load_profile("logitstore")

REPOSITORY = Path(__file__).resolve().parent.parent


def fetch(asset: str) -> Path:
    """The path of an asset of `demo/fetch_assets.py`; skips the test where it cannot be had."""
    # In a process of its own: converting the model warns, and warnings are errors here.
    command = [sys.executable, str(REPOSITORY / "demo" / "fetch_assets.py"), asset]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{asset} cannot be fetched here: {done.stderr.strip()}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """A real language model: SmolLM2-135M-Instruct as a transformers folder."""
    return fetch("smollm2")


@pytest.fixture(scope="session")
def kjv_path() -> Path:
    """A real text of one record a line: the King James Bible, 4.4 MB."""
    return fetch("kjv")


@pytest.fixture(scope="session")
def python_docs_dir() -> Path:
    """A folder of real prose and code: the Python documentation's sources, `**/*.rst.txt`."""
    return fetch("python-docs")


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """A folder with Fashion-MNIST's four `*-ubyte.gz` files."""
    return fetch("fashion-mnist")


@pytest.fixture(scope="session")
def tiny_lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a causal model that means nothing but loads and runs in a moment.

    A Llama of 2 layers, 32 wide, with random weights from a fixed seed, and a byte-level BPE
    tokenizer of 320 ids: `<s>` is 0, `</s>` is 1; any text can be encoded.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-lm")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.3,  # wide enough that the next-token distributions are not all alike
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


TRAINING_TEXT = """\
A teacher reads every page once and writes down what it expects of the next word. The students
never meet the teacher. They read its notes, line by line, and learn from how sure it was, not only
from what it said. When a note is long, most of its weight lies in a few words; the rest is a tail
of many small chances. Keep the few exactly, say how heavy the tail is, and nothing is lost.

def expected_next(words, notes):
    for position, word in enumerate(words[:-1]):
        note = notes[position]
        yield position, note.get(words[position + 1], 0.0)

In 1999, 12 students wrote 3,456 lines; in 2024, 78 wrote 90,123. "How much?" they asked.
"""


@pytest.fixture(autouse=True)
def _fork_server_with_this_environment(request: pytest.FixtureRequest) -> None:
    """A fork server keeps the environment it began with; tests that set variables need another."""
    if "monkeypatch" in request.fixturenames:
        # CPython's own tests stop it this way; the next process that needs one starts it.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
