"""Who may import whom, what an import may load, and what no module may use."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests.source_tree import (
    REPOSITORY,
    ROOTS,
    WITHOUT_TORCH,
    all_imports,
    layer_of,
    source_files,
)

# Layer -> the layers that stand to its left, the only ones it may import.
BELOW_DATA = [*WITHOUT_TORCH, "targets", "losses", "signals"]
MAY_IMPORT = {
    "spec": [],
    "record": ["spec"],
    "display": ["spec", "record"],
    "containers": ["spec", "record"],
    "store": ["spec", "record", "display", "containers"],
    "targets": ["spec", "record"],
    "losses": ["spec", "record", "targets"],
    "signals": ["spec", "record"],
    "data": BELOW_DATA,
    "corpora": BELOW_DATA,
    "teachers": [*BELOW_DATA, "corpora"],
    "capture": [*BELOW_DATA, "data", "corpora", "teachers"],
    "analysis": [*BELOW_DATA, "data", "corpora", "teachers", "capture"],
    "integrations": [*BELOW_DATA, "data", "corpora", "teachers", "capture", "analysis"],
}
LIBRARY = list(MAY_IMPORT)
MAY_IMPORT["server"] = LIBRARY
MAY_IMPORT["cli"] = [*LIBRARY, "server"]

# Nothing here may reach these: stores come from strangers, and each of these runs what it reads.
RUNS_WHAT_IT_READS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def fresh_python(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_of_the_library_has_a_layer() -> None:
    packages = {folder.parent.name for folder in ROOTS["logitstore"].glob("*/__init__.py")}
    assert packages <= set(MAY_IMPORT)


def test_imports_go_left_only() -> None:
    wrong = []
    for module, found in all_imports():
        source, target = layer_of(module), layer_of(found.target)
        if source is None:
            continue  # the root package names its public parts, lazily
        if target not in (None, source, *MAY_IMPORT[source]):
            wrong.append(f"{found}: {source} may not import {target}")
        if target is None and found.target.startswith("logitstore."):
            name = found.target.removeprefix("logitstore.")
            if name != "__version__":
                wrong.append(f"{found}: name its package, not the root")
        if found.target == "logitstore":
            wrong.append(f"{found}: the root reaches every layer; name the one that is meant")
    assert not wrong, "\n".join(wrong)


def test_packages_do_not_import_each_others_internals() -> None:
    wrong = [
        str(found)
        for module, found in all_imports()
        if layer_of(found.target) not in (None, layer_of(module))
        and any(
            part.startswith("_") and not part.startswith("__") for part in found.target.split(".")
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_lower_layers_and_server_do_not_import_torch() -> None:
    torchless = {*WITHOUT_TORCH, "server"}
    wrong = [
        str(found)
        for module, found in all_imports()
        if layer_of(module) in torchless
        and found.target.partition(".")[0] in ("torch", "transformers", "safetensors", "accelerate")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_runs_what_it_reads() -> None:
    wrong = [
        str(found)
        for _, found in all_imports()
        if found.target.partition(".")[0] in RUNS_WHAT_IT_READS
    ]
    for file, _ in source_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            keywords = {
                word.arg: word.value.value
                for word in node.keywords
                if isinstance(word.value, ast.Constant)
            }
            called = ast.unparse(node.func)
            dangerous = (
                keywords.get("allow_pickle") is True
                or (called == "torch.load" and keywords.get("weights_only") is not True)
                or called in ("eval", "exec", "yaml.load", "yaml.unsafe_load")
            )
            if dangerous:
                wrong.append(f"{file.relative_to(REPOSITORY)}:{node.lineno} calls {called}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import logitstore",
        "from logitstore_cli.main import run; run(['--help'])",
    ],
)
def test_import_and_overview_stay_light(code: str) -> None:
    loaded = json.loads(
        fresh_python(
            f"import contextlib, io, json, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n"
            f"    exec({code!r})\nprint(json.dumps(sorted(sys.modules)))"
        )
    )
    heavy = {"torch", "transformers", "pyarrow", "zarr", "fastapi", "numpy", "pydantic", "rich"}
    assert heavy.isdisjoint(loaded)


def test_reading_needs_no_torch() -> None:
    """The packages that read, verify and serve import where torch and its companions are absent."""
    modules = [
        module
        for file, module in source_files()
        if layer_of(module) in (*WITHOUT_TORCH, "server", None) or file.parent.name == "cli"
    ]
    code = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "accelerate", "safetensors", "zarr"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
for module in MODULES:
    importlib.import_module(module)
print("done")
"""
    assert fresh_python(code.replace("MODULES", repr(modules))).strip() == "done"
