"""The one-shot job that makes the bucket, against an S3 server."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.source_tree import REPOSITORY


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_bucket_is_made_once_with_versions_and_a_lifecycle(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "one",
        "AWS_SECRET_ACCESS_KEY": "two",
        "LOGITSTORE_BUCKET": "deployed",
    }.items():
        monkeypatch.setenv(name, value)
    main = runpy.run_path(str(REPOSITORY / "deploy/make_bucket.py"))["main"]

    main()
    made = ["bucket deployed made", "versioning set", "lifecycle set"]
    assert capsys.readouterr().out.splitlines() == made
    main()
    assert capsys.readouterr().out.splitlines() == ["bucket deployed is there", *made[1:]]
    s3 = boto3.client("s3")
    assert s3.get_bucket_versioning(Bucket="deployed")["Status"] == "Enabled"
    rules = s3.get_bucket_lifecycle_configuration(Bucket="deployed")["Rules"]
    assert {rule["ID"] for rule in rules} == {"removed-objects", "unfinished-uploads"}
    # Nothing that is in use may ever expire.
    assert not [rule for rule in rules if "Expiration" in rule or "Transitions" in rule]


def test_keys_of_the_bucket_come_from_files(tmp_path: Path) -> None:
    access, secret = tmp_path / "access", tmp_path / "secret"
    access.write_text("one\n")
    secret.write_text("two\n")
    environment = {
        "PATH": os.environ["PATH"],
        "AWS_ACCESS_KEY_ID_FILE": str(access),
        "AWS_SECRET_ACCESS_KEY_FILE": str(secret),
        "LOGITSTORE_SERVER_KEYS_FILE": "left alone",
    }

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "deploy/with_credentials.py", "env"]
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )

    seen = set(run().stdout.splitlines())
    assert {"AWS_ACCESS_KEY_ID=one", "AWS_SECRET_ACCESS_KEY=two"} <= seen
    assert "LOGITSTORE_SERVER_KEYS_FILE=left alone" in seen
    access.unlink()
    done = run()
    assert done.returncode == 1
    assert "AWS_ACCESS_KEY_ID_FILE" in done.stderr
    assert not done.stdout
