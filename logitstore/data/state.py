"""What a loader saves, and what it refuses to load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from logitstore.spec.document import Strict
from logitstore.spec.errors import StateError

__all__ = ["LoaderState"]

Count = Annotated[int, Field(ge=0)]


class LoaderState(Strict):
    """A place inside an epoch, the same for all ranks that have made the same number of steps.

    Attributes:
        version: of this form.
        snapshot: `Snapshot.as_state()`: the store and the commits whose order is being read.
        order: seed, filter and whatever else decides the order.
        epoch: number of the epoch.
        world_size: ranks that share `intervals`.
        intervals: places of the epoch's order that were left when these ranks began.
        consumed: places that each rank has read of its part of them.
    """

    version: Literal[1] = 1
    snapshot: dict[str, JsonValue]
    order: dict[str, JsonValue]
    epoch: Count
    world_size: Annotated[int, Field(ge=1)]
    intervals: tuple[tuple[Count, Count], ...]
    consumed: Count

    @model_validator(mode="after")
    def _ascending(self) -> LoaderState:
        ends = [place for interval in self.intervals for place in interval]
        if ends != sorted(ends):
            raise ValueError("intervals must ascend and not overlap")
        return self

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> LoaderState:
        """The state in a mapping that `state_dict()` returned, or that JSON gave back.

        Raises: StateError state-malformed.
        """
        try:
            return cls.model_validate_json(json.dumps(state))
        except (ValidationError, TypeError, ValueError, RecursionError) as error:
            raise StateError(
                "state-malformed",
                f"not a loader state: {error}",
                expected="what loader.state_dict() returned",
            ) from None

    def check_order(self, parameters: Mapping[str, Any], *, where: object) -> None:
        """Refuse a state whose order another dataset would not continue.

        Raises: StateError state-mismatch, naming every parameter that differs.
        """
        # As JSON gives it back, so that tuples and lists are alike.
        here = json.loads(json.dumps(dict(parameters)))
        names = [n for n in here.keys() | self.order.keys() if here.get(n) != self.order.get(n)]
        if names:
            raise StateError(
                "state-mismatch",
                "the state was saved with another order of samples",
                where=where,
                got=", ".join(f"{n}={self.order.get(n)!r}" for n in sorted(names)),
                expected=", ".join(f"{n}={here.get(n)!r}" for n in sorted(names)),
                hint="make the dataset with the arguments it had when the state was saved",
            )
