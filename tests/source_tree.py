"""The source tree as tests see it: packages, layers, and every import of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = {
    "logitstore": REPOSITORY / "logitstore",
    "logitstore_server": REPOSITORY / "server" / "logitstore_server",
    "logitstore_cli": REPOSITORY / "cli" / "logitstore_cli",
}

# The packages of the library that read, verify and serve without torch.
WITHOUT_TORCH = ["spec", "record", "display", "containers", "store"]


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is the module and, for `from m import n`, also `m.n`."""

    file: Path
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line} imports {self.target}"


def source_files() -> Iterator[tuple[Path, str]]:
    """Every module of the three packages, with its dotted name."""
    for package, folder in ROOTS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield file, ".".join([package, *(part for part in parts if part != "__init__")])


def imports_of(file: Path, module: str) -> Iterator[Import]:
    """All imports of a file: at the top, inside functions, for type checkers, and by name."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(file, node.lineno, f"{origin}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            argument = node.args[0]
            if (
                name in ("importlib.import_module", "import_module", "__import__")
                and isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
            ):
                yield Import(file, node.lineno, argument.value)


def layer_of(dotted: str) -> str | None:
    """The layer that a dotted name belongs to; None for the root package and for strangers."""
    root, _, rest = dotted.partition(".")
    if root == "logitstore_server":
        return "server"
    if root == "logitstore_cli":
        return "cli"
    if root == "logitstore":
        first = rest.partition(".")[0]
        return first if (ROOTS["logitstore"] / first).is_dir() and first else None
    return None


def all_imports() -> list[tuple[str, Import]]:
    return [
        (module, found) for file, module in source_files() for found in imports_of(file, module)
    ]
