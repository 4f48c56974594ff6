"""Logs: one JSON line for an event, or text on a terminal; and nothing in them that is secret.

Requests are logged by their path without the query, which may hold text of a corpus. Keys, signed
URLs and credentials are cut out of every line, wherever they come from. Of an exception that is not
ours only the type and the places in the code are logged: its message may quote data.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from logitstore.spec.errors import LogitstoreError
from logitstore_server.settings import ServerSettings

__all__ = ["Answered", "configure_logging", "log_request", "mask"]

_MASK = "***"
_SECRETS = (
    # keys of this service
    (re.compile(r"ls_([a-z2-7]{8})_[A-Za-z0-9_-]+"), rf"ls_\1_{_MASK}"),
    # credentials in URLs, and queries, which may be signed
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{_MASK}@"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s?\"']*)\?[^\s\"']*"), rf"\1?{_MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"']+"), rf"\1 {_MASK}"),
    (
        re.compile(r"(?i)\b(x-amz-[a-z-]*|sig|signature|secret\w*|password|token)=[^\s&\"']+"),
        rf"\1={_MASK}",
    ),
)
# What no pattern above can match in, unless it holds "://". Most texts are such short names.
_PLAIN = re.compile(r"[A-Za-z0-9/.:-]*")
# Quoted texts of at most this length are remembered.
_SHORT_TEXT = 256


def mask(text: str) -> str:
    """The text without keys, credentials and queries of URLs."""
    if _PLAIN.fullmatch(text) and "://" not in text:
        return text
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def configure_logging(settings: ServerSettings) -> None:
    """Send the logs of this process, uvicorn's included, to stderr."""
    global _lines
    as_text = settings.log_format == "text" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _describe_exception,
        _mask_all,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if as_text
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    _lines = None if as_text else sys.stderr
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    # Requests are logged by `Observation`, with what belongs to them.
    logging.getLogger("uvicorn.access").handlers = []
    logging.getLogger("uvicorn.access").propagate = False


class Answered(NamedTuple):
    """A request that was answered, or not, as it is counted and logged.

    Attributes:
        route: template of the path.
        store: that the request may read, or empty.
        status: 0 where no answer began.
        body_bytes: that were sent.
        complete: whether they are all of it.
        first_byte_s: from the request's head to the first of them.
        stream_s: from there to the last.
        request_id, trace_id: letters, digits, `.`, `_` and `-` alone.
    """

    method: str
    route: str
    path: str
    store: str
    status: int
    body_bytes: int
    complete: bool
    first_byte_s: float
    stream_s: float
    client: str
    request_id: str
    trace_id: str = ""


def log_request(told: Answered) -> None:
    """Log one answered request; past structlog, whose way is longer than sending a chunk."""
    if not _request_log.isEnabledFor(logging.INFO):
        return
    trace = f', "trace_id": "{told.trace_id}"' if told.trace_id else ""
    line = (
        f'{{"method": {_quoted(told.method)}, "path": {_quoted(told.path)}, '
        f'"status": {told.status}, "bytes": {told.body_bytes}, '
        f'"complete": {"true" if told.complete else "false"}, '
        f'"first_byte_s": {told.first_byte_s:.6f}, "stream_s": {told.stream_s:.6f}, '
        f'"client": {_quoted(told.client)}, "request_id": "{mask(told.request_id)}"{trace}'
    )
    if _lines is None:
        _log.info("request", **json.loads(line + "}"))
        return
    now = dt.datetime.now(dt.UTC).isoformat().replace("+00:00", "Z")
    _lines.write(f'{line}, "event": "request", "level": "info", "timestamp": "{now}"}}\n')
    _lines.flush()


def _quoted(text: str) -> str:
    # Clients choose how long a path is.
    return _short_quoted(text) if len(text) <= _SHORT_TEXT else _encode(mask(text))


@lru_cache(maxsize=4096)
def _short_quoted(text: str) -> str:
    return _encode(mask(text))


_log: Any = structlog.get_logger("logitstore_server")
_encode = json.JSONEncoder().encode
_request_log = logging.getLogger("logitstore_server")
# Where JSON lines about requests go; None: where every event goes.
_lines: TextIO | None = None


def _describe_exception(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error: Any = info[1] if isinstance(info, tuple) else info
    if not isinstance(error, BaseException):
        return event
    event["error"] = type(error).__name__
    if isinstance(error, LogitstoreError):
        event["kind"], event["message"] = error.kind, error.message
    event["stack"] = _frames(error.__traceback__)
    return event


def _frames(origin: TracebackType | None) -> list[str]:
    return [
        f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(origin)
    ]


def _mask_all(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {key: _masked(value) for key, value in event.items()}


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value
