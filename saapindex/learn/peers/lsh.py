"""MagicPIG: keys sampled by locality-sensitive hashing, with the weights of importance sampling."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.errors import InvalidInputError
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.select import best
from saapindex.params import check_integer

__all__ = ["MagicPIG", "hash_codes"]

_ID = 4  # bytes of a key's id in a bucket
_BOUNDS = 8  # bytes of a bucket's bounds
_NEVER = 255  # table of a second collision that does not come


def hash_codes(x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """Return which side of each hyperplane every row lies on, packed into one integer a table.

    Parameters
    ----------
    x
        float32, (..., d).
    planes
        float32, (tables, d, bits): normals, at most 15 bits.

    Returns
    -------
    Tensor
        int64, (tables, ...).

    Examples
    --------
    >>> hash_codes(torch.tensor([[1.0, -1.0]]), torch.eye(2)[None]).tolist()
    [[1]]
    """
    powers = 2.0 ** torch.arange(planes.shape[2], device=x.device)
    return torch.stack([((x @ table > 0).float() @ powers).long() for table in planes])


class MagicPIG(Peer):
    """MagicPIG (Chen et al., *MagicPIG: LSH Sampling for Efficient LLM Generation*, arXiv 2410.16179,
    section 4).

    Keys less their mean are hashed by random hyperplanes into `tables` tables of ``2**bits`` buckets. A key
    that shares at least two buckets with the query is fetched, and its weight is divided by the chance of
    that, which depends on the angle between the two: the sampled sums then estimate those over all keys. To
    keep to a budget, tables are visited one after the other until another one would not fit, and the
    chances are those for the tables visited. A group fetches what any of its heads samples, and the chances
    are those of the union, as if the heads were independent.

    With ``estimate=False`` nothing is sampled: all tables are visited, and the keys of the most collisions,
    summed over the group, are fetched as far as the budget goes (ties by lower id).

    Reads: for every table visited the ids in the query's bucket at 4 bytes and the bucket's bounds, 8
    bytes, for every head, or the codes of all keys, ``bits`` each, where that is less; keys and values
    fetched. The hyperplanes are not counted, since all heads and layers share them.

    Parameters
    ----------
    bits, tables
        The paper's K and L; 10 and 150.
    estimate
        Whether fetched keys are weighted by their chance.
    seed
        Of the hyperplanes.

    Raises
    ------
    InvalidInputError
        If a number is out of range: at most 15 bits and 254 tables.
    """

    name: ClassVar[str] = "MagicPIG"
    source: ClassVar[str] = "arXiv 2410.16179"

    def __init__(self, bits: int = 10, tables: int = 150, estimate: bool = True, seed: int = 0) -> None:
        check_integer("bits", bits, 1)
        check_integer("tables", tables, 2)
        if bits > 15 or tables >= _NEVER:
            raise InvalidInputError(
                f"bits is {bits} and tables is {tables}, expected at most 15 and {_NEVER - 1}"
            )
        self.bits, self.tables, self.estimate, self.seed = bits, tables, estimate, seed

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return the authors' 10 bits in 150 tables and cheaper ones, weighted and by collisions."""
        shapes = ((10, 150), (8, 75))
        return [{"bits": k, "tables": t, "estimate": e} for e in (True, False) for k, t in shapes]

    def build(self, context: Context) -> None:
        """Hash the keys less their mean, which adds the same to all logits of a query, and sort each
        table.
        """
        super().build(context)
        d, device = context.keys.shape[1], context.keys.device
        generator = torch.Generator().manual_seed(self.seed)
        self._planes = torch.randn(self.tables, d, self.bits, generator=generator).to(device)
        self._keys = context.keys - context.keys.mean(0)
        codes = hash_codes(self._keys, self._planes)
        self._order = codes.argsort(dim=1, stable=True).int()
        self._sizes = torch.stack([torch.bincount(table, minlength=2**self.bits) for table in codes])

    def read(self, queries: Queries, budget: float) -> Read:
        """Read buckets and the keys that they hold at least twice."""
        return next(self.reads(queries, [budget]))

    def reads(self, queries: Queries, budgets: Sequence[float]) -> Iterator[Read]:
        """Yield what is read at each of `budgets`, from one pass over the tables."""
        bound = len(self.context.keys) * self.bits / 8
        codes = hash_codes(queries.x, self._planes)
        sizes = self._sizes.gather(1, codes.flatten(1)).view(codes.shape).double()
        lists = (
            (sizes * _ID + _BOUNDS).sum(1).clamp(max=bound).T
        )  # (m, tables): bytes of finding what collides
        if self.estimate:
            yield from self._sampled(queries, codes, lists.cumsum(1), budgets)
        else:
            yield from self._most(codes, lists.sum(1), budgets)

    def _collisions(self, codes: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield for each table the pairs that collide, as places in a flat (g, m, n) array."""
        n = len(self._keys)
        for table, buckets in enumerate(codes.flatten(1)):
            sizes = self._sizes[table]
            lengths, starts = sizes[buckets], (sizes.cumsum(0) - sizes)[buckets]
            rows = torch.arange(len(buckets), device=codes.device).repeat_interleave(lengths)
            before = lengths.cumsum(0) - lengths
            within = torch.arange(len(rows), device=codes.device) - before[rows]
            yield rows * n + self._order[table][starts[rows] + within]

    def _sampled(
        self, queries: Queries, codes: torch.Tensor, lists: torch.Tensor, budgets: Sequence[float]
    ) -> Iterator[Read]:
        """Keys that collide twice in some head, with the weights that correct for those that did not."""
        context = self.context
        (g, m, _), n, row = queries.x.shape, len(self._keys), context.row
        seen = torch.zeros(g * m * n, dtype=torch.bool, device=codes.device)
        second = torch.full((g * m * n,), _NEVER, dtype=torch.uint8, device=codes.device)
        for table, pairs in enumerate(self._collisions(codes)):
            again = pairs[seen[pairs]]
            second[again] = second[again].clamp(max=table)
            seen[pairs] = True
        first = functools.reduce(
            torch.minimum, second.view(g, m, n)
        )  # the table that brings a key to the group
        new = torch.zeros(m, _NEVER + 1, dtype=torch.int64, device=codes.device)
        new.scatter_add_(1, first.long(), torch.ones_like(first, dtype=torch.int64))
        cost = lists + new[:, : self.tables].cumsum(1) * row

        logits = queries.x @ self._keys.T
        norms = queries.x.norm(dim=-1, keepdim=True) * self._keys.norm(dim=-1)
        same = 1 - torch.acos((logits / norms.clamp(min=1e-30)).clamp(-1, 1)) / torch.pi
        chance = same**self.bits
        logits = (queries.x @ context.keys.T) * context.scale
        spent = torch.cat([lists.new_zeros(m, 1), lists], 1)
        for budget in budgets:
            tables = (cost <= budget).sum(1)
            keys = first < tables[:, None]
            missed, count = 1 - chance, tables[:, None]
            never = missed**count + count * chance * missed ** (count - 1).clamp(min=0)
            drawn = 1 - functools.reduce(torch.mul, never.clamp(0, 1))
            # A key weighs 1 already, since it is fetched: what is missing to 1 / chance goes to the
            # remainder. The authors add 1e-4 to the chance.
            missing = (1 / (drawn + 1e-4) - 1).clamp(min=0).log()
            weights = (logits + missing).masked_fill(~keys, -torch.inf)
            read = spent.gather(1, count)[:, 0] + keys.sum(1) * row
            yield Read(keys, read.float(), weights, context.values)

    def _most(self, codes: torch.Tensor, lists: torch.Tensor, budgets: Sequence[float]) -> Iterator[Read]:
        """Keys of the most collisions in all tables."""
        (_, g, m), n, row = codes.shape, len(self._keys), self.context.row
        hits = torch.zeros(g * m * n, dtype=torch.uint8, device=codes.device)
        for pairs in self._collisions(codes):
            hits[pairs] += 1
        total = hits.view(g, m, n).sum(0, dtype=torch.int64)
        # Scores are distinct, so that ties go to the lower id; a key without a collision is never read.
        scores = (
            (total * n - torch.arange(n, device=codes.device)).double().masked_fill(total == 0, -torch.inf)
        )
        for budget in budgets:
            keys = best(scores, ((budget - lists) / row + 1e-9).clamp(min=0).long())
            yield Read(keys, (lists + keys.sum(1) * row).float())
