"""The file of keys, and recognising a key."""

from __future__ import annotations

import datetime as dt
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitstore.spec.errors import NotFoundError, StorageError
from logitstore_server.keys import KeyRing, create_key, read_keys, revoke_key
from tests.server_security.conftest import Keys

LATER = dt.datetime(2999, 1, 1, tzinfo=dt.UTC)
EARLIER = dt.datetime(1999, 1, 1, tzinfo=dt.UTC)


def make(file: Path, expires: dt.datetime | None = None, label: str = "x") -> tuple[str, str]:
    text, key = create_key(file, label=label, stores=["a"], metrics=False, expires=expires)
    return text, key.id


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    text, key_id = make(file, label="trainer")
    assert text.startswith(f"ls_{key_id}_")
    secret = text.removeprefix(f"ls_{key_id}_")
    assert len(secret) == 43  # 256 bits in base64
    content = file.read_text()
    assert secret not in content
    assert json.loads(content)["keys"][0]["label"] == "trainer"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_keys_are_found_by_all_of_their_text(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    text, key_id = make(file)
    ring = KeyRing(file)
    found = ring.find(text)
    assert found is not None
    assert found.id == key_id
    wrong = "A" if text[-1] != "A" else "B"
    for other in [
        text[:-1],
        text[:-1] + wrong,
        text + "A",
        key_id,
        f"ls_{key_id}_",
        "",
        "ls_",
        "é",
    ]:
        assert ring.find(other) is None


def test_expired_and_revoked_keys_are_unknown(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    expired, _ = make(file, expires=EARLIER)
    valid, valid_id = make(file, expires=LATER)
    # As each of several workers does, this one has read the file before it changes.
    ring = KeyRing(file)
    assert ring.find(expired) is None
    assert ring.find(valid) is not None
    revoke_key(file, valid_id)
    assert ring.find(valid) is None
    newer, _ = make(file)
    assert ring.find(newer) is not None
    states = [key.state(dt.datetime.now(dt.UTC)) for key in read_keys(file)]
    assert states == ["expired", "revoked", "valid"]


def test_revoking_twice_keeps_the_first_time(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, key_id = make(file)
    first = revoke_key(file, key_id).revoked
    assert first is not None
    assert revoke_key(file, key_id).revoked == first
    with pytest.raises(NotFoundError, match="no key has this id"):
        revoke_key(file, "aaaaaaaa")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602, 0o601])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "keys.json"
    text, _ = make(file)
    file.chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        KeyRing(file).find(text)


def test_rewriting_keeps_the_mode_that_the_owner_chose(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    make(file)
    file.chmod(0o640)
    make(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2, "keys": []}', '{"keys": [{"id": "x"}]}', '{"kyes": []}']
)
def test_a_malformed_file_denies_everything(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    text, _ = make(file)
    ring = KeyRing(file)
    assert ring.find(text) is not None
    file.write_text(content)
    for _ in range(2):  # not only the first time
        with pytest.raises(StorageError, match=r"keys-file.*malformed"):
            ring.find(text)
    file.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        ring.find(text)


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    # Each call opens the folder anew, so its lock keeps threads apart as it does processes.
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make(file)[1], range(32)))
    assert sorted(key.id for key in read_keys(file)) == sorted(made)


def test_scopes(keys: Keys) -> None:
    ring = KeyRing(keys.file)
    alpha, everything = ring.find(keys.alpha), ring.find(keys.all)
    assert alpha is not None
    assert everything is not None
    assert alpha.may_read("alpha")
    assert not alpha.may_read("beta")
    assert not alpha.may_read("*")
    assert everything.may_read("beta")
    assert not everything.metrics
