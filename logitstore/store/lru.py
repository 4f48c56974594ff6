"""A small cache that threads share and that starts empty in other processes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["ProcessLRU"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ProcessLRU(Generic[K, V]):
    """Least recently used values, up to a total weight.

    A forked child must not wait for a lock that a thread of its parent held at the fork, nor trust
    what that thread was changing; so it starts anew. Dropped values are not closed: arrays may
    still look into them.
    """

    def __init__(self, capacity: int, weight: Callable[[V], int]) -> None:
        """`weight` is a module's function, so that the cache's owner can be sent to workers."""
        self._capacity = capacity
        self._weight = weight
        self.clear()

    def __reduce__(self) -> tuple[object, ...]:
        return ProcessLRU, (self._capacity, self._weight)

    def clear(self) -> None:
        """Forget everything."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._values: OrderedDict[K, V] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value, None when it is not held."""
        if self._pid != os.getpid():
            self.clear()
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> V:
        """Hold a value; the one already held for the key is kept and returned."""
        with self._lock:
            held = self._values.setdefault(key, value)
            if held is value:
                self._held += self._weight(value)
            while self._held > self._capacity and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                self._held -= self._weight(dropped)
        return held
