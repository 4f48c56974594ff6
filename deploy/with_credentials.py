#!/usr/bin/env python3
"""Run a command with the keys of the bucket read from files, where containers have secrets.

    with-credentials logitstore serve ...

AWS_ACCESS_KEY_ID_FILE and AWS_SECRET_ACCESS_KEY_FILE become AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, so that neither stands in a compose file or in `docker inspect`.
"""

import os
import sys

for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    path = os.environ.pop(f"{name}_FILE", None)
    if path:
        try:
            with open(path, encoding="utf-8") as file:
                os.environ[name] = file.read().strip()
        except OSError as error:
            sys.exit(f"{name}_FILE: {path}: {error.strerror}; deploy/prepare.py makes the secrets")
if len(sys.argv) < 2:
    sys.exit("usage: with-credentials COMMAND ARGUMENT...")
os.execvp(sys.argv[1], sys.argv[1:])
