"""Settings: which source wins, what is refused, and what a message may say."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from logitstore.spec.errors import UsageError
from logitstore_server.settings import ENV_PREFIX, ServerSettings, StoreEntry, load_settings


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1\nworkers = 2\nlog-level = 'error'\n")
    environment = {"LOGITSTORE_SERVER_PORT": "3", "LOGITSTORE_SERVER_WORKERS": "4", "OTHER": "x"}
    flags = {"port": 5, "host": None}
    loaded = load_settings(flags, file=file, environment=environment)
    assert (loaded.settings.port, loaded.origins["port"]) == (5, "flag")
    assert (loaded.settings.workers, loaded.origins["workers"]) == (4, "environment")
    assert (loaded.settings.log_level, loaded.origins["log_level"]) == ("error", str(file))
    assert (loaded.settings.host, loaded.origins["host"]) == ("127.0.0.1", "default")


def test_values_never_depend_on_where_settings_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITSTORE_SERVER_PORT", "3")
    assert ServerSettings().port == 8640
    assert load_settings().settings.port == 3


def test_settings_reach_worker_processes() -> None:
    settings = ServerSettings(stores=["a=/data/a"], trusted_proxies=["10.0.0.0/8"])
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301, as multiprocessing does


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo=s3://bucket/demo", StoreEntry(name="demo", location="s3://bucket/demo")),
        ("/data/demo/", StoreEntry(name="demo", location="/data/demo")),
        ("https://host/x=y/demo", StoreEntry(name="demo", location="https://host/x=y/demo")),
        (
            {"name": "d", "location": "/data/x", "public": True},
            StoreEntry(name="d", location="/data/x", public=True),
        ),
    ],
)
def test_forms_of_a_store(text: Any, expected: StoreEntry) -> None:
    assert ServerSettings(stores=[text]).stores == (expected,)


def test_lists_of_the_environment() -> None:
    environment = {
        "LOGITSTORE_SERVER_STORES": "a=/x, b=/y",
        "LOGITSTORE_SERVER_ALLOW_HOSTS": '["one", "two"]',
    }
    settings = load_settings(environment=environment).settings
    assert [entry.name for entry in settings.stores] == ["a", "b"]
    assert settings.allow_hosts == ("one", "two")


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_unknown_names_are_errors_in_a_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"server.{suffix}"
    file.write_text("prot = 1\n" if suffix == "toml" else "prot: 1\n")
    with pytest.raises(UsageError, match=r"got: prot\n.*\n.*did you mean port\?") as caught:
        load_settings(file=file)
    assert str(file) in caught.value.message


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({}, {"LOGITSTORE_SERVER_WORKER": "2"}, "LOGITSTORE_SERVER_WORKER\n"),
        ({"nonsense": 1}, {}, "no such setting"),
        ({"port": "x"}, {}, r"port \(flag\): .*integer"),
        ({}, {"LOGITSTORE_SERVER_WORKERS": "0"}, r"workers \(environment\): .*greater"),
        ({"stores": ["a=/x", "a=/y"]}, {}, "two stores have the name 'a'"),
        ({"stores": ["x y=/y"]}, {}, r"stores\.0"),
        ({"stores": [{"name": "a", "location": "/x", "pubic": True}]}, {}, "pubic"),
        ({"trusted_proxies": ["nearby"]}, {}, "nearby"),
        ({"cors_origins": ["*"], "stores": ["a=/x"]}, {}, "beside a private store"),
    ],
)
def test_what_cannot_be_used_is_refused(
    flags: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_settings(flags, environment=environment)


def test_messages_leave_passwords_out() -> None:
    with pytest.raises(UsageError, match="carries credentials") as caught:
        load_settings({"stores": ["a=https://user:hunter2@host/store"]})
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("content", [b"[", b"- a\n", b"\xff"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "server.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"server\.yaml"):
        load_settings(file=file)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    ServerSettings(host=host).require_safe_bind()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-machine"])
def test_a_network_needs_keys_and_names(host: str, tmp_path: Path) -> None:
    names = {"allow_hosts": ["my-machine"]}
    with pytest.raises(UsageError, match="allow-public-without-keys"):
        ServerSettings(host=host, **names).require_safe_bind()
    ServerSettings(host=host, **names, allow_public_without_keys=True).require_safe_bind()
    ServerSettings(host=host, **names, keys_file=tmp_path / "keys").require_safe_bind()
    with pytest.raises(UsageError, match="allow_hosts"):
        ServerSettings(host=host, keys_file=tmp_path / "keys").require_safe_bind()


def test_every_setting_says_what_it_means() -> None:
    lacking = [
        name
        for name, field in ServerSettings.model_fields.items()
        if not field.description and name != "log_level"
    ]
    assert lacking == []
    assert ENV_PREFIX == "LOGITSTORE_SERVER_"
