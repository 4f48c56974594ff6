"""Containers: how the arrays of a record become the bytes of one shard object, and back.

Both keep the same promise: chunk c of every array holds the same whole samples and lies in one
contiguous byte range, which decodes with nothing but the header and the commit.
"""

from logitstore.containers.protocol import Container, ShardSummary, ShardWriter

__all__ = ["CONTAINERS", "Container", "ShardSummary", "ShardWriter", "container"]

CONTAINERS: tuple[str, ...] = ("zarr", "arrow")


def container(name: str) -> Container:
    """The container of that name, one of `CONTAINERS`.

    Raises: UsageError bad-argument.
    """
    # Each brings a heavy library (pcodec, pyarrow) that the other does not need.
    if name == "zarr":
        from logitstore.containers.zarr_shard import ZarrContainer

        return ZarrContainer()
    if name == "arrow":
        from logitstore.containers.arrow_shard import ArrowContainer

        return ArrowContainer()
    from logitstore.spec.errors import UsageError

    raise UsageError(
        "bad-argument", "no such container", got=repr(name), expected=" or ".join(CONTAINERS)
    )
