"""SAAP as published: un-rotated k-means, and a classifier of queries."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from saapindex.errors import InvalidInputError, NotTrainedError
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.cluster import cluster, nearest, sample
from saapindex.learn.peers.mass import list_mass
from saapindex.learn.peers.select import affordable, fill_lists, list_ranks, pooled
from saapindex.learn.peers.views import unrotate
from saapindex.params import check_integer
from saapindex.rope import Rope

__all__ = ["SAAP"]

_KEYS_PER_LIST = 256  # more training keys than this a list are sampled down, as Faiss does
_BATCH = 4096
_STEPS = 32  # of an epoch at least, where there are few queries


class SAAP(Peer):
    """SAAP (Mazaré et al., *Inference-time sparse attention with asymmetric indexing*, arXiv 2502.08246).

    Keys are partitioned by spherical k-means with RoPE undone. A two-layer MLP maps an un-rotated query to
    a distribution over the partitions, trained by cross-entropy on the attention mass that each partition
    receives from long-range keys. Partitions are visited by predicted mass until the budget is full, the
    last one in part. The paper leaves the width of the MLP and the treatment of grouped heads open: here
    one MLP serves the heads of a group, trained on the queries of all, and a group sums its predicted
    masses.

    Reads: the MLP's weights at 2 bytes each; keys and values visited.

    Parameters
    ----------
    nlist
        Partitions; 1024 in the paper.
    hidden
        Width of the MLP.
    count_router
        Whether the MLP's weights count as bytes read.
    queries
        Training positions that are used of each sequence, at most.
    epochs, patience
        Passes at most, and passes without a better loss on what is held out after which training stops. The
        last training sequence is held out, or the last tenth of the positions of a single one.
    seed
        Of k-means, the initial weights and the order.
    """

    name: ClassVar[str] = "SAAP"
    source: ClassVar[str] = "arXiv 2502.08246"
    offline: ClassVar[bool] = True

    def __init__(
        self,
        nlist: int = 1024,
        hidden: int = 128,
        count_router: bool = True,
        queries: int = 4096,
        epochs: int = 60,
        patience: int = 6,
        seed: int = 0,
    ) -> None:
        check_integer("nlist", nlist, 1)
        check_integer("hidden", hidden, 1)
        check_integer("queries", queries, 1)
        check_integer("epochs", epochs, 1)
        check_integer("patience", patience, 1)
        self.nlist, self.hidden, self.count_router, self.seed = nlist, hidden, count_router, seed
        self.queries, self.epochs, self.patience = queries, epochs, patience
        self._centroids: torch.Tensor | None = None

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return the paper's 1024 partitions and fewer, with MLPs of two widths."""
        lists = [nlist for nlist in (1024, 512, 256, 128) if nlist <= n // 16] or [max(1, n // 16)]
        return [{"nlist": nlist, "hidden": hidden} for nlist in lists for hidden in (128, 32)]

    @property
    def router_bytes(self) -> float:
        """Bytes of the MLP's weights and biases, in half precision."""
        return 2.0 * sum(parameter.numel() for parameter in self._model.parameters())

    def fit(self, contexts: Sequence[Context], queries: Sequence[Queries]) -> None:
        """Cluster the keys of all contexts, then train the MLP on their queries.

        Raises
        ------
        InvalidInputError
            If there are fewer keys than partitions, or no query sees a long-range key.
        """
        keys = [unrotate(context.keys, context.positions, context.rope) for context in contexts]
        rows = torch.cat(keys)
        if len(rows) < self.nlist:
            raise InvalidInputError(
                f"nlist is {self.nlist}, expected at most the {len(rows)} keys to train on"
            )
        rows = sample(rows, _KEYS_PER_LIST * self.nlist, self.seed)
        self._centroids = cluster(rows, self.nlist, 10, spherical=True, seed=self.seed)
        data = [
            self._examples(context, some, nearest(x, self._centroids, spherical=True))
            for context, some, x in zip(contexts, queries, keys, strict=True)
        ]
        if not any(len(x) for x, _ in data):
            raise InvalidInputError(
                "no training query sees a key beyond its window, so there is nothing to learn"
            )
        *train, held = data
        if not train:
            cut = max(1, len(held[0]) // 10)
            train, held = [(held[0][:-cut], held[1][:-cut])], (held[0][-cut:], held[1][-cut:])
        self._train(torch.cat([x for x, _ in train]), torch.cat([mass for _, mass in train]), *held)

    def _examples(
        self, context: Context, queries: Queries, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated queries by rising position, and the mass of each partition."""
        useful = (queries.positions - context.window > context.positions[0]).nonzero()[:, 0]
        if len(useful) > self.queries:
            useful = useful[torch.linspace(0, len(useful) - 1, self.queries, device=useful.device).long()]
        some = Queries(queries.x[:, useful], queries.positions[useful])
        mass, _ = list_mass(context, some, labels, self.nlist)
        features = unrotate(some.x, some.positions, context.rope)
        return features.transpose(0, 1).flatten(0, 1), mass.transpose(0, 1).flatten(0, 1)

    def _train(
        self, x: torch.Tensor, mass: torch.Tensor, held_x: torch.Tensor, held_mass: torch.Tensor
    ) -> None:
        self._spread = float(x.std()) or 1.0
        with torch.random.fork_rng(devices=()):  # the caller's random numbers go on as they would
            torch.manual_seed(self.seed)
            model = self._classifier(x.shape[1]).to(x.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        generator = torch.Generator().manual_seed(self.seed)

        def loss(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return -(target * torch.log_softmax(model(features / self._spread), 1)).sum(1).mean()

        batch = max(1, min(_BATCH, len(x) // _STEPS))
        lowest, waited, weights = float("inf"), 0, copy.deepcopy(model.state_dict())
        for _ in range(self.epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            with torch.enable_grad():
                for rows in torch.split(order, batch):
                    optimizer.zero_grad()
                    torch.autograd.backward(loss(x[rows], mass[rows]))
                    optimizer.step()
            with torch.no_grad():
                parts = zip(torch.split(held_x, 8192), torch.split(held_mass, 8192), strict=True)
                held = sum(float(loss(*part)) * len(part[0]) for part in parts) / len(held_x)
            waited += 1
            if held < lowest:
                lowest, waited, weights = held, 0, copy.deepcopy(model.state_dict())
            if waited >= self.patience:
                break
        model.load_state_dict(weights)
        self._model = model

    def _classifier(self, d: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(d, self.hidden), torch.nn.ReLU(), torch.nn.Linear(self.hidden, self.nlist)
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what `fit` learnt, by name.

        Raises
        ------
        NotTrainedError
            Before `fit`.
        """
        if self._centroids is None:
            raise NotTrainedError(f"{self.name} has no partition, call fit first")
        spread = torch.tensor([self._spread])
        return {"centroids": self._centroids, "spread": spread, **self._model.state_dict()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> Self:
        """Take what another of the same arguments learnt, in place of `fit`; return self.

        Raises
        ------
        InvalidInputError
            If a tensor is missing or does not fit.
        """
        weights = {name: tensor for name, tensor in state.items() if name not in ("centroids", "spread")}
        try:
            centroids, spread = state["centroids"], float(state["spread"])
            model = self._classifier(centroids.shape[1])
            model.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise InvalidInputError(f"the state does not fit {self.nlist} lists: {error}") from error
        if len(centroids) != self.nlist:
            raise InvalidInputError(f"the state has {len(centroids)} centroids, expected {self.nlist}")
        self._centroids, self._spread, self._model = centroids, spread, model.to(centroids.device)
        return self

    def build(self, context: Context) -> None:
        """Assign the keys to partitions."""
        if self._centroids is None:
            raise NotTrainedError(f"{self.name} has no partition, call fit first")
        super().build(context)
        seen = unrotate(context.keys, context.positions, context.rope)
        self._labels = nearest(seen, self._centroids, spherical=True)
        self._ranks, self._sizes = list_ranks(self._labels, self.nlist)

    @torch.no_grad()
    def predict(self, queries: Queries, rope: Rope | None) -> torch.Tensor:
        """Return the log of the attention mass that each partition is predicted to hold, (g, m, nlist)."""
        features = unrotate(queries.x, queries.positions, rope)
        return torch.log_softmax(self._model(features / self._spread), -1)

    @torch.no_grad()
    def read(self, queries: Queries, budget: float) -> Read:
        """Read the MLP and the partitions of the largest predicted mass."""
        context = self.context
        predicted = pooled(self.predict(queries, context.rope))
        predicted = predicted.masked_fill(self._sizes == 0, -torch.inf)
        fixed = self.router_bytes if self.count_router else 0.0
        count = affordable(budget - fixed, context.row)
        keys = fill_lists(predicted, self._labels, self._ranks, self._sizes, count)
        return Read(keys, fixed + keys.sum(1).float() * context.row)
