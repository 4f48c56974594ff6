"""What the service can be told: by flag, environment variable, file, or not at all.

    settings = load_settings({"port": 8641}, file="server.toml").settings

A flag wins over `LOGITSTORE_SERVER_<NAME>` in the environment, that over the file, that over the
default. Unknown names are errors wherever they stand.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from logitstore.spec.errors import LogitstoreError, UsageError
from logitstore.store import parse_location

__all__ = ["ENV_PREFIX", "LoadedSettings", "ServerSettings", "StoreEntry", "load_settings"]

ENV_PREFIX = "LOGITSTORE_SERVER_"
STORE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


class StoreEntry(BaseModel):
    """One store that the service may open. Written as a table, `NAME=LOCATION` or `LOCATION`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=f"^{STORE_NAME}$", description="Its name in URLs.")
    location: str = Field(description="Folder or URL: s3://, gs://, az://, http(s)://.")
    public: bool = Field(default=False, description="Readable without a key.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, separator, location = value.partition("=")
        if separator and "/" not in name:
            return {"name": name, "location": location}
        return {"name": value.rstrip("/").rpartition("/")[2], "location": value}

    @field_validator("location")
    @classmethod
    def _parsed(cls, value: str) -> str:
        try:
            return str(parse_location(value))
        except LogitstoreError as error:
            # Its message leaves credentials out.
            raise ValueError(error.message) from None


def _split(value: Any) -> Any:
    """A list from the environment: JSON, or words with commas between them."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [word.strip() for word in value.split(",") if word.strip()]


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class ServerSettings(BaseSettings):
    """Everything the service can be told. Built from keywords only; `load_settings` reads sources.

    Limits hold for one worker process, except where a description says otherwise.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    stores: Annotated[tuple[StoreEntry, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="The stores to serve; nothing else is ever opened."
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8640, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    workers: int = Field(default=1, ge=1, le=256, description="Worker processes.")

    keys_file: Path | None = Field(
        default=None, description="File of hashed keys; without it no key is asked for."
    )
    allow_public_without_keys: bool = Field(
        default=False, description="Listen on other than loopback addresses without keys."
    )
    session_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="Signs what browsers keep after a login; the same on machines behind one name. "
        "Default: random at each start.",
    )
    session_s: int = Field(default=8 * 3600, ge=1, description="How long a login lasts.")
    failed_keys_per_minute: int = Field(
        default=30, ge=1, description="Wrong keys that one address may send before it must wait."
    )
    allow_hosts: Words = Field(
        default=(), description="Host names to answer to besides loopback; `*` for all."
    )
    trusted_proxies: Words = Field(
        default=(), description="Addresses or networks whose X-Forwarded-* headers count."
    )
    cors_origins: Words = Field(
        default=(), description="Origins whose pages may read; none by default, no credentials."
    )

    requests_per_s: float = Field(
        default=0, ge=0, description="Of one key, in bursts of ten seconds; 0: no limit."
    )
    max_streams: int = Field(default=256, ge=1, description="Requests in flight.")
    max_streams_per_key: int = Field(default=64, ge=1, description="Requests in flight of one key.")
    max_connections: int = Field(default=1024, ge=1, description="Open connections.")
    max_body_bytes: int = Field(default=1 << 20, ge=0, description="Largest request body.")
    max_head_bytes: int = Field(
        default=32 << 10, ge=1024, description="Largest request line with its headers."
    )
    max_ranges: int = Field(default=16, ge=1, description="Ranges of one request.")
    max_samples: int = Field(default=65_536, ge=1, description="Samples of one request.")

    head_timeout_s: float = Field(
        default=10, gt=0, description="From connecting to the end of the headers."
    )
    body_timeout_s: float = Field(default=30, gt=0, description="To send a request body.")
    keep_alive_s: float = Field(default=60, gt=0, description="Idle between two requests.")
    min_send_bytes_per_s: float = Field(
        default=1024, gt=0, description="Slower readers are dropped after send_window_s."
    )
    send_window_s: float = Field(
        default=20, gt=0, description="Time over which min_send_bytes_per_s is measured."
    )
    shutdown_delay_s: float = Field(
        default=2, ge=0, description="Between /readyz turning false and the port closing."
    )
    drain_timeout_s: float = Field(
        default=20, ge=0, description="For requests in flight to finish after the port closed."
    )

    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="auto: text on a terminal, JSON lines elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info")
    metrics_dir: Path | None = Field(
        default=None,
        description="Empty folder where several workers add up their metrics; default: temporary.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Keywords alone, so that a value never depends on where it was built.
        return (init_settings,)

    @field_validator("stores")
    @classmethod
    def _distinct(cls, value: tuple[StoreEntry, ...]) -> tuple[StoreEntry, ...]:
        names = [entry.name for entry in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stores have the name {name!r}")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(text, strict=False)) for text in value)

    @model_validator(mode="after")
    def _safe(self) -> ServerSettings:
        if "*" in self.cors_origins and any(not entry.public for entry in self.stores):
            raise ValueError("cors_origins '*' beside a private store: name the origins")
        return self

    @property
    def listens_on_loopback(self) -> bool:
        """Whether only processes of this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def require_safe_bind(self) -> None:
        """Refuse to listen on a network without keys, or without a list of host names.

        Raises: UsageError unsafe-bind.
        """
        if self.listens_on_loopback:
            return
        if self.keys_file is None and not self.allow_public_without_keys:
            raise UsageError(
                "unsafe-bind",
                "every machine that reaches this address could read every store",
                where="host",
                got=f"{self.host} without a keys file",
                expected="--keys-file FILE, or a loopback address",
                hint="make a key with `logitstore keys create`, or say --allow-public-without-keys",
            )
        if not self.allow_hosts:
            raise UsageError(
                "unsafe-bind",
                "the names that this service is reached by are not known",
                where="allow_hosts",
                got=f"none, with host {self.host}",
                expected="--allow-host NAME for each name",
                hint="pages of other sites could otherwise reach it through a name of theirs; "
                "'*' allows every name",
            )


@dataclass(frozen=True)
class LoadedSettings:
    """Settings and where each came from: "flag", "environment", the file's path, or "default"."""

    settings: ServerSettings
    origins: Mapping[str, str]


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """The effective settings.

    Args:
        flags: settings by name; None means not given.
        file: TOML or YAML; keys are the names of the settings, with `-` or `_`.
        environment: instead of `os.environ`.

    Raises: UsageError bad-argument: an unknown name or a bad value, with where it stands.
    """
    environment = os.environ if environment is None else environment
    sources = [
        ("flag", {key: value for key, value in (flags or {}).items() if value is not None}),
        ("environment", _from_environment(environment)),
        (str(file), _from_file(Path(file)) if file is not None else {}),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(ServerSettings.model_fields, "default")
    for origin, given in reversed(sources):
        for name, value in given.items():
            if name not in ServerSettings.model_fields:
                raise _unknown(name, origin)
            values[name] = value
            origins[name] = origin
    try:
        return LoadedSettings(ServerSettings(**values), origins)
    except ValidationError as error:
        raise _bad_value(error, origins) from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        key.removeprefix(ENV_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENV_PREFIX)
    }


def _from_file(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError("bad-argument", f"cannot be read: {error.strerror}", where=path) from None
    try:
        content = tomllib.loads(data.decode()) if path.suffix == ".toml" else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(
            "bad-argument", f"cannot be parsed: {error}", where=path, expected="TOML or YAML"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(
            "bad-argument", "holds no settings", where=path, expected="lines such as `port: 8640`"
        )
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _unknown(name: str, origin: str) -> UsageError:
    near = difflib.get_close_matches(name, ServerSettings.model_fields, 1)
    shown = ENV_PREFIX + name.upper() if origin == "environment" else name
    return UsageError(
        "bad-argument",
        "no such setting of the service",
        where=origin,
        got=shown,
        expected="a setting that `logitstore config show` lists",
        hint=f"did you mean {near[0]}?" if near else None,
    )


def _bad_value(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    # The values themselves stay out of the message: one may be a URL with a password.
    problems = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        path = ".".join(str(part) for part in problem["loc"])
        name = str(problem["loc"][0]) if problem["loc"] else ""
        origin = f" ({origins[name]})" if name in origins else ""
        problems.append(f"{path}{origin}: {problem['msg']}" if path else problem["msg"])
    return UsageError(
        "bad-argument",
        "settings of the service cannot be used",
        got="; ".join(problems),
        hint="`logitstore config show` lists the settings, their values and their meaning",
    )
