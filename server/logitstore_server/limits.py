"""How much one client may ask for: rates and requests in flight, in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["Gate", "RateLimit"]

# Clients remembered at once. Who is forgotten starts with a full burst again.
_MAX_CLIENTS = 10_000


class RateLimit:
    """A token bucket for each client: `burst` requests at once, then `per_s` a second.

    Kept in the memory of one worker process; several workers together allow several times as much.
    """

    def __init__(
        self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        # client -> (tokens at that time, time); the least recently used first.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str) -> float:
        """Seconds until the client may send again; 0 when it may now."""
        return max(0.0, (1 - self._tokens(client, self._clock())) / self._per_s)

    def take(self, client: str) -> float:
        """Count one request: 0 when it is allowed, else the seconds to wait."""
        now = self._clock()
        tokens = self._tokens(client, now)
        if tokens < 1:
            return (1 - tokens) / self._per_s
        self._buckets[client] = (tokens - 1, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0

    def _tokens(self, client: str, now: float) -> float:
        tokens, then = self._buckets.get(client, (self._burst, now))
        return min(self._burst, tokens + (now - then) * self._per_s)


class Gate:
    """Counts requests in flight, in all and of each client."""

    def __init__(self, total: int, per_client: int) -> None:
        self._total = total
        self._per_client = per_client
        self._in_flight: dict[str, int] = {}
        self._sum = 0

    def enter(self, client: str) -> str | None:
        """Count a request in; or name the limit that it would break, "total" or "client"."""
        if self._sum >= self._total:
            return "total"
        count = self._in_flight.get(client, 0)
        if count >= self._per_client:
            return "client"
        self._in_flight[client] = count + 1
        self._sum += 1
        return None

    def has_room(self, client: str) -> bool:
        """Whether `enter` would let the client in."""
        return self._sum < self._total and self._in_flight.get(client, 0) < self._per_client

    def leave(self, client: str) -> None:
        """Count a request out that `enter` let in."""
        self._sum -= 1
        self._in_flight[client] -= 1
        if not self._in_flight[client]:
            del self._in_flight[client]
