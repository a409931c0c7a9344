"""What a sparse-attention method is to the evaluation: it reads some of a context, and says what it read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from saapindex.errors import NotTrainedError

if TYPE_CHECKING:
    import torch

    from saapindex.rope import Rope

__all__ = ["Context", "Peer", "Queries", "Read"]


@dataclass(frozen=True)
class Context:
    """The long-range keys of one KV head: those past the sinks that have left the recent window.

    Attributes
    ----------
    keys, values
        float32, (n, d), on the device of the evaluation; keys rotated, as cached.
    positions
        int64, (n,), rising.
    rope
        The rotary embedding of the keys, or None.
    scale
        Of the logits.
    element
        Bytes of an element of a cached key or value (2 for float16 and bfloat16).
    window
        A query at position `p` sees the keys at positions below ``p - window``. In evaluation those are all
        keys; in training the queries stand anywhere in the sequence.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    rope: Rope | None
    scale: float
    element: int = 2
    window: int = 2047

    @property
    def row(self) -> int:
        """Bytes of one cached key and its value: the unit in which reads are counted."""
        return 2 * self.keys.shape[1] * self.element


@dataclass(frozen=True)
class Queries:
    """Queries of the `g` query heads that share a selection.

    Attributes
    ----------
    x
        float32, (g, m, d), rotated.
    positions
        int64, (m,).
    peaks
        float32, (g, m), or None: the largest logit among the keys that are always attended, which a method
        may use to bound its estimates.
    """

    x: torch.Tensor
    positions: torch.Tensor
    peaks: torch.Tensor | None = None


@dataclass(frozen=True)
class Read:
    """What a method read for each of `m` queries of `g` heads.

    Attributes
    ----------
    keys
        bool, (m, n): keys whose full key and value were fetched, shared by the `g` heads.
    bytes
        float32, (m,): all that was read: keys and values, statistics, codes, router weights.
    log_weights
        float32, (g, m, r), or None: natural log of the estimated sum of ``exp(scale * q . k)`` over parts
        of the keys that were not fetched (a list, a page, or single keys); minus infinity for none.
    values
        float32, (r, d), or None: the estimated mean value of each such part.
    shift
        float32, (g, m, d), or None: what is to be added to the weighted mean of `values`.
    """

    keys: torch.Tensor
    bytes: torch.Tensor
    log_weights: torch.Tensor | None = None
    values: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class Peer(ABC):
    """A method of sparse attention for one KV head.

    Class attributes `name` and `source` name it and say where it was published; `offline` tells whether `fit`
    must be called before `build`.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    offline: ClassVar[bool] = False

    _context: Context | None = None

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return the variants worth trying on contexts of `n` keys, as arguments of the constructor.

        The first is what its authors use, or comes closest to it. The evaluation picks among them on held-out
        sequences, never on those it reports.
        """
        return ({},)

    def fit(self, contexts: Sequence[Context], queries: Sequence[Queries]) -> None:  # noqa: B027
        """Learn offline from training sequences, one context and its queries each; nothing by default.

        The queries stand all over the sequence: each sees only the keys before its window.
        """

    def build(self, context: Context) -> None:
        """Prepare for one context, whose keys are then read."""
        self._context = context

    @property
    def context(self) -> Context:
        """The context that was built.

        Raises
        ------
        NotTrainedError
            Before `build`.
        """
        if self._context is None:
            raise NotTrainedError(f"{self.name} has no context to read, call build first")
        return self._context

    @abstractmethod
    def read(self, queries: Queries, budget: float) -> Read:
        """Read about `budget` bytes a query, from the context that was built, for a group together.

        A method never reads more than `budget`, unless its smallest unit is larger.
        """

    def reads(self, queries: Queries, budgets: Sequence[float]) -> Iterator[Read]:
        """Yield what `read` gives for each of `budgets`; for methods that can share work between them."""
        for budget in budgets:
            yield self.read(queries, budget)
