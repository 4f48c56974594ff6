"""Teachers: the same logits as the plain model, whatever is done to save memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstore.corpora import Sample
from logitstore.spec.errors import TeacherError, UsageError
from logitstore.teachers import TeacherOptions, load_teacher
from logitstore.teachers.base import block_rows
from logitstore.teachers.causal_lm import CausalLM

OPTIONS = TeacherOptions(dtype="float32", device="cpu", threads=1)


def sample(*segments: list[int]) -> Sample:
    lengths = [len(s) for s in segments]
    tokens = np.concatenate([np.asarray(s, np.int64) for s in segments])
    return Sample("k", tokens, np.repeat(np.arange(len(segments)), lengths), np.zeros(len(tokens)))


def logits(teacher, *samples: Sample) -> torch.Tensor:
    return torch.cat(list(teacher.blocks(samples)))


@pytest.fixture(scope="module")
def tiny(tiny_lm_dir):
    return load_teacher(f"hf:{tiny_lm_dir}", OPTIONS)


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def test_a_packed_window_gives_what_separate_documents_give(tiny, tiny_lm_dir):
    segments = [[5, 9, 200, 7], [3], [250, 17, 17, 4, 90, 6, 8]]
    model = model_of(tiny_lm_dir)
    expected = torch.cat([model(torch.tensor([s])).logits[0] for s in segments])
    assert tiny.settings["segments"] == "packed"
    torch.testing.assert_close(logits(tiny, sample(*segments)), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_segments_are_run_apart_when_packing_is_not_honoured(tiny_lm_dir, monkeypatch):
    """A model that ignores restarting position ids is noticed, and each segment run alone."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    teacher = load_teacher(f"hf:{tiny_lm_dir}", OPTIONS)
    assert teacher.settings["segments"] == "apart"
    segments = [[5, 9, 200, 7], [250, 17, 17, 4, 90, 6, 8]]
    model = model_of(tiny_lm_dir)
    expected = torch.cat([model(torch.tensor([s])).logits[0] for s in segments])
    torch.testing.assert_close(logits(teacher, sample(*segments)), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_follow_positions_and_never_hold_the_whole_batch(tiny, tiny_lm_dir, monkeypatch):
    monkeypatch.setattr(tiny, "_rows", 7)
    tokens = np.arange(2 * 20).reshape(2, 20) % 300
    blocks = list(tiny.blocks([sample(list(row)) for row in tokens]))
    assert [len(b) for b in blocks] == [7, 7, 7, 7, 7, 5]
    expected = model_of(tiny_lm_dir)(torch.tensor(tokens)).logits.flatten(0, 1)
    torch.testing.assert_close(torch.cat(blocks), expected, atol=2e-5, rtol=1e-5)


def tiny_config(kind: str):
    import transformers as tf

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return {
        "gemma2": lambda: tf.Gemma2Config(
            vocab_size=384, head_dim=8, final_logit_softcapping=3.0, sliding_window=4, **shape
        ),
        "cohere": lambda: tf.CohereConfig(vocab_size=384, logit_scale=0.25, **shape),
        "granite": lambda: tf.GraniteConfig(vocab_size=384, logits_scaling=4.0, **shape),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
        ),
    }[kind]()


def folder_of(kind, tiny_lm_dir, tmp_path):
    """A folder with the tiny tokenizer (320 ids) and a random model of another family, 384 rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(tiny_config(kind))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_lm_dir).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt2"])
def test_scaled_capped_and_padded_output_layers(kind, tiny_lm_dir, tmp_path):
    """Scalings behind the output layer are applied; rows beyond the tokenizer are masked."""
    folder = folder_of(kind, tiny_lm_dir, tmp_path)
    teacher = load_teacher(f"hf:{folder}", OPTIONS)
    assert teacher.settings["head"] == "blocks"
    assert teacher.settings["segments"] == "packed"
    assert teacher.vocab_size == 320
    assert teacher.describe().masked_rows == 64
    segments = [list(range(3, 15)), [9, 8, 7, 6, 5, 4, 3]]
    model = model_of(folder)
    expected = torch.cat([model(torch.tensor([s])).logits[0, :, :320] for s in segments])
    torch.testing.assert_close(logits(teacher, sample(*segments)), expected, atol=1e-4, rtol=1e-4)


def test_a_language_model_without_its_head_is_refused(tiny_lm_dir, tmp_path):
    """transformers would make the head up at random, and warn."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    config = LlamaConfig.from_pretrained(tiny_lm_dir, tie_word_embeddings=False)
    LlamaModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_lm_dir).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"lm_head\.weight") as caught:
        load_teacher(f"hf:{tmp_path}", OPTIONS)
    assert caught.value.kind == "teacher-load"


@torch.no_grad()
def test_an_unknown_scaling_is_noticed_and_the_whole_model_used(tiny_lm_dir, tmp_path, monkeypatch):
    folder = folder_of("gemma2", tiny_lm_dir, tmp_path)
    monkeypatch.setattr(
        CausalLM,
        "_head",
        lambda self, hidden: torch.nn.functional.linear(hidden.float(), self._weight_VD),
    )
    teacher = load_teacher(f"hf:{folder}", OPTIONS)
    assert teacher.settings["head"] == "whole"
    tokens = list(range(3, 15))
    expected = model_of(folder)(torch.tensor([tokens])).logits[0, :, :320]
    torch.testing.assert_close(logits(teacher, sample(tokens)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_weights_get_a_float32_output_layer(tiny_lm_dir):
    options = TeacherOptions(dtype="bfloat16", device="cpu", threads=1)
    teacher = load_teacher(f"hf:{tiny_lm_dir}", options)
    assert teacher.describe().compute_dtype == "bfloat16"
    found = logits(teacher, sample(list(range(2, 40))))
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).float().mean() > 0.9


def test_describe_is_of_the_weights_content(tiny, tiny_lm_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    info = tiny.describe()
    assert info.engine == "transformers"
    assert info.threads_per_worker == 1
    for path in tiny_lm_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load_teacher(f"hf:{tmp_path}", OPTIONS).describe().fingerprint == info.fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_teacher(f"hf:{tmp_path}", OPTIONS).describe().fingerprint != info.fingerprint


def test_a_real_model_in_blocks_and_packed_equals_itself(smollm2_dir):
    teacher = load_teacher(f"hf:{smollm2_dir}", OPTIONS)
    assert teacher.settings["head"] == "blocks"
    assert teacher.settings["segments"] == "packed"
    assert teacher.tokenizer.bos_id == 1
    assert not teacher.tokenizer.adds_bos
    ids = teacher.tokenizer.encode("In the beginning God created the heaven and the earth.").ids
    alone = torch.cat(list(teacher.blocks([sample(list(ids))])))
    packed = torch.cat(list(teacher.blocks([sample(list(range(50, 60)), list(ids))])))[10:]
    torch.testing.assert_close(packed, alone, atol=1e-3, rtol=1e-4)
    nll = torch.nn.functional.cross_entropy(alone[:-1], torch.from_numpy(ids)[1:])
    assert nll < 5.0  # a uniform guess has 10.8


def test_what_cannot_be_loaded_says_why(tmp_path, tiny_lm_dir):
    for name, says in [
        (f"hf:{tmp_path}/nowhere", "no such folder"),
        (f"hf:{tmp_path}", "no safetensors"),
        ("py:no_such_module_here:f", "ModuleNotFoundError"),
        ("py:json:loads", "TypeError"),
    ]:
        with pytest.raises(TeacherError, match=says) as caught:
            load_teacher(name, OPTIONS)
        assert caught.value.kind == "teacher-load"
    with pytest.raises(UsageError, match="did you mean hf:models/x"):
        load_teacher("models/x", OPTIONS)
    with pytest.raises(UsageError, match="no such dtype"):
        TeacherOptions(dtype="int4")  # whatever the teacher: a py: one as well
    with pytest.raises(TeacherError, match="device"):
        load_teacher(f"hf:{tiny_lm_dir}", TeacherOptions(device="warp"))


def test_code_in_a_models_folder_is_never_run(tiny_lm_dir, tmp_path):
    for path in tiny_lm_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = (tmp_path / "config.json").read_text()
    config = config.replace('"model_type": "llama"', '"model_type": "evil"').replace(
        "{", '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},', 1
    )
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(TeacherError) as caught:
        load_teacher(f"hf:{tmp_path}", OPTIONS)
    assert caught.value.kind == "teacher-load"
    assert not marker.exists()


PY_TEACHER = """
import torch

class Bytes:
    vocab_size = 260
    bos_id = 256
    fingerprint = "one"

    def __call__(self, tokens, segment_ids):
        shape = (*tokens.shape, WIDTH)
        return torch.arange(tokens.numel()).reshape(*tokens.shape, 1).expand(shape).float()

def teacher():
    return Bytes()
"""


def test_a_function_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "py_teacher_ok.py").write_text(PY_TEACHER.replace("WIDTH", "260"))
    teacher = load_teacher("py:py_teacher_ok:teacher", OPTIONS)
    assert teacher.vocab_size == 260
    assert teacher.tokenizer.bos_id == 256
    assert teacher.describe().fingerprint
    found = logits(teacher, sample([1, 2]), sample([3, 4]))
    assert found[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    (tmp_path / "py_teacher_wide.py").write_text(PY_TEACHER.replace("WIDTH", "261"))
    with pytest.raises(TeacherError, match="261") as caught:
        logits(load_teacher("py:py_teacher_wide:teacher", OPTIONS), sample([1, 2]))
    assert caught.value.kind == "teacher-shape"


def test_block_size_is_a_function_of_the_vocabulary():
    assert block_rows(49_152) == 341
    assert block_rows(10_000_000) == 16
