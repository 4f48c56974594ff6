"""Where a connection's answers go out: counted, and files sent by the kernel without a copy.

uvicorn hands everything to its transport as bytes. `Outlet` stands in the transport's place and
adds ASGI's extension `http.response.zerocopysend`, so that an object goes from the page cache to
the socket by sendfile(2): no byte of it enters this process.

Source: https://asgi.readthedocs.io/en/latest/extensions.html, "Zero Copy Send".
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from logitstore.spec.errors import IntegrityError

__all__ = ["ZERO_COPY", "Outlet", "offer_zero_copy"]

ZERO_COPY = "http.response.zerocopysend"

# Other connections have their turn after so many bytes.
_TURN_BYTES = 1 << 20

Message = MutableMapping[str, Any]


def offer_zero_copy(cycle: RequestResponseCycle, outlet: Outlet) -> None:
    """Let the application of this request send files."""
    send = cycle.send

    async def send_with_files(message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            # Held back, so that it leaves in one piece with what follows.
            outlet.hold()
            await send(message)  # type: ignore[arg-type]
        elif kind != ZERO_COPY:
            outlet.release()
            await send(message)  # type: ignore[arg-type]
        else:
            await _send_file(cycle, outlet, message)
            if not message.get("more_body", False):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    cycle.scope["extensions"] = {ZERO_COPY: {}}
    cycle.send = send_with_files  # type: ignore[method-assign, assignment]


async def _send_file(cycle: RequestResponseCycle, outlet: Outlet, message: Message) -> None:
    count = message["count"]
    if count > cycle.expected_content_length:
        raise RuntimeError("Response content longer than Content-Length")
    if cycle.flow.write_paused and not cycle.disconnected:
        await cycle.flow.drain()
    if not cycle.disconnected:
        cycle.expected_content_length -= count
        await outlet.send_file(message["file"], message["offset"], count)


class Outlet:
    """A connection's transport that knows how many bytes were given to it, and sends files.

    Attributes:
        written: bytes given to it.
    """

    __slots__ = (
        "_closed",
        "_held",
        "_left",
        "_loop",
        "_socket",
        "_transport",
        "_writable",
        "is_closing",
        "written",
    )

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing  # not by __getattr__: asked for at each request
        self._loop = loop
        self._held: bytes | None = None
        self._left = 0  # of the file being sent
        self._writable: asyncio.Future[None] | None = None
        self._closed = False
        self._socket: socket.socket | None = None
        self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Any) -> None:
        self.written += len(data)
        if self._held is not None:
            self._held += data
        elif len(data):
            self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        """Bytes given to it that the system has not taken yet."""
        return self._transport.get_write_buffer_size() + self._left

    def hold(self) -> None:
        """Keep what is written until a file follows, or `release`."""
        self._held = b""

    def release(self) -> None:
        """Write what was held."""
        held = self._take_held()
        if held:
            self._transport.write(held)

    def connection_lost(self) -> None:
        """Nobody waits any longer for a client that has gone."""
        self._closed = True
        if self._socket is not None:
            self._socket.detach()
        self._wake()

    def send_at_once(self, head: bytes, descriptor: int, offset: int, count: int) -> None:
        """Send a head and a part of a file without waiting; nothing may be on its way before it.

        What the system does not take now is read, and left to the transport as bytes.

        Raises: IntegrityError object-size-mismatch: the file ends before the part does.
        """
        self.written += len(head) + count
        if self._transport.is_closing():
            return
        if self._socket is None:
            inner = self._transport.get_extra_info("socket")
            # Not its own descriptor, but used only while the transport is not closing.
            self._socket = socket.socket(inner.family, inner.type, inner.proto, inner.fileno())
        out = self._socket
        try:
            head = head[out.send(head, socket.MSG_MORE) :]
            while count and not head:
                sent = os.sendfile(out.fileno(), descriptor, offset, count)
                if not sent:
                    raise _too_short(offset, count)
                offset += sent
                count -= sent
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self._transport.abort()
            return
        if head or count:
            rest = os.pread(descriptor, count, offset)
            self._transport.write(head + rest)
            if len(rest) < count:
                raise _too_short(offset, count)

    async def send_file(self, descriptor: int, offset: int, count: int) -> None:
        """Send a part of a file behind what is held; returns early when the client has gone.

        Raises: IntegrityError object-size-mismatch: the file ends before the part does.
        """
        self.written += count
        self._left = count
        held = self._take_held()
        if self._transport.get_write_buffer_size():
            # The answer before this one is still on its way out.
            self._transport.write(held)
            held = b""
        elif self._transport.is_closing():
            self._left = 0
            return
        # A descriptor of its own: the transport's may be closed, and its number given to another
        # connection, while this waits; and the event loop lets nobody else watch the transport's.
        own = os.dup(self._transport.get_extra_info("socket").fileno())
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, own) as out:
                await self._send(out, held, descriptor, offset)
        except (BrokenPipeError, ConnectionResetError):
            self._transport.abort()
        finally:
            self._left = 0

    async def _send(self, out: socket.socket, held: bytes, descriptor: int, offset: int) -> None:
        while self._transport.get_write_buffer_size() and not self._closed:
            await self._until_writable(out)
        turn = _TURN_BYTES
        while self._left and not self._closed:
            try:
                if held:
                    held = held[out.send(held, socket.MSG_MORE) :]
                    continue
                sent = os.sendfile(out.fileno(), descriptor, offset, min(self._left, turn))
            except BlockingIOError:
                await self._until_writable(out)
                turn = _TURN_BYTES
                continue
            if not sent:
                raise _too_short(offset, self._left)
            offset += sent
            self._left -= sent
            turn -= sent
            if not turn and self._left:
                await asyncio.sleep(0)
                turn = _TURN_BYTES

    async def _until_writable(self, out: socket.socket) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(out.fileno(), self._wake)
        try:
            await self._writable
        finally:
            self._loop.remove_writer(out.fileno())
            self._writable = None

    def _wake(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def _take_held(self) -> bytes:
        held, self._held = self._held, None
        return held or b""


def _too_short(offset: int, count: int) -> IntegrityError:
    return IntegrityError(
        "object-size-mismatch",
        "object became shorter while it was sent",
        expected=f"{count} bytes more at {offset}",
    )
