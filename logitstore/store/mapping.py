"""Whole files as views of the page cache: no copy, and no memory beside the kernel's own."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

__all__ = ["MAX_MAPPINGS", "mapped"]

# Linux allows a process 65,530, which its allocator and libraries need as well.
MAX_MAPPINGS = 8_192

# Of Linux 5.14; Python has no name for it.
_MADV_POPULATE_READ = 22

# Address of each mapping that somebody looks into -> what removes it from here.
_alive: dict[int, weakref.ref[Any]] = {}


def mapped(path: str) -> memoryview | None:
    """A file's bytes; valid for as long as anything looks into them, also after its removal.

    Nobody may shorten the file: touching pages beyond its end kills the process. So does touching
    a page that the disk cannot read, and therefore all are brought in first, which reports it.

    Returns: None where the file cannot be mapped, or the process has mapped too many: read it.
    Raises: OSError of opening it.
    """
    # Not Python's mmap: it holds a file descriptor, of which a process has often only 1,024.
    import pyarrow as pa

    if len(_alive) >= MAX_MAPPINGS:
        return None
    with pa.memory_map(path) as file:
        buffer = file.read_buffer()
    if _madvise()(buffer.address, buffer.size, _MADV_POPULATE_READ) != 0:
        return None
    address = buffer.address
    # Called before the memory is unmapped, so that no other mapping has this address yet.
    _alive[address] = weakref.ref(buffer, lambda _: _alive.pop(address, None))
    return memoryview(buffer).cast("B")


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
