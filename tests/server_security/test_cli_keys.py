"""`logitstore keys` and `logitstore config`, as an operator types them."""

from __future__ import annotations

import json
import stat

import pytest
from click.testing import CliRunner

from logitstore_cli.main import cli
from logitstore_server.keys import KeyRing


def run(*words: object) -> object:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def keys_file(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_made_listed_used_and_revoked(keys_file) -> None:
    made = run("keys", "create", "--keys-file", keys_file, "--store", "a", "--label", "nightly")
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    assert text.startswith("ls_")
    assert text not in keys_file.read_text()
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600
    found = KeyRing(keys_file).find(text)
    assert found is not None
    assert (found.may_read("a"), found.may_read("b"), found.metrics) == (True, False, False)

    listed = run("keys", "list", "--keys-file", keys_file)
    assert "nightly" in listed.stdout
    assert "valid" in listed.stdout
    assert text not in listed.stdout

    gone = run("keys", "revoke", "--keys-file", keys_file, found.id)
    assert gone.exit_code == 0
    rows = json.loads(run("keys", "list", "--keys-file", keys_file, "--json").stdout)["keys"]
    assert [row["state"] for row in rows] == ["revoked"]


def test_a_key_that_may_nothing_is_a_usage_error(keys_file) -> None:
    refused = run("keys", "create", "--keys-file", keys_file)
    assert refused.exit_code == 2
    assert "--store NAME" in refused.output
    assert not keys_file.exists()


def test_an_unknown_id_is_named(keys_file) -> None:
    run("keys", "create", "--keys-file", keys_file, "--metrics")
    refused = run("keys", "revoke", "--keys-file", keys_file, "abcdefgh")
    assert refused.exception.kind == "key-not-found"
    assert refused.exception.exit_code == 1


def test_the_file_may_stand_in_the_environment(keys_file, monkeypatch) -> None:
    monkeypatch.setenv("LOGITSTORE_SERVER_KEYS_FILE", str(keys_file))
    assert run("keys", "create", "--store", "*", "--days", "3").exit_code == 0
    row = json.loads(run("keys", "list", "--json").stdout)["keys"][0]
    assert row["expires"] is not None


def test_settings_are_shown_with_their_origin(tmp_path, monkeypatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 9000\nstores = ["demo=/data/demo"]\n')
    monkeypatch.setenv("LOGITSTORE_SERVER_WORKERS", "3")
    shown = run("config", "show", "--config", file, "--json")
    assert shown.exit_code == 0, shown.output
    rows = {row["name"]: row for row in json.loads(shown.stdout)["settings"]}
    assert (rows["port"]["value"], rows["port"]["from"]) == (9000, str(file))
    assert (rows["workers"]["value"], rows["workers"]["from"]) == (3, "environment")
    assert rows["host"]["from"] == "default"
    assert rows["stores"]["value"][0]["name"] == "demo"
    table = run("config", "show", "--config", file).stdout
    assert "9000" in table


def test_an_unknown_setting_is_a_usage_error(tmp_path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("prot = 9000\n")
    refused = run("config", "show", "--config", file)
    assert refused.exception.exit_code == 2
    assert refused.exception.got == "prot"
