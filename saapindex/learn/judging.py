"""How far the output of the index is from dense attention on held-out sequences: what views are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from saapindex.codes import TransformCode
from saapindex.errors import InvalidInputError
from saapindex.learn.contexts import Context
from saapindex.learn.evaluation.measures import query_errors
from saapindex.learn.evaluation.snapshot import Snapshot
from saapindex.learn.layer_job import LayerJob
from saapindex.learn.peers import base
from saapindex.learn.peers.ladder import Ladder, Learned
from saapindex.learn.texts import TAIL
from saapindex.partition import View

__all__ = ["LOOKUP", "Candidate", "chosen", "freeze", "index_errors", "log_errors"]

# Query positions of a sequence that ask.
_QUERIES = 128
# A query looks something up where one key far back has this share of its attention.
LOOKUP = 0.2


class Candidate(NamedTuple):
    """Views for all heads, and what was trained in them.

    Attributes
    ----------
    views
        One for each head.
    metric
        float32, (heads, d, d), or None.
    centroids
        float32, (heads, nlist, d).
    """

    views: list[View]
    metric: torch.Tensor | None
    centroids: torch.Tensor


def index_errors(job: LayerJob, candidate: Candidate, code: TransformCode) -> torch.Tensor:
    """Return the mean relative error of the output of each head on each held-out sequence, and of lookups.

    The index is simulated by `Ladder` at a budget of ``settings.share`` of the bytes; measured is what
    it returns, whether the right lists were visited or the rest was estimated well.

    Parameters
    ----------
    job
        For the held-out sequences.
    candidate
        What the index would be made of.
    code
        Of all heads.

    Returns
    -------
    Tensor
        float64, (held-out sequences, 2, heads): of all queries, and of those that look something up: one key
        in the lists has a fifth of their attention or more. NaN where there is no such query, and of
        sequences of less than half the keys of the longest, for which the lists are too many.

    Raises
    ------
    InvalidInputError
        If the logits of the layer are capped, which the simulation does not know.
    """
    if job.softcap is not None:
        raise InvalidInputError(
            f"layers {list(job.layers)}: logits are capped, which judge='error' cannot simulate: expected "
            "judge='recall'"
        )
    found = torch.full((len(job.held_out), 2, job.heads), torch.nan, dtype=torch.float64)
    longest = max(len(context.key_positions) for context in job.held_out)
    for at, context in enumerate(job.held_out):
        if 2 * len(context.key_positions) < longest:
            continue
        for head in range(job.heads):
            metric = None if candidate.metric is None else candidate.metric[head]
            learned = Learned(
                candidate.views[head],
                candidate.centroids[head],
                metric,
                job.settings.spherical,
                code.head(head),
            )
            found[at, :, head] = _errors(job, freeze(job, context, head), learned)
    return found


def _errors(job: LayerJob, snapshot: Snapshot, learned: Learned) -> torch.Tensor:
    peer = Ladder(scan_share=job.settings.scan_share).learned(lambda n: learned)
    peer.build(snapshot.context)
    errors, peaks = query_errors(peer, snapshot, job.settings.share)
    lookups = peaks >= LOOKUP
    return torch.stack([errors.mean(), errors[lookups].mean()]).double().cpu()


def freeze(job: LayerJob, context: Context, head: int) -> Snapshot:
    """Return one head at the moment when the last queries of a context begin to ask, in its second half.

    Raises
    ------
    InvalidInputError
        If the context has no values, or no key lies before the window of these queries.
    """
    if context.values is None:
        raise InvalidInputError(f"{context.name}: the trace has no values, which judge='error' needs")
    end = int(context.key_positions[-1])
    late = (context.query_positions > end - min(TAIL, (end + 1) // 2)).nonzero()[:, 0]
    if not len(late):
        raise InvalidInputError(f"{context.name}: no query stands at the end, where views are judged")
    late = late[torch.linspace(0, len(late) - 1, min(_QUERIES, len(late))).round().long()]
    positions = context.query_positions[late]
    far = context.key_positions < positions[0] - job.settings.window
    if not far.any():
        raise InvalidInputError(
            f"{context.name}: no key lies more than {job.settings.window} positions before the last queries, "
            "expected a longer trace"
        )
    keys, values = context.keys[head].float(), context.values[head].float()
    rows = base.Context(
        keys[far], values[far], context.key_positions[far], job.rope, job.scale, window=job.settings.window
    )
    near = [keys[~far], values[~far], context.key_positions[~far]]
    if context.sinks is not None:
        first = [part[head].float() for part in context.sinks]
        first.append(torch.zeros(len(first[0]), dtype=torch.int64, device=keys.device))
        near = [torch.cat(pair) for pair in zip(first, near, strict=True)]
    queries = base.Queries(context.queries[head][:, late].float(), positions)
    return Snapshot(rows, queries, near[0], near[1], near[2], context.name)


def chosen(errors: Sequence[torch.Tensor], min_gain: float) -> list[int]:
    """Return the number of the candidate that each head takes.

    That of the least geometric mean, over the sequences and then over all queries and lookups: so a kind of
    query counts by how many times larger its error is, however rare it is. The first candidate is kept unless
    another's is less by `min_gain` of it.

    Parameters
    ----------
    errors
        What `index_errors` returns for each candidate.
    min_gain
        A share.

    Examples
    --------
    >>> rotated, unrotated = torch.tensor([[[0.01], [0.4]]]), torch.tensor([[[0.02], [0.1]]])
    >>> chosen([rotated, unrotated], 0.0)
    [1]
    """
    means = log_errors(errors)
    means[0] -= min_gain
    best: list[int] = means.argmin(dim=0).tolist()
    return best


def log_errors(errors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logarithms of the geometric means that `chosen` compares, (candidates, heads).

    Examples
    --------
    >>> log_errors([torch.tensor([[[1.0], [torch.nan]], [[1.0], [100.0]]])]).exp()
    tensor([[10.]])
    """
    return torch.stack([error.clamp(min=1e-6).log().nanmean(dim=0).nanmean(dim=0) for error in errors])
