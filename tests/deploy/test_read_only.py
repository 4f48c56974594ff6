"""The service needs to write nothing, to reach nobody, and no right that others lack."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.sealed_off import without_rights
from tests.source_tree import REPOSITORY

SEAL = ["unshare", "--mount", "--net", "--propagation", "private"]


def may_seal() -> bool:
    """Whether this process may make a file system and a network of its own."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    if not all(map(shutil.which, ["unshare", "setpriv", "mount"])):
        return False
    return subprocess.run([*SEAL, "true"], capture_output=True, check=False).returncode == 0


def runs_as(uid: int) -> bool:
    """Whether a user can run this environment; homes of others are often closed."""
    code = f"import sys, os; import logitstore_cli.main; sys.exit(os.__file__ != {os.__file__!r})"
    command = without_rights([sys.executable, "-c", code], uid)
    return subprocess.run(command, cwd="/", capture_output=True, check=False).returncode == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; those of pytest are for their owner."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(not may_seal(), reason="needs root, unshare and setpriv")
def test_serves_from_a_read_only_system_without_network_home_or_rights(
    stores: Path, open_folder: Path
) -> None:
    store, scratch = open_folder / "store", open_folder / "scratch"
    shutil.copytree(stores / "open", store)
    scratch.mkdir()
    # The user that nobody is, where it can run this Python; root without its rights elsewhere.
    uid = 65534 if runs_as(65534) else 0
    if uid == 0:
        for path in [store, *store.rglob("*")]:
            os.chown(path, 65534, 65534)
    program = Path(__file__).with_name("sealed_off.py")
    process = subprocess.Popen(
        [*SEAL, sys.executable, str(program), str(store), str(scratch), str(uid)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    seen = json.loads(out)
    # It was sealed off indeed.
    assert seen["writable"] is False
    assert seen["networks"] == ["lo"]
    assert int(seen["rights"][0], 16) == 0
    # And everything works; several workers add up in a temporary folder, which goes with them.
    assert seen["ready"] == "ready"
    assert seen["same"] is True
    assert seen["page"] == 3
    assert seen["counted"] is True
    (folder,) = seen["written"]
    assert folder.startswith("logitstore-metrics-")
    assert seen["exit"] == 0
    assert seen["left"] == []


def test_the_unit_for_systemd_is_sound(tmp_path: Path) -> None:
    """`systemd-analyze verify`, where there is one: names of settings, and their values."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    text = (REPOSITORY / "deploy/logitstore.service").read_text()
    start = "ExecStart=/opt/logitstore/bin/logitstore serve --config /etc/logitstore/server.toml"
    assert start in text
    unit = tmp_path / "logitstore.service"
    # The program and its user are made on the machine that it is for.
    unit.write_text(text.replace("/opt/logitstore/bin/logitstore", "/bin/true").replace(
        "=logitstore\n", "=root\n"
    ))  # fmt: skip
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "logitstore.service" in line]
    assert (done.returncode, said) == (0, [])
