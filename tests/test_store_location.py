"""One parser for places, and names that cannot lead out of a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitstore import store
from logitstore.spec.commit import ObjectRef
from logitstore.spec.errors import FormatError, LogitstoreError, StorageError, UsageError
from logitstore.spec.paths import check_key
from logitstore.store.connect import connect
from tests.store_report import report


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("/data/st", "local", "/data/st"),
        ("/data/../data/st/", "local", "/data/st"),
        ("file:///data/a%20b", "local", "/data/a b"),
        ("file://localhost/data", "local", "/data"),
        ("s3://bucket/some/prefix/", "object", "s3://bucket/some/prefix"),
        ("gs://bucket", "object", "gs://bucket"),
        ("az://account/container/prefix", "object", "az://account/container/prefix"),
        ("http://host:8640/v1/stores/x/", "http", "http://host:8640/v1/stores/x"),
        ("https://host/x", "http", "https://host/x"),
        ("HTTPS://host/x", "http", "https://host/x"),
        (Path("/data/st"), "local", "/data/st"),
        ("hf://datasets/o/n/st/", "http", "https://hub/datasets/o/n/resolve/main/st"),
        ("hf://datasets/o/n@v1", "http", "https://hub/datasets/o/n/resolve/v1"),
        ("hf://o/n@refs%2Fpr%2F1/a/b", "http", "https://hub/o/n/resolve/refs%2Fpr%2F1/a/b"),
    ],
)
def test_places(text, kind, expected, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub/")
    location = store.parse_location(text)
    assert (location.kind, str(location)) == (kind, expected)
    assert store.parse_location(location) == location


def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(store.parse_location("st")) == str(tmp_path / "st")
    assert str(store.parse_location("~/st")) == "/home/somebody/st"


@pytest.mark.parametrize(
    ("text", "error", "kind"),
    [
        ("", UsageError, "bad-argument"),
        ("a\0b", UsageError, "bad-argument"),
        ("hdfs://host/x", StorageError, "unsupported-url"),
        ("hf://datasets/x", UsageError, "bad-argument"),
        ("hf://x", UsageError, "bad-argument"),
        ("hf://datasets/o//st", UsageError, "bad-argument"),
        ("hf://o/n/../m", UsageError, "bad-argument"),
        ("hf://o/n/st?download=true", UsageError, "bad-argument"),
        ("hf://hf_secret@datasets/o/n", UsageError, "bad-argument"),
        ("s3:///prefix", UsageError, "bad-argument"),
        ("file://elsewhere/x", UsageError, "bad-argument"),
        ("http://host/x?token=1", UsageError, "bad-argument"),
        ("http://host/x#y", UsageError, "bad-argument"),
        ("s3://bucket/../other", UsageError, "bad-argument"),
        ("s3://bucket/%2e%2e/other", UsageError, "bad-argument"),
    ],
)
def test_places_that_cannot_be(text, error, kind):
    with pytest.raises(error) as caught:
        store.parse_location(text)
    assert caught.value.kind == kind


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(UsageError) as caught:
        store.parse_location("https://user:secret@host/x")
    assert "secret" not in str(caught.value)
    assert "user" not in str(caught.value)


def hostile_keys() -> list[str]:
    """Names that lead, or under some reading could lead, out of a store."""
    up = [
        "..",
        ".",
        "...",
        "..\\",
        "%2e%2e",
        "%252e%252e",
        "..%2f",
        "..%5c",
        "\u2025",
        ".. ",
        "..;",
    ]
    targets = ["x", "etc/passwd", "commits/0001-000000.1.json", "store.json"]
    keys = [f"{u}/{t}" for u in up for t in targets]
    keys += [f"shards/{u}/{t}" for u in up for t in targets]
    keys += [f"shards/{t}/{u}" for u in up for t in ("x", "store.json")]
    keys += ["/" + t for t in targets] + ["//host/" + t for t in targets]
    keys += [f"{drive}{t}" for drive in ("C:", "C:/", "C:\\", "c:\\\\") for t in targets]
    keys += [f"file://{t}" for t in targets] + [f"s3://b/{t}" for t in targets]
    keys += [f"shards/{c}x" for c in map(chr, range(33))] + [
        f"shards/x{chr(127)}",
        "shards/x\u202e",
    ]
    keys += [f"shards/x{c}y" for c in "\\:*?\"<>|%~$`!&;'(){}[]^=+,@# \u00e9\u2044\uff0f\uff0e"]
    keys += ["", "/", "a//b", "a/", "/a/", "a/b/c/d/e", "-x", ".hidden", "_x", "a/.b"]
    keys += ["x" * 129, "shards/" + "x" * 200, "\ud800", "a\nb", "a\r\nb", "\0", "shards/x\0.json"]
    return keys


def test_hostile_names_are_refused_everywhere(tmp_path):
    keys = hostile_keys()
    assert len(keys) >= 200
    root = tmp_path / "st"
    (tmp_path / "x").write_bytes(b"outside")
    backend = connect(root)
    for key in keys:
        with pytest.raises(FormatError) as caught:
            check_key(key, where="test")
        assert caught.value.kind == "path-not-allowed"
        for use in (
            lambda key: backend.get(key, limit_bytes=100),
            lambda key: backend.size(key),
            lambda key: backend.get_range(key, 0, 1, size_bytes=7),
            lambda key: backend.create(key, b"data", kind="header"),
            lambda key: backend.delete(key),
            lambda key: backend.create_object(key),
        ):
            with pytest.raises(LogitstoreError):
                use(key)
        with pytest.raises(ValueError, match="name"):
            ObjectRef(name=key, bytes=1, sha256="0" * 64)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    report("paths", f"{len(keys)} names tried in 7 places, 0 escaped")


@pytest.mark.parametrize("key", ["store.json", "commits/0001-000000.1.json", "tables/a-b_c.1"])
def test_plain_names_pass(key):
    assert check_key(key, where="test") == key
