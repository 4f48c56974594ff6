"""docker-compose.yml, the Dockerfile and .env.example hold what docs/serving.md promises."""

from __future__ import annotations

import fnmatch
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from logitstore.spec.errors import LogitstoreError
from logitstore_server.keys import KeyRing
from logitstore_server.serving import serve
from logitstore_server.settings import ENV_PREFIX, ServerSettings, load_settings
from tests.source_tree import REPOSITORY

COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Jobs that end by themselves.
ONE_SHOT = {"bucket", "precompute"}
DOCKERFILE = (REPOSITORY / "server/Dockerfile").read_text()
PINNED = re.compile(r"[a-z0-9./-]+:(?!latest)[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}")

each_service = pytest.mark.parametrize("name", SERVICES)


def test_the_linter_finds_nothing() -> None:
    command = [sys.executable, "-m", "compose_lint", "check", "--no-env", "--format", "json"]
    command += ["--fail-on", "low", "docker-compose.yml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "version" not in COMPOSE


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text()
    (tmp_path / "docker-compose.yml").write_text(
        text.replace("cap_drop: [ALL]", "privileged: true")
    )
    command = [sys.executable, "-m", "compose_lint", "check", "--no-env", "docker-compose.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr


def test_services_and_profiles() -> None:
    plain = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert plain == {"serve", "s3", "bucket", "prometheus", "grafana"}
    assert SERVICES["nginx"]["profiles"] == ["edge"]
    assert SERVICES["precompute"]["profiles"] == ["precompute"]


@each_service
def test_image_is_built_here_or_pinned_by_tag_and_digest(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert "image" not in service
        assert f" AS {service['build']['target']}\n" in DOCKERFILE
    else:
        assert PINNED.fullmatch(service["image"])


@each_service
def test_container_can_change_nothing_but_its_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    (tmp,) = service["tmpfs"]
    path, _, options = tmp.partition(":")
    assert path == "/tmp"
    assert {"nosuid", "nodev"} <= set(options.split(",")), options
    # The Python and CUDA libraries of a capture may map code from /tmp; nothing else does.
    assert "noexec" in options.split(",") or name == "precompute"
    user = str(service["user"])
    for variable, default in re.findall(r"\$\{(\w+):-(\d+)\}", user):
        user = user.replace(f"${{{variable}:-{default}}}", default)
    assert re.fullmatch(r"[1-9]\d*:\d+", user)


@each_service
def test_health_is_asked_for_without_extra_tools_and_waited_for(name: str) -> None:
    service = SERVICES[name]
    health = service["healthcheck"]
    if name in ONE_SHOT:
        assert health == {"disable": True}
    else:
        # Python in our image, promtool in Prometheus', busybox' wget in those made from Alpine.
        tools = {"serve": "python", "prometheus": "/bin/promtool"}
        assert health["test"][:2] == ["CMD", tools.get(name, "wget")]
        assert {"interval", "timeout", "retries", "start_period"} <= set(health)
    for other, wait in service.get("depends_on", {}).items():
        ends = other in ONE_SHOT
        expected = "service_completed_successfully" if ends else "service_healthy"
        assert wait["condition"] == expected


def test_ports_are_published_on_loopback_and_metrics_are_not() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    # Not Prometheus, not the bucket.
    assert set(published) == {"serve", "grafana", "nginx"}
    for ports in published.values():
        for port in ports:
            assert re.match(r"127\.0\.0\.1:|\$\{EDGE_ADDRESS:-127\.0\.0\.1\}:", port), port
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert COMPOSE["networks"]["storage"]["internal"] is True
    assert SERVICES["prometheus"]["networks"] == ["inside"]
    assert SERVICES["s3"]["networks"] == ["storage"]


def test_secrets_are_files_and_no_variable_holds_one() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret["file"].startswith("${LOGITSTORE_SECRETS:-./deploy/secrets}/"), name
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"KEY|SECRET|PASSWORD|TOKEN", variable):
                assert str(value).startswith("/run/secrets/"), variable
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert {"/.env", "/deploy/secrets/"} <= set(ignored)


@each_service
def test_limits_logs_and_endings(name: str) -> None:
    service = SERVICES[name]
    assert {"cpus", "memory", "pids"} == set(service["deploy"]["resources"]["limits"])
    assert service["logging"]["driver"] == "json-file"
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert service["init"] is True
    if name not in ONE_SHOT:
        assert service["restart"] == "unless-stopped"


def test_grace_period_outlasts_the_drain() -> None:
    defaults = ServerSettings()
    longest_s = defaults.shutdown_delay_s + defaults.drain_timeout_s
    assert int(SERVICES["serve"]["stop_grace_period"].removesuffix("s")) >= longest_s + 10
    unit = (REPOSITORY / "deploy/logitstore.service").read_text()
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) >= longest_s + 10


def test_only_precompute_may_write_into_the_stores() -> None:
    mounts = {
        name: mount
        for name, service in SERVICES.items()
        for mount in service.get("volumes", [])
        if mount["target"] == "/stores"
    }
    assert mounts["serve"].get("read_only") is True
    assert {name for name, mount in mounts.items() if not mount.get("read_only")} == {"precompute"}


def test_the_gpu_worker_reserves_its_gpu() -> None:
    (device,) = SERVICES["precompute"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_service_of_compose_refuses_to_start_without_its_keys(tmp_path: Path) -> None:
    """There is no sample key: without the file that prepare.py makes, nothing is served."""
    environment = {
        key: str(value)
        for key, value in SERVICES["serve"]["environment"].items()
        if key.startswith(ENV_PREFIX)
    }
    environment |= {
        "LOGITSTORE_SERVER_STORES": f"demo={tmp_path}",
        "LOGITSTORE_SERVER_KEYS_FILE": str(tmp_path / "missing.json"),
        "LOGITSTORE_SERVER_ALLOW_HOSTS": "api",
        "LOGITSTORE_SERVER_TRUSTED_PROXIES": "172.31.86.0/24",
        "LOGITSTORE_SERVER_PORT": "0",
    }

    def refusal(**changes: str | None) -> str:
        given = {key: value for key, value in (environment | changes).items() if value is not None}
        with pytest.raises(LogitstoreError) as refused:
            serve(load_settings(environment=given).settings)
        return refused.value.kind

    assert refusal() == "keys-file"
    assert refusal(LOGITSTORE_SERVER_KEYS_FILE=None) == "unsafe-bind"
    assert refusal(LOGITSTORE_SERVER_ALLOW_HOSTS=None) == "unsafe-bind"


def test_prepare_makes_secrets_of_its_own_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(REPOSITORY / "deploy/prepare.py"))["main"]

    def prepare(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--secrets", str(folder)])
        main()
        return capsys.readouterr().out

    first, second = tmp_path / "first", tmp_path / "second"
    key = prepare(first).split()[-1]
    prepare(second)
    wanted = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    made = {file.name: file for file in first.iterdir()}
    assert set(made) == {name for name in wanted if not name.startswith("tls_")}
    assert first.stat().st_mode & 0o777 == 0o700
    assert made["logitstore_keys.json"].stat().st_mode & 0o777 == 0o600
    for name, file in made.items():
        assert file.read_text() != (second / name).read_text(), name
    (pair,) = json.loads(made["s3_config.json"].read_text())["identities"][0]["credentials"]
    assert pair["accessKey"] == made["s3_access_key"].read_text()
    assert pair["secretKey"] == made["s3_secret_key"].read_text()

    ring = KeyRing(made["logitstore_keys.json"])
    reader, metrics = ring.find(key), ring.find(made["metrics_key"].read_text())
    assert reader is not None
    assert reader.may_read("demo")
    assert metrics is not None
    assert metrics.metrics
    assert not metrics.may_read("demo")

    before = {name: file.read_bytes() for name, file in made.items()}
    prepare(first)
    assert {name: file.read_bytes() for name, file in made.items()} == before


def test_env_example_names_every_variable_once() -> None:
    lines = re.findall(r"^(# )?([A-Z][A-Z0-9_]*)=(.*)$", ENV_EXAMPLE, re.MULTILINE)
    names = [name for _, name, _ in lines]
    assert len(names) == len(set(names))
    text = (REPOSITORY / "docker-compose.yml").read_text()
    compose = dict(re.findall(r"\$\{(\w+)(?::[-?]([^}]*))?\}", text))
    settings = {ENV_PREFIX + name.upper(): name for name in ServerSettings.model_fields}
    assert set(names) == set(compose) | set(settings)
    for comment, name, value in lines:
        if not comment:
            continue
        if name in compose:
            assert value == compose[name], name
        else:
            default = ServerSettings.model_fields[settings[name]].default
            assert value == ("" if default in (None, ()) else json.dumps(default).strip('"')), name


ENV_EXAMPLE = (REPOSITORY / ".env.example").read_text()


# --- the image ------------------------------------------------------------------------------


def stages() -> dict[str, list[str]]:
    """Name of each stage -> its instructions, one a line."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [line]
        elif found:
            found[list(found)[-1]].append(line)
    return found


def test_image_is_small_and_unprivileged() -> None:
    found = stages()
    assert list(found)[-1] == "serve"
    base = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)[0]
    assert PINNED.fullmatch(base)
    assert "-slim" in base
    final = found["runtime"] + found["serve"]
    assert "USER 10001:10001" in final
    # Nothing is installed into the final stages: they hold a copied environment and no pip.
    assert not [line for line in final if re.search(r"pip install|apt|gcc|build-essential", line)]
    assert any(line.startswith("RUN pip uninstall --yes --quiet pip") for line in final)
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE
    for target in ("serve", "bucket", "precompute"):
        assert found[target][0] == f"FROM runtime AS {target}"
        assert not any(line.startswith("USER") for line in found[target][1:])
    assert [line for line in found["serve"] if line.startswith("HEALTHCHECK")]


def test_image_installs_locked_versions_with_hashes_and_no_torch() -> None:
    text = (REPOSITORY / "server/requirements.txt").read_text()
    locked = re.findall(r"^([A-Za-z0-9._-]+)==(\S+) \\\n((?:    --hash=\S+.*\n?)+)", text, re.M)
    constraints = (REPOSITORY / "constraints.txt").read_text()
    pins = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", constraints, re.M)
    }
    versions = {name: version for name, version, _ in locked}
    assert len(versions) == len(re.findall("^[a-z]", text, re.M))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    assert {Requirement(line).name for line in wanted} <= set(versions)
    assert not {name for name in versions if re.search("torch|nvidia|transformers|boto", name)}
    assert {name: pins[name] for name in versions} == versions
    assert "--require-hashes" in DOCKERFILE
    # Bare constraints would let another build of a package in.
    assert all(
        re.fullmatch(r"(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+", h) for *_, h in locked
    )


def test_what_dockerignore_lets_in_is_enough_to_build_from(tmp_path: Path) -> None:
    rules = [
        line
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rules[0] == "*"
    admitted = [rule[1:] for rule in rules if rule.startswith("!")]
    dropped = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    for path in admitted:
        source = REPOSITORY / path
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*dropped))
        else:
            shutil.copy(source, target)
    assert not [
        file for file in tmp_path.rglob("*") for rule in dropped if fnmatch.fnmatch(file.name, rule)
    ]
    copied = {
        word
        for lines in stages().values()
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert copied == set(admitted)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", "wheels"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("wheels/logitstore-*.whl"))
