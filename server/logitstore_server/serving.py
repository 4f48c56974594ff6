"""Runs the service: binds the port, starts the workers, ends them in order."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

from pydantic import SecretStr
from starlette.types import ASGIApp
from uvicorn import Server
from uvicorn.supervisors import Multiprocess

from logitstore.spec.errors import UsageError
from logitstore_server.app import create_app
from logitstore_server.guard import GuardedConfig
from logitstore_server.keys import read_keys
from logitstore_server.logs import configure_logging
from logitstore_server.metrics import MULTIPROCESS_DIR
from logitstore_server.secure import secure
from logitstore_server.settings import ServerSettings

__all__ = ["serve"]

_BACKLOG = 2048
_WORKER_PATIENCE_S = 60
_METRICS_FILE = re.compile(r"(counter|histogram|gauge_[a-z]+)_\d+\.db")


def serve(
    settings: ServerSettings,
    create_app: Callable[[ServerSettings], ASGIApp] = create_app,
    *,
    on_bound: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    On SIGTERM `/readyz` turns false; after `shutdown_delay_s` the port closes; requests in flight
    have `drain_timeout_s` to finish, and are then cut, short of their announced length.

    Args:
        create_app: makes the application in each worker; a function of a module, as workers are new
            processes.
        on_bound: told the service's URL once its port is bound.

    Raises: UsageError unsafe-bind, bad-argument (the port is taken); StorageError keys-file.
    """
    settings.require_safe_bind()
    if settings.keys_file is not None:
        read_keys(settings.keys_file)
    if settings.session_secret is None:
        # Here, before the workers are made, so that they agree.
        secret = SecretStr(secrets.token_hex(32))
        settings = settings.model_copy(update={"session_secret": secret})
    configure_logging(settings)
    with contextlib.closing(_bound_socket(settings)) as listener, _metrics_dir(settings):
        config = GuardedConfig(
            functools.partial(_guarded_app, settings, create_app),
            factory=True,
            guard=settings,
            workers=settings.workers,
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=round(settings.drain_timeout_s),
            # A worker answers its parent once it has imported everything. On a busy machine that
            # takes a while, and a worker killed meanwhile would never get there.
            timeout_worker_healthcheck=_WORKER_PATIENCE_S,
        )
        if on_bound is not None:
            on_bound(_url(listener))
        if settings.workers == 1:
            Server(config).run(sockets=[listener])
        else:
            Multiprocess(config, sockets=[listener]).run()


def _guarded_app(
    settings: ServerSettings, create_app: Callable[[ServerSettings], ASGIApp]
) -> ASGIApp:
    configure_logging(settings)
    if settings.workers > 1:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    return secure(create_app(settings), settings)


def _end_with_parent() -> None:
    """End at once when the parent is gone: killed, it could end no worker, and the port would stay
    taken for whoever starts the service again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _bound_socket(settings: ServerSettings) -> socket.socket:
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            "bad-argument",
            f"cannot listen: {error.strerror}",
            where="host, port",
            got=f"{settings.host}:{settings.port}",
            hint="another program may use the port; --port 0 takes a free one",
        ) from None
    listener.set_inheritable(True)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _metrics_dir(settings: ServerSettings) -> Iterator[None]:
    """Several workers add up their metrics in a folder, named by the environment they inherit."""
    if settings.workers == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if settings.metrics_dir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="logitstore-metrics-"))
        else:
            folder = str(settings.metrics_dir)
            for entry in list(os.scandir(folder)):  # of a run before
                if _METRICS_FILE.fullmatch(entry.name):
                    os.unlink(entry.path)
        os.environ[MULTIPROCESS_DIR] = folder
        try:
            yield
        finally:
            del os.environ[MULTIPROCESS_DIR]
