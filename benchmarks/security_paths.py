"""F15: names that try to leave their store, and locations that try to be opened.

Sent as they are, byte for byte, to `logitstore serve` with two stores beside a secret file: a
client library would tidy them up. The key allows `alpha` alone. *Escaped* is an answer that holds
the secret, a file of the other store or of the system, or the service connecting to what a client
named (a listener on loopback counts connections).
"""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from http_servers import logitstore_server
from security_stores import cores, write_pair

from logitstore_server.keys import create_key

__all__ = ["paths"]

SECRET = b"only-for-eyes-below-the-service"
_STEPS = (
    *("../", "..%2f", "%2e%2e/", "%2e%2e%2f", ".%2e/", "%2E%2E%2F", "..\\", "..%5c", "%2e%2e%5c"),
    *("%252e%252e%252f", "%252e%252e/", "..%252f", "%25252e%25252e%25252f", "....//", "..././"),
    *("..;/", "..%3b/", "%c0%ae%c0%ae/", "%c0%ae%c0%ae%c0%af", "%uff0e%uff0e/", "..%00/", "..%0d/"),
    *(
        "..%09/",
        "..%20/",
        "%ef%bc%8e%ef%bc%8e/",
        "..%e2%81%84",
        "\xc0\xae\xc0\xae/",
        ".%00./",
        "..//",
    ),
)
_BELOW = (
    *("/v1/stores/alpha/", "/v1/stores/alpha/shards/", "/v1/stores/alpha/commits/", "/v1/stores/"),
    *("/v1/stores/alpha/plans/", "/v1/stores/alpha/tables/", "/stores/alpha/", "/static/", "/"),
)
_TARGETS = ("secret.txt", "beta/store.json", "etc/passwd")
_ABSOLUTE = (
    *("{secret}", "%2f{secret}", "//{secret}", "file://{secret}", "%00{secret}", "C:{secret}"),
    *("{secret}%00.json", "0001-000000.1.json/{secret}", "./{secret}", "~root/{secret}"),
)
_URLS = (
    *("http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "http://[::1]:{port}/x"),
    *("http://2130706433:{port}/", "http://0x7f000001:{port}/", "http://127.1:{port}/x"),
    *(
        "http://169.254.169.254/latest/meta-data/",
        "http://metadata.google.internal/",
        "file://{secret}",
    ),
    *("s3://bucket/store", "gs://bucket/store", "az://account/container", "hf://datasets/a/b/c"),
    *("gopher://127.0.0.1:{port}/", "ftp://127.0.0.1:{port}/", "//127.0.0.1:{port}/x", "{secret}"),
    *(
        "http://user@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}#@demo/",
        "HTTP://127.0.0.1:{port}/",
    ),
)
_PARAMETERS = (
    "store",
    "dataset",
    "url",
    "location",
    "path",
    "columns",
    "query",
    "key",
    "a",
    "then",
)


def targets(secret: Path, port: int) -> dict[str, list[str]]:
    """Kind -> request targets."""
    climbing = [
        below + step * times + target
        for below, step, times, target in product(_BELOW, _STEPS, (1, 2, 6), _TARGETS)
    ]
    absolute = [below + each.format(secret=secret) for below, each in product(_BELOW, _ABSOLUTE)]
    urls = [each.format(port=port, secret=secret) for each in _URLS]
    places = ("/v1/stores", "/v1/stores/alpha/rows", "/stores/alpha/overview", "/compare", "/login")
    asked = [f"{place}?{name}={url}" for place, name, url in product(places, _PARAMETERS, urls)]
    named = [f"{root}/{form}" for root in ("/v1/stores", "/stores") for url in urls
             for form in (url, url.replace("/", "%2f"), url.replace(":", "%3a"))]  # fmt: skip
    return {"traversal": climbing + absolute, "SSRF": asked + named + urls}


@contextmanager
def _listener() -> Iterator[tuple[int, list[str]]]:
    """A port that nobody has reason to connect to, and who did."""
    visits: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, peer = server.accept()
                except OSError:
                    return
                visits.append(str(peer))
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], visits


def paths(folder: Path, *, tiny: bool) -> dict[str, Any]:
    stores = write_pair(folder)
    secret = folder / "secret.txt"
    secret.write_bytes(SECRET)
    others = [SECRET, b"root:", *(p.read_bytes()[:75] for p in stores["beta"].glob("*.json"))]
    keys = folder / "keys.json"
    text, _ = create_key(keys, label="x", stores=["alpha"], metrics=False, expires=None)
    settings = {"log_level": "error", "requests_per_s": "0"}
    rows = []
    with (
        _listener() as (port, visits),
        logitstore_server(
            folder, stores, cores()[0], key=(keys, text), settings=settings
        ) as server,
    ):
        # The keys must be able to open what is theirs, or nothing was tried.
        known = _ask(
            server.port, ["/v1/stores/alpha/store.json", "/v1/stores/beta/store.json"], text
        )
        assert [status for status, _ in known] == [200, 404], known
        for kind, tried in targets(secret, port).items():
            chosen = tried[:: 40 if tiny else 1]
            answers = _ask(server.port, chosen, text)
            found = [
                target
                for target, (_, body) in zip(chosen, answers, strict=True)
                if any(other in body for other in others)
            ]
            statuses = Counter(str(status) for status, _ in answers)
            rows.append(
                {
                    "kind": kind,
                    "tried": len(chosen),
                    "escaped": len(found),
                    "statuses": dict(statuses),
                    "found": found[:10],
                }
            )
        return {"rows": rows, "connections_made": len(visits)}


def _ask(port: int, targets: Sequence[str], key: str) -> list[tuple[int, bytes]]:
    """Status and body of each, with the key, over sockets of one's own."""
    answers = []
    for target in targets:
        head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(head.encode("latin-1") + b"Connection: close\r\n\r\n")
            data = b""
            while block := client.recv(1 << 16):
                data += block
        line, _, rest = data.partition(b"\r\n")
        answers.append((int(line.split()[1]) if line else 0, rest.partition(b"\r\n\r\n")[2]))
    return answers
