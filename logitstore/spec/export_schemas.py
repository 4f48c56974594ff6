"""JSON Schemas of the documents' bodies, for readers in other languages: `schemas/*.schema.json`.

    python -m logitstore.spec.export_schemas schemas

The models stay the truth: sums, digests and names that must agree are rules no JSON Schema can say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from logitstore.spec.commit import Commit
from logitstore.spec.document import Document
from logitstore.spec.header import Header
from logitstore.spec.index import Index
from logitstore.spec.plan import Plan

__all__ = ["DOCUMENTS", "schema_files"]

DOCUMENTS: dict[str, type[Document]] = {
    "header": Header,
    "plan": Plan,
    "commit": Commit,
    "index": Index,
}


def schema_files() -> dict[str, str]:
    """File name -> text of every exported schema."""
    files = {}
    for name, model in DOCUMENTS.items():
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **model.model_json_schema(by_alias=True),
        }
        files[f"{name}.schema.json"] = json.dumps(schema, indent=2, sort_keys=True) + "\n"
    return files


def main(folder: Path) -> None:
    """Writes the files."""
    for name, text in schema_files().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
