"""Any order of adding, cutting, forking, reordering, saving and loading, against a dense model."""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from saapindex.attention import AttentionIndex

SHARES = st.floats(0, 1)


def machine(draw, dense, codebook, backend):
    class Machine(RuleBasedStateMachine):
        @initialize(
            batch=st.integers(1, 3),
            window=st.sampled_from([0, 1, 20, 33]),
            sinks=st.sampled_from([0, 1, 17]),
            flush=st.sampled_from([1, 16, 40]),
            dense_below=st.sampled_from([0, 90]),
            adapt=st.sampled_from([0, 1]),
            seed=st.integers(0, 99),
        )
        def start(self, batch, seed, **how):
            self.rng = np.random.default_rng(seed)
            self.index = AttentionIndex(codebook, batch=batch, dtype="float32", backend=backend, **how)
            self.model = dense(batch)
            self.others = []

        @rule(n=st.integers(0, 90))
        def add(self, n):
            keys, values = draw(self.rng, self.index.batch, n)
            self.index.add(keys, values)
            for b in range(self.index.batch):
                self.model.add(b, keys[b], values[b])

        @rule(n=st.integers(1, 40), lengths=st.lists(st.integers(0, 40), min_size=4, max_size=4))
        def add_padded(self, n, lengths):
            keys, values = draw(self.rng, self.index.batch, n)
            lengths = np.minimum(lengths, n)[: self.index.batch]
            lengths = np.pad(lengths, (0, self.index.batch - len(lengths)))
            self.index.add(keys, values, lengths=lengths)
            for b, length in enumerate(lengths):
                self.model.add(b, keys[b, :, n - length :], values[b, :, n - length :])

        @rule(steps=st.integers(1, 20))
        def decode(self, steps):
            for _ in range(steps):
                self.add(1)

        @rule(share=SHARES, alone=st.booleans())
        def truncate(self, share, alone):
            n = round(share * max(self.model.lengths))
            self.index.truncate(n, sequence=0 if alone else None)
            for b in range(1 if alone else self.index.batch):
                self.model.cut(b, n)

        @rule(back=st.integers(1, 8))
        def take_back(self, back):
            lengths = np.maximum(np.array(self.model.lengths) - back, 0)
            self.index.truncate(lengths)
            for b, n in enumerate(lengths):
                self.model.cut(b, n)

        @rule(order=st.lists(st.integers(0, 2), min_size=1, max_size=4))
        def reorder(self, order):
            order = [i % self.index.batch for i in order]
            self.index.reorder(order)
            self.model.reorder(order)

        @rule()
        def fork(self):
            """Go on with the fork, and keep the other: it must not notice."""
            other, known = self.index, dense(self.index.batch)
            known.keys, known.values = list(self.model.keys), list(self.model.values)
            self.index = self.index.fork()
            self.others = [*self.others[-2:], (other, known)]

        @rule()
        def swap(self):
            """Go on with one that was kept, and keep this one."""
            if self.others:
                (self.index, self.model), *rest = *self.others, (self.index, self.model)
                self.others = rest

        @rule()
        def save_and_load(self):
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "index.safetensors"
                self.index.save(path)
                self.index = AttentionIndex.load(path, codebook, backend=backend)

        @invariant()
        def is_the_dense_model(self):
            if not hasattr(self, "index"):
                return
            for index, model in ((self.index, self.model), *self.others):
                assert index.lengths.tolist() == model.lengths
                self.check(index, model)

        def check(self, index, model):
            q = self.rng.standard_normal((index.batch, 6, 16)).astype(np.float32)
            out, lse = index.attend(q, budget=1.0)
            sparse, _ = index.attend(q, budget=0.3)
            selected, whole = index.select(q, budget=0.3), index.select(q, budget=1.0)
            probed = index.select(q, nprobe=2)
            for b in range(index.batch):
                known, known_lse = model.attend(b, q[b], model.lengths[b])
                np.testing.assert_allclose(out[b], known, rtol=1e-3, atol=2e-4)
                np.testing.assert_allclose(lse[b], known_lse, rtol=1e-4, atol=1e-4)
                self.check_lists(index, model, b, selected, whole, probed)
                if not whole.lengths[b].any():
                    np.testing.assert_allclose(sparse[b], known, rtol=1e-3, atol=2e-4)
            assert np.isfinite(sparse).all()

        def check_lists(self, index, model, b, selected, whole, probed):
            start, sinks, n = int(whole.window_start[b]), index.sinks, model.lengths[b]
            # Every key is in exactly one place, and at least a window of them out of the lists.
            assert (whole.ids[b, :, : start - sinks] == np.arange(sinks, start)).all()
            assert (whole.lengths[b] == start - sinks).all()
            assert start == sinks or n - start >= index.window
            for chosen in (selected, probed):
                for ids, length in zip(chosen.ids[b], chosen.lengths[b], strict=True):
                    assert (ids[length:] == -1).all()
                    assert (np.diff(ids[:length]) > 0).all()
                    assert ((ids[:length] >= sinks) & (ids[:length] < start)).all()

            if index._batch:
                self.check_statistics(index, b)

        def check_statistics(self, index, b):
            """Codes are those of the keys relative to the anchor that stands beside them; sums are sums."""
            pool, table = index._batch.keeping.pool, index._batch.sequences[b].lists
            rows = table.rows(np.zeros_like(table.sizes), table.sizes)
            lists = np.repeat(np.arange(len(table.sizes)), table.sizes)
            keys, values, words, exponents = (
                pool.pages.take(field, rows) for field in ("keys", "values", "codes", "exponents")
            )
            residuals = keys - table.anchors[lists] * table.anchor_scales[lists, None]
            member = lists == np.arange(len(table.sizes))[:, None]
            np.testing.assert_allclose(table.sums, member @ values, atol=1e-2)
            for h in range(codebook.heads):
                here = lists // codebook.nlist == h
                known = index.ops.encode(residuals[None, here], codebook.code.view.head(h))
                assert (words[here] == known[0][0]).mean() > 0.98 if here.any() else True
                assert (exponents[here] == known[1][0]).mean() > 0.98 if here.any() else True
                scale = codebook.code.base[h] * 2.0 ** ((exponents.astype(float) - 128) / 16)
                part = slice(h * codebook.nlist, (h + 1) * codebook.nlist)
                np.testing.assert_allclose(
                    table.squares[part], (member @ scale**2)[part], rtol=1e-3, atol=1e-2
                )

        def teardown(self):
            if hasattr(self, "index"):
                pools = {id(i._batch.keeping.pool): i._batch.keeping.pool for i, _ in self.held() if i._batch}
                self.index, self.others = None, []
                assert [pool.used for pool in pools.values()] == [0] * len(pools)

        def held(self):
            return [(self.index, self.model), *self.others]

    return Machine


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_any_order_of_changes(data, dense, codebook, backend):
    case = machine(data, dense, codebook, backend).TestCase
    case.settings = settings(deadline=None, max_examples=20, stateful_step_count=20, derandomize=True)
    case("runTest").runTest()
