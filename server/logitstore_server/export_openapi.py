"""Write the service's OpenAPI document.

python -m logitstore_server.export_openapi schemas/openapi.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from logitstore_server.app import create_app
from logitstore_server.settings import ServerSettings

__all__ = ["document", "main"]


def document() -> str:
    """The file's text; a function of the code alone."""
    return json.dumps(create_app(ServerSettings()).openapi(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file that the command line names, or standard output."""
    if len(sys.argv) == 2:
        Path(sys.argv[1]).write_text(document(), encoding="utf-8")
    else:
        sys.stdout.write(document())


if __name__ == "__main__":
    main()
