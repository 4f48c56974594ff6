"""Damaged files of every kind: the viewer goes on, names the file and tells what to do."""

from __future__ import annotations

import html
import shutil

import pytest
from starlette.testclient import TestClient

from logitstore import store
from logitstore.spec.errors import LogitstoreError
from logitstore_cli.commands.view import OpenedStores
from logitstore_cli.main import run
from logitstore_server.viewer import viewer_app
from tests.viewer.viewed import push


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An unsealed and a sealed store of four shards, equal but for the index."""
    folder = tmp_path_factory.mktemp("sound")
    push(folder / "unsealed", "topk:8")
    shutil.copytree(folder / "unsealed", folder / "sealed")
    assert run(["seal", str(folder / "sealed"), "--quiet"]) == 0
    return folder


def flip(path):
    """One byte, in an object one of the first kilobyte: there its first chunk is."""
    data = bytearray(path.read_bytes())
    data[min(len(data) // 2, 700)] ^= 0x21
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "gone": lambda path: path.unlink(),
}


def first(place, pattern):
    return sorted(place.glob(pattern))[0]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("state", ["unsealed", "sealed"])
@pytest.mark.parametrize("pattern", ["commits/*", "tables/*", "shards/*", "plans/*", "index.json"])
def test_the_rest_stays_browsable_and_the_file_is_named(sound, tmp_path, state, pattern, how):
    if pattern == "index.json" and state == "unsealed":
        pytest.skip("an unsealed store has no index")
    place = tmp_path / "st"
    shutil.copytree(sound / state, place)
    path = first(place, pattern)
    DAMAGE[how](path)
    if how == "gone" and (pattern, state) in {("index.json", "sealed"), ("commits/*", "unsealed")}:
        pytest.skip("nobody can know that it was there")
    opened = OpenedStores((str(place),))
    client = TestClient(viewer_app(opened))
    pages = [f"/stores/st/samples/{i}" for i in range(len(opened["st"]))]
    texts = {page: client.get(page) for page in pages}
    told = [client.get(page) for page in ("/stores/st/overview", "/stores/st/find?key=x%231@0")]
    told.append(client.get(f"/stores/st/shards/{opened['st'].shards[0].shard}?check=1"))
    assert [answer.status_code for answer in told] == [200, 200, 200]
    readable = sum(answer.status_code == 200 for answer in texts.values())
    # Samples of the first shard; a flipped byte of its object harms one of two chunks.
    lost = {"commits/*": 2, "shards/*": 1 if how == "flipped" else 2}.get(pattern, 0)
    assert readable == 4 - lost
    named = [a.text for a in (*told, *texts.values()) if path.name in html.unescape(a.text)]
    assert named
    assert any(f"logitstore verify {place} --full" in text for text in named)
    opened.close()


@pytest.mark.parametrize("state", ["unsealed", "sealed"])
def test_a_damaged_header_is_named_at_once(sound, tmp_path, capsys, state):
    place = tmp_path / "st"
    shutil.copytree(sound / state, place)
    flip(place / "store.json")
    assert run(["view", str(place), "--no-browser", "--port", "0"]) != 0
    said = capsys.readouterr().err
    assert "store.json" in said
    assert "Traceback" not in said


def test_training_never_opens_what_is_damaged(sound, tmp_path):
    place = tmp_path / "st"
    shutil.copytree(sound / "unsealed", place)
    flip(first(place, "commits/*"))
    with pytest.raises(LogitstoreError):
        store.open(place)
    with store.open(place, tolerant=True) as looked:
        assert len(looked.damage) == 1
        assert len(looked.refresh().damage) == 1
