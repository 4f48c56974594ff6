"""The built wheel: what it holds, what it asks for, and that it runs without the source tree."""

from __future__ import annotations

import email
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.source_tree import REPOSITORY, ROOTS, WITHOUT_TORCH, all_imports, layer_of

PACKAGES = [name for name, folder in ROOTS.items() if folder.is_dir()]

# Releases with known holes that no environment may hold.
UNSAFE_BEFORE = {"numcodecs": "0.16.6", "pyarrow": "14.0.1", "starlette": "1.5.1", "torch": "2.10"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def requirements() -> tuple[list[Requirement], list[Requirement]]:
    """What the project always needs, and what its extras add."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    return [Requirement(line) for line in project["dependencies"]], [
        Requirement(line) for line in optional
    ]


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
        for package in PACKAGES:
            assert f"{package}/py.typed" in names
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.11"
        assert f"{info}/licenses/LICENSE" in names
        assert "logitstore = logitstore_cli.main:main" in (
            archive.read(f"{info}/entry_points.txt").decode()
        )


def test_floors_exclude_known_holes() -> None:
    needed, optional = requirements()
    by_name = {requirement.name: requirement for requirement in [*needed, *optional]}
    for name, fixed in UNSAFE_BEFORE.items():
        floors = [part for part in by_name[name].specifier if part.operator == ">="]
        assert [part.version for part in floors] == [fixed]


def test_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """A wheel that forgot a module, or that finds it only beside the source tree, fails here."""
    environment = tmp_path / "env"
    venv = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
    subprocess.run(venv, check=True, capture_output=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # The dependencies are borrowed. A folder named in a .pth file is searched last, and .pth files
    # inside it, such as that of an editable install, are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    def run(*command: str) -> str:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = ", ".join(PACKAGES)
    files = run(str(python), "-c", f"import {names}\nfor m in ({names},): print(m.__file__)")
    assert [Path(line).parent.parent for line in files.splitlines()] == [site] * len(PACKAGES)
    modules = [
        ".".join(file.relative_to(folder.parent).with_suffix("").parts)
        for folder in map(ROOTS.__getitem__, PACKAGES)
        for file in folder.rglob("*.py")
        if layer_of(folder.name) or file.relative_to(folder).parts[0] in WITHOUT_TORCH
    ]
    run(str(python), "-c", f"import importlib\nfor m in {modules!r}: importlib.import_module(m)")

    command = str(environment / "bin" / "logitstore")
    assert run(command, "--help").startswith("Example:")
    assert run(command, "--version").startswith("logitstore ")


def test_every_import_is_a_declared_dependency() -> None:
    """The base packages import base dependencies only; the others may use the extras as well."""
    needed, optional = requirements()
    base = {canonicalize_name(requirement.name) for requirement in needed}
    extra = {canonicalize_name(requirement.name) for requirement in optional}
    distributions = packages_distributions()
    wrong = []
    for module, found in all_imports():
        root = found.target.partition(".")[0]
        if root in sys.stdlib_module_names or root in ROOTS:
            continue
        allowed = base if layer_of(module) in (*WITHOUT_TORCH, None) else base | extra
        providers = {canonicalize_name(name) for name in distributions.get(root, [])}
        if not providers & allowed:
            wrong.append(f"{found}: no declared dependency provides {root}")
    assert not wrong, "\n".join(wrong)
