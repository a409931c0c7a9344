"""Published methods of sparse attention, one small class each, to compare at equal bytes. They need torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from saapindex.errors import MissingDependencyError
from saapindex.learn.peers.base import Context, Peer, Queries, Read

__all__ = ["PEERS", "Context", "Peer", "Queries", "Read"]

_HOMES = {
    "a2ats": "a2ats.A2ATS",
    "exact": "baselines.ExactTopK",
    "faiss": "faiss_ivf.FaissOffline",
    "faiss-context": "faiss_ivf.FaissInContext",
    "hisa": "hisa.HISA",
    "hyperattention": "hyper.HyperAttention",
    "ladder": "ladder.Ladder",
    "magicpig": "lsh.MagicPIG",
    "quest": "quest.Quest",
    "random": "baselines.RandomKeys",
    "retroinfer": "clusters.RetroInfer",
    "saap": "paper.SAAP",
    "sale": "scan4.SALE",
    "window": "baselines.WindowOnly",
}


class _Registry(Mapping[str, type[Peer]]):
    """Names to classes; a class is imported when it is asked for, so that listing names needs no torch."""

    def __getitem__(self, name: str) -> type[Peer]:
        module, attribute = _HOMES[name].split(".")
        try:
            importlib.import_module("torch")
        except ImportError as error:
            raise MissingDependencyError("torch", "comparing methods of attention", "learn") from error
        peer: type[Peer] = getattr(importlib.import_module(f"saapindex.learn.peers.{module}"), attribute)
        return peer

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


PEERS: Mapping[str, type[Peer]] = _Registry()
"""Every method by the name that the command line uses."""
