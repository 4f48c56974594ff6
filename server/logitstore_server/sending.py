"""Bodies on their way to a client: bounded memory, and an end when the client has gone.

Files are left to the kernel where the server can do that (`outlet`). Elsewhere they go out as
slices of their mapping; as the chain in front of these functions is pure ASGI, these reach the
socket without a copy in between.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool

from logitstore.store.local import OpenFile
from logitstore_server.conditional import Answer
from logitstore_server.outlet import ZERO_COPY

__all__ = [
    "SLICE_BYTES",
    "Read",
    "forget_mapped",
    "send_answer",
    "send_blocks",
    "send_file",
    "sends_files",
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# (start, stop) of the representation -> its bytes
Read = Callable[[int, int], memoryview]

_BODY = "http.response.body"
SLICE_BYTES = 1 << 20
# Of a file that the kernel sends: what is counted as sent when a client goes away meanwhile.
_FILE_SLICE_BYTES = 4 << 20
# Until then the socket has taken the last slice from an event loop that does not copy it.
_LINGER_S = 0.5


async def send_answer(
    answer: Answer, read: Read, scope: Scope, receive: Receive, send: Send, *, waits: bool
) -> None:
    """Send an answer whose body is read slice by slice.

    The first slice is read before the status is sent, so that a missing object is a proper error;
    a later failure ends the connection short of its Content-Length.

    Args:
        waits: reading may take long, so it is done in a thread.
    """
    start = {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
    slices = [] if scope["method"] == "HEAD" else list(_slices(answer))
    if not slices:
        await send(start)
        await send({"type": "http.response.body", "body": b""})
        return
    body = await _take(slices[0], read, waits)
    await send(start)
    # The last two: an event loop that does not copy may still hold the end of the one before.
    sent: deque[tuple[bytes | memoryview, bytes | tuple[int, int]]] = deque(maxlen=2)
    async with _until_disconnect(receive, watch=len(slices) > 1) as gone:
        for number, part in enumerate(slices):
            if number:
                body = await _take(part, read, waits)
            more = number + 1 < len(slices)
            await send({"type": "http.response.body", "body": body, "more_body": more})
            for each in sent:
                forget_mapped(*each)
            sent.append((body, part))
            if gone():
                break
    for each in sent:
        asyncio.get_running_loop().call_later(_LINGER_S, forget_mapped, *each)


def sends_files(scope: Scope) -> bool:
    """Whether the server in front can send parts of files itself."""
    return ZERO_COPY in (scope.get("extensions") or ())


async def send_file(answer: Answer, file: OpenFile, receive: Receive, send: Send) -> None:
    """Send an answer whose body is parts of a file, by a server that `sends_files`."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    slices = list(_slices(answer, _FILE_SLICE_BYTES))
    last = len(slices) - 1
    if last <= 0:
        await send(_part_of(slices[0], file, False) if slices else {"type": _BODY, "body": b""})
        return
    async with _until_disconnect(receive) as gone:
        for number, part in enumerate(slices):
            await send(_part_of(part, file, number < last))
            if gone():
                return


def _part_of(part: bytes | tuple[int, int], file: OpenFile, more: bool) -> dict[str, Any]:
    if isinstance(part, bytes):
        return {"type": _BODY, "body": part, "more_body": more}
    start, stop = part
    return {
        "type": ZERO_COPY,
        "file": file.descriptor,
        "offset": start,
        "count": stop - start,
        "more_body": more,
    }


async def send_blocks(
    headers: list[tuple[bytes, bytes]],
    blocks: Iterator[bytes | memoryview],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Send an answer of unknown length from an iterator that works in a thread.

    The next block is made only after the one before was handed to the socket, so a slow client
    holds one block. An error after the first block ends the connection without the last chunk.
    """
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    if scope["method"] == "HEAD":
        await send(start)
        await send({"type": "http.response.body", "body": b""})
        return
    block = await run_in_threadpool(next, blocks, None)
    await send(start)
    async with _until_disconnect(receive) as gone:
        while block is not None and not gone():
            for offset in range(0, len(block), SLICE_BYTES):
                part = memoryview(block)[offset : offset + SLICE_BYTES]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            block = await run_in_threadpool(next, blocks, None)
        if not gone():
            await send({"type": "http.response.body", "body": b""})


def _slices(answer: Answer, most: int = SLICE_BYTES) -> Iterator[bytes | tuple[int, int]]:
    for part in answer.parts:
        if isinstance(part, bytes):
            yield part
            continue
        start, stop = part
        for offset in range(start, stop, most):
            yield offset, min(offset + most, stop)


async def _take(part: bytes | tuple[int, int], read: Read, waits: bool) -> bytes | memoryview:
    if isinstance(part, bytes):
        return part
    return await run_in_threadpool(read, *part) if waits else read(*part)


def forget_mapped(body: bytes | memoryview, part: bytes | tuple[int, int]) -> None:
    """Take a part of a mapped file out of the process's memory, once it was sent or decoded.

    The file stays in the page cache; without this, resident memory would grow by all that is ever
    served. Whoever still looks at the part finds it again.

    Args:
        body: what reading the part gave.
        part: (start, stop) in the file.
    """
    mapping = body.obj if isinstance(body, memoryview) else None
    if isinstance(mapping, mmap.mmap) and not isinstance(part, bytes):
        first = part[0] - part[0] % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, first, part[1] - first)


@asynccontextmanager
async def _until_disconnect(
    receive: Receive, *, watch: bool = True
) -> AsyncIterator[Callable[[], bool]]:
    """A function that says whether the client has gone away; without `watch` it is not asked."""
    if not watch:
        yield lambda: False
        return

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(wait())
    try:
        yield task.done
    finally:
        task.cancel()
