"""The step that reads whole lists: on clusters of blocks, which only some devices have."""

from __future__ import annotations

from typing import Any, NamedTuple

from saapindex.backends.cuda.step import BINS, OWN

__all__ = ["Shape", "whole_shared"]


class Shape(NamedTuple):
    """How the kernel is launched.

    Attributes
    ----------
    cluster
        Blocks of a unit: a query token of a stream.
    threads
        Of a block.
    stages
        Tiles of a warp that are on their way at once.
    """

    cluster: int
    threads: int
    stages: int


def whole_shared(shape: Shape, d: int, group: int, lists: int, most_pages: int, itemsize: int) -> int:
    """Return the shared memory of a block in bytes."""
    warps, steps = shape.threads // 32, -(-d // 16)
    sliced = 4 * shape.cluster * -(-group * d // shape.cluster)
    fixed = (
        48
        + 4 * group * d
        + 3 * 32 * (8 * steps + 4)
        + max(4 * (BINS + 3 * OWN), sliced)
        + 8 * group * warps
        + 4 * group * (5 * shape.cluster + 5)
        + 64
    )
    tile = 32 * (16 * steps * itemsize + 16)
    tiles = warps * max(shape.stages * tile, -(-4 * group * (d + 1) // 16) * 16)
    own = -(-lists // shape.cluster)
    return fixed + tiles + 8 * lists + 4 * own * (group + 1) + 4 * -(-most_pages // shape.cluster) + 16
