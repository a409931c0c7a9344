"""Progress on long work: a rich bar where rich is installed, plain lines where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool = True) -> Iterator[T]:
    """Yield from `items`, showing on stderr how far the loop has come.

    Parameters
    ----------
    items
        What to loop over; the bar has an end where its length is known.
    description
        What is being done.
    show
        Whether anything is shown.

    Examples
    --------
    >>> list(track([1, 2], "counting", show=False))
    [1, 2]
    """
    if not show:
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        for done, item in enumerate(items, 1):
            yield item
            print(f"{description}: {done}/{total or '?'}", file=sys.stderr)
    else:
        yield from rich_track(items, description, total, console=Console(stderr=True), transient=True)
