"""F16: small inputs that claim, or would become, very much.

    python benchmarks/security_bombs.py SOUND LOCATION     # what one case's process runs

Each is opened and read in a process of its own, after a sound store of the same kind, so that
libraries are loaded and pools filled. Its cost is the highest resident size from there on, above
that at the start (the kernel's high-water mark, set back in between). What serves is measured from
outside in the same way.
"""

from __future__ import annotations

import gzip
import http.server
import io
import json
import struct
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from http_servers import logitstore_server
from security_stores import cores, forged, framed, push

import logitstore.store
from logitstore.containers import codecs
from logitstore.containers.protocol import crc32c
from logitstore.containers.stored_zip import local_entry
from logitstore.spec.errors import LogitstoreError
from logitstore.store import Store

__all__ = ["bombs"]

GIB = 1 << 30
LIMIT_MIB = 64
_ZSTD = b"\x28\xb5\x2f\xfd"
_BLOCK, _WINDOW = 128 << 10, 7 << 3  # bytes of the largest block, and a window of as many


def _zstd_bomb(announced: int | None, inflated: int = GIB) -> bytes:
    """A frame that inflates to so many zeros, and announces that, another size, or none.

    Source: RFC 8878, sections 3.1.1.1 (frame header) and 3.1.1.2 (blocks; type 1 repeats a byte).
    """
    blocks = inflated // _BLOCK
    repeated = [(int(n == blocks - 1) | 1 << 1 | _BLOCK << 3) for n in range(blocks)]
    body = b"".join(head.to_bytes(3, "little") + b"\0" for head in repeated)
    if announced is None:
        return _ZSTD + bytes([0, _WINDOW]) + body
    return _ZSTD + bytes([2 << 6, _WINDOW]) + announced.to_bytes(4, "little") + body


def _array_replaced(name: str, make: Callable[[bytes], bytes]) -> Callable[[bytes, Store], bytes]:
    """A chunk of a zarr shard in which one array's bytes are others."""

    def change(part: bytes, opened: Store) -> bytes:
        out, at = b"", 0
        while at < len(part):
            size, length = struct.unpack_from("<I", part, at + 18)[0], part[at + 26]
            key = part[at + 30 : at + 30 + length].decode()
            data = part[at + 30 + length : at + 30 + length + size]
            if key.startswith(f"{name}/"):
                coded = make(data)
                data = coded + crc32c(coded).to_bytes(4, "little")
            out += local_entry(key, data, 0)[0]
            at += 30 + length + size
        return out

    return change


def _pco_bomb(announced: int, held: int) -> bytes:
    chunk = codecs.pco_chunks(np.zeros(held, np.uint32), 4)
    return codecs.pco_file([chunk], announced)


def _arrow(change: Callable[[bytes], bytes]) -> Callable[[bytes, Store], bytes]:
    return lambda part, opened: change(part)


def _compressed_batch(part: bytes) -> bytes:
    """A record batch of the message's own kind, compressed, of 1 GiB of zeros."""
    batch = pa.record_batch([pa.array(np.zeros(GIB // 4, np.int32))], names=["tokens"])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        start = sink.tell()
        writer.write_batch(batch)
    data = sink.getvalue()[start:]
    return data[data.index(b"\xff\xff\xff\xff") :]


def _lengths_overwritten(value: int) -> Callable[[bytes], bytes]:
    """Every 64-bit number of the metadata that could be a length, overwritten."""

    def change(part: bytes) -> bytes:
        out = bytearray(part)
        end = 8 + struct.unpack_from("<I", part, 4)[0]
        for at in range(8, end - 8, 8):
            if 8 <= struct.unpack_from("<q", part, at)[0] < 1 << 20:
                struct.pack_into("<q", out, at, value)
        return bytes(out)

    return change


def _layout(positions: int) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["layout"].update(positions=positions, samples=positions)


def _huge_document(place: Path) -> None:
    """600 MB of document, of which the disk holds nothing."""
    path = place / "index.json"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(600_000_000)


def _deep_document(place: Path) -> None:
    path = place / "index.json"
    path.unlink()
    path.write_bytes(framed(b"[" * 4_000_000))


Make = Callable[[Path], object]
# In a chunk's place, every digest right.
STORES: dict[str, tuple[str, Make]] = {
    "zstd frame of 1 GiB, announced": (
        "zarr", partial(forged, chunk=_array_replaced("sample_key", lambda d: _zstd_bomb(GIB)))),
    "zstd frame of 1 GiB, another size announced": (
        "zarr", partial(forged, chunk=_array_replaced(
            "sample_key", lambda d: _zstd_bomb(_announced(d))))),
    "zstd frame of 1 GiB, no size announced": (
        "zarr", partial(forged, chunk=_array_replaced("sample_key", lambda d: _zstd_bomb(None)))),
    "pco file that announces 2^30 values": (
        "zarr", partial(forged, chunk=_array_replaced("tokens", lambda d: _pco_bomb(GIB, 64)))),
    "pco chunk of 2^27 values where 64 belong": (
        "zarr", partial(forged, chunk=_array_replaced("tokens", lambda d: _pco_bomb(64, 1 << 27)))),
    "layout of 2^28 positions over a small chunk": (
        "zarr", partial(forged, commit=_layout(1 << 28))),
    "layout of 2^62 positions": ("zarr", partial(forged, commit=_layout(1 << 62))),
    "compressed record batch of 1 GiB": ("arrow", partial(forged, chunk=_arrow(_compressed_batch))),
    "record batch with lengths of 2^40": (
        "arrow", partial(forged, chunk=_arrow(_lengths_overwritten(1 << 40)))),
    "record batch with negative lengths": (
        "arrow", partial(forged, chunk=_arrow(_lengths_overwritten(-1)))),
    "record batch with metadata of 2 GiB": (
        "arrow", partial(forged, chunk=_arrow(lambda p: p[:4] + b"\xff\xff\xff\x7f" + p[8:]))),
    "header with a vocabulary of 2^32": (
        "zarr", partial(forged, header=lambda body: body.update(vocab_size=1 << 32))),
    "header with chunks of 2^24 positions": (
        "zarr", partial(forged, header=lambda body: body.update(chunk_positions=1 << 24))),
    "index of 600 MB": ("zarr", _huge_document),
    "index of 4 million nested lists": ("zarr", _deep_document),
}  # fmt: skip


def _announced(data: bytes) -> int:
    """What the frame in place announces."""
    found = codecs._zstd_content_size(memoryview(data))
    assert found is not None
    return found


class _Answer(http.server.BaseHTTPRequestHandler):
    """Answers a remote reader with what the first part of the path says."""

    protocol_version = "HTTP/1.1"
    bodies: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        case = urllib.parse.unquote(self.path.split("/")[1])
        coding, body = case.partition(" ")[0], self.bodies[case]
        self.send_response(200)
        if coding in ("gzip", "zstd"):
            self.send_header("Content-Encoding", coding)
        if coding == "endless":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            except OSError:
                return
        length = 4_000_000_000 if coding == "claimed" else len(body)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", self.date_time_string(0))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def _remote(tiny: bool) -> Iterator[dict[str, str]]:
    """Case -> URL of a store on a hostile server."""
    size = GIB >> (4 if tiny else 0)
    _Answer.bodies = {
        "gzip document of 1 GiB": gzip.compress(bytes(size), 6),
        "zstd document of 1 GiB": _zstd_bomb(size, size),
        "endless document": b"",
        "claimed length of 4 GB": b"x" * 1000,
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_address[1]}"
        yield {case: f"{root}/{urllib.parse.quote(case)}" for case in _Answer.bodies}
    finally:
        server.shutdown()
        server.server_close()


def bombs(folder: Path, *, tiny: bool) -> dict[str, Any]:
    chosen = ["zstd frame of 1 GiB, another size announced"] if tiny else list(STORES)
    sound = {kind: push(folder / f"sound-{kind}", container=kind) for kind in ("zarr", "arrow")}
    rows = []
    for number, case in enumerate(chosen):
        kind, make = STORES[case]
        place = push(folder / f"bomb-{number}", container=kind)
        make(place)
        rows.append({"input": case, "to": kind, **_measured(sound[kind], str(place))})
    with _remote(tiny) as urls:
        for case, url in urls.items():
            if not tiny or case.startswith("gzip"):
                rows.append({"input": case, "to": "remote", **_measured(sound["zarr"], url)})
    places = {f"b{n}": folder / f"bomb-{n}" for n in range(len(chosen))}
    rows += _served(folder, {"sound": sound["zarr"], **places}, list(chosen), tiny=tiny)
    return {"tried": len(rows), "peak_mib": max(row["mib"] for row in rows), "rows": rows}


def _measured(sound: Path, location: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(sound), location]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        return {"mib": float("inf"), "ended": f"process ended with {done.returncode}"}
    return dict(json.loads(done.stdout))


def high_water_mib(process: int | str, field: str = "VmHWM") -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no such field")


def reset_high_water(process: int | str) -> float:
    """Set the mark back to what is resident now, which is returned in MiB."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return high_water_mib(process, "VmRSS")


def _requests(repeats: int) -> dict[str, tuple[str, dict[str, str]]]:
    """Requests that ask a service for much with little; `{shard}` is an object's name."""
    shard, samples = "/v1/stores/sound/shards/{shard}", "/v1/stores/sound/samples"
    many = ",".join("0" for _ in range(repeats))
    return {
        "ranges, 10,000 in one request": (shard, {"Range": "bytes=" + "0-0," * 7000 + "1-1"}),
        "ranges, 16 overlapping, each of all": (shard, {"Range": "bytes=" + ",".join(["0-"] * 16)}),
        f"ids, {repeats:,} times the same sample": (f"{samples}?ids={many}", {}),
        "filter, 1,900 nested lists": ("/v1/stores/sound/filter?where=" + "[" * 1900, {}),
        "stop of 2^53": (f"{samples}?start=0&stop={1 << 53}", {}),
    }


def _served(
    folder: Path, stores: dict[str, Path], cases: list[str], *, tiny: bool
) -> list[dict[str, Any]]:
    """What the bombs cost the service: its own requests, and stores that somebody gave it."""
    settings = {"log_level": "error"}
    shard = next((stores["sound"] / "shards").iterdir()).name
    rows = []
    with logitstore_server(folder, stores, cores()[0], settings=settings) as server:
        asked = {
            name: [(path.format(shard=shard), headers)]
            for name, (path, headers) in _requests(500 if tiny else 15_000).items()
        }
        for number, case in enumerate(cases):
            paths = ("/v1/stores/{}/samples?ids=0", "/v1/stores/{}/first-rows",
                     "/stores/{}/samples/0", "/stores/{}/overview")  # fmt: skip
            asked[case] = [(path.format(f"b{number}"), {}) for path in paths]
        for path in (
            "/v1/stores/sound/samples",
            "/stores/sound/samples/0",
            "/stores/sound/overview",
        ):
            _get(server.port, path, {})
        for name, requests in asked.items():
            before = reset_high_water(server.process.pid)
            statuses = [_get(server.port, path, headers) for path, headers in requests]
            peak = high_water_mib(server.process.pid) - before
            ended = ", ".join(str(status) for status in dict.fromkeys(statuses))
            rows.append({"input": name, "to": "service", "mib": peak, "ended": ended})
    return rows


def _get(port: int, path: str, headers: dict[str, str]) -> int:
    import http.client

    client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    client.request("GET", path, headers={"Accept-Encoding": "identity", **headers})
    try:
        answer = client.getresponse()
        while answer.read(1 << 20):
            pass
        return answer.status
    except (http.client.HTTPException, OSError):
        return 0
    finally:
        client.close()


def _read_everything(location: str) -> None:
    with logitstore.store.open(location) as opened:
        for number in range(opened.num_samples):
            opened.sample(number)


def main() -> None:
    sound, location = sys.argv[1:]
    _read_everything(sound)
    if location.startswith("http"):
        import obstore  # noqa: F401  (loaded before, as its size is not the input's)
    before = reset_high_water("self")
    ended = "read"
    try:
        _read_everything(location)
    except LogitstoreError as error:
        ended = error.kind
    print(json.dumps({"mib": high_water_mib("self") - before, "ended": ended}))


if __name__ == "__main__":
    main()
