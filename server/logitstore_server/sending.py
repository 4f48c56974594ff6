"""Bodies on their way to a client: bounded memory, and an end when the client has gone.

The chain in front of these functions is pure ASGI, so that what they send is written to the socket
as it is: slices of mapped files without a copy.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool

from logitstore_server.conditional import Answer

__all__ = ["SLICE_BYTES", "Read", "forget_mapped", "send_answer", "send_blocks"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# (start, stop) of the representation -> its bytes
Read = Callable[[int, int], memoryview]

SLICE_BYTES = 1 << 20
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


def _slices(answer: Answer) -> Iterator[bytes | tuple[int, int]]:
    for part in answer.parts:
        if isinstance(part, bytes):
            yield part
            continue
        start, stop = part
        for offset in range(start, stop, SLICE_BYTES):
            yield offset, min(offset + SLICE_BYTES, stop)


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
