"""Make the secrets that docker-compose.yml mounts: random, each in a file, none with a default.

    python deploy/prepare.py [--secrets deploy/secrets]

It needs logitstore with its extra `serve`. Files that are there are left alone; remove one to have
it made anew. It prints the key that reads every store, once.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from pathlib import Path

from logitstore_server.keys import create_key

# The user of our images, where this runs as root.
IMAGE_UID = 10001
KEYS = "logitstore_keys.json"


def main() -> None:
    """Make what is missing."""
    options = argparse.ArgumentParser(description="Make the secrets of docker-compose.yml.")
    default = Path(__file__).parent / "secrets"
    options.add_argument("--secrets", type=Path, default=default, help="Folder for them.")
    folder: Path = options.parse_args().secrets
    # The folder protects the files: containers of other users must read those that they are given.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)

    for name in ("s3_access_key", "s3_secret_key", "grafana_password"):
        _write(folder / name, secrets.token_urlsafe(30))
    _write(folder / "s3_config.json", _s3_identities(folder))
    if (folder / KEYS).exists():
        _say(folder / KEYS, "is there")
        if not (folder / "metrics_key").exists():
            sys.exit(f"{folder / 'metrics_key'} is missing: logitstore keys create --metrics")
        return
    metrics, _ = create_key(
        folder / KEYS, label="prometheus", stores=(), metrics=True, expires=None
    )
    reader, _ = create_key(folder / KEYS, label="first", stores=("*",), metrics=False, expires=None)
    (folder / "metrics_key").unlink(missing_ok=True)
    _write(folder / "metrics_key", metrics)
    # Only the service reads this one, and it refuses a file that others may read.
    (folder / KEYS).chmod(0o600)
    if os.geteuid() == 0:
        os.chown(folder / KEYS, IMAGE_UID, IMAGE_UID)
        owner = f"{IMAGE_UID}, which may read it"
    else:
        owner = f"you: set LOGITSTORE_UID={os.getuid()} and LOGITSTORE_GID={os.getgid()} in .env"
    _say(folder / KEYS, f"made; its owner is {owner}")
    print(f"\nA key for every store, not shown again:\n{reader}")


def _write(file: Path, text: str) -> None:
    if file.exists():
        _say(file, "is there")
        return
    with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as opened:
        opened.write(text)
    file.chmod(0o644)
    _say(file, "made")


def _s3_identities(folder: Path) -> str:
    pair = {
        "accessKey": (folder / "s3_access_key").read_text(),
        "secretKey": (folder / "s3_secret_key").read_text(),
    }
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": "logitstore", "credentials": [pair], "actions": actions}
    return json.dumps({"identities": [identity]}, indent=1)


def _say(file: Path, what: str) -> None:
    print(f"{file}: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
