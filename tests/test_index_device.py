"""An index on a device: the answers of the same index on the host, for arrays of either."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cupy")]
D, NLIST = 16, 12


def whole(rng, *shape):
    """Small integers: every score is exact, and ties are many."""
    return rng.integers(-3, 4, shape).astype(np.float32)


@pytest.fixture
def made():
    """An index on the host, and the same on the device: `made(n, metric, **settings)`."""

    def make(n=500, metric=sx.METRIC_INNER_PRODUCT, **settings):
        rng = np.random.default_rng(0)
        settings.setdefault("params", sx.IndexParameters(niter=2))
        index = sx.IndexSAAP(D, NLIST, metric, nprobe=4, **settings)
        index.train(whole(rng, 400, D), xq_train=whole(rng, 200, D))
        if n:
            index.add(whole(rng, n, D))
        return index, index.to("cuda")

    return make


@pytest.fixture
def queries():
    return whole(np.random.default_rng(1), 9, D)


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", [sx.METRIC_INNER_PRODUCT, sx.METRIC_L2])
@pytest.mark.parametrize("params", [{}, {"nprobe": NLIST}, {"budget": 77}, {"budget": 0.2}])
def test_answers_are_those_of_the_host(made, queries, dtype, metric, params):
    index, there = made(metric=metric, dtype=dtype)
    params = sx.SearchParameters(**params)
    for k in (1, 10, 600):
        same(there.search(queries, k, params=params), index.search(queries, k, params=params))
    same(there.range_search(queries, 3.0, params=params), index.range_search(queries, 3.0, params=params))
    same(there.route(queries, params=params), index.route(queries, params=params))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", [sx.METRIC_INNER_PRODUCT, sx.METRIC_L2])
def test_the_short_way_answers_as_the_host(made, cupy, torch, dtype, metric):
    index, there = made(5000, metric, dtype=dtype)
    rng = np.random.default_rng(2)
    for q in (1, 3, 20, 50, 400):
        x = whole(rng, q, D)
        for k, nprobe in ((1, 1), (10, 4), (600, NLIST), (2049, NLIST)):
            params = sx.SearchParameters(nprobe=nprobe)
            known = index.search(x, k, params=params)
            for given in (cupy.asarray(x), torch.from_numpy(x).cuda()):
                found = there.search(given, k, params=params)
                assert [type(part) for part in found] == 2 * [type(given)]
                assert there._short.fits(given, k) == (k <= 2048)
                for one, other in zip(found, known, strict=True):
                    np.testing.assert_array_equal(one.get() if hasattr(one, "get") else one.cpu(), other)
    for given in (cupy.asarray(x)[:, ::-1], cupy.asarray(x, np.float16), x):
        assert not there._short.fits(given, 10)
    there.add(whole(rng, 300, D))
    for k in (10, 5300):
        there.search(cupy.asarray(x), k, params=sx.SearchParameters(nprobe=NLIST))
    assert int(there.search(cupy.asarray(x), 5300, params=sx.SearchParameters(nprobe=NLIST))[1].max()) == 5299


def test_top_p_and_given_lists(made, queries):
    index, there = made()
    params = sx.SearchParameters(top_p=0.5)
    same(there.search(queries, 7, params=params), index.search(queries, 7, params=params))
    lists, _ = index.route(queries)
    same(there.search_preassigned(queries, 7, lists), index.search_preassigned(queries, 7, lists))


@pytest.mark.parametrize("params", [None, sx.SearchParameters(budget=50)])
def test_arrays_of_cupy_stay_on_the_device(cupy, made, queries, params):
    index, there = made()
    known = index.search(queries, 7, params=params)
    found = there.search(cupy.asarray(queries), 7, params=params)
    assert all(isinstance(part, cupy.ndarray) for part in found)
    same([part.get() for part in found], known)
    buffers = cupy.zeros((9, 7), np.float32), cupy.zeros((9, 7), np.int64)
    there.search(cupy.asarray(queries), 7, params=params, D=buffers[0], I=buffers[1])
    same([part.get() for part in buffers], known)
    on_host = np.zeros((9, 7), np.float32), np.zeros((9, 7), np.int64)
    there.search(queries, 7, params=params, D=on_host[0], I=on_host[1])
    same(on_host, known)
    lims, scores, ids = there.range_search(cupy.asarray(queries), 3.0)
    same([part.get() for part in (lims, scores, ids)], index.range_search(queries, 3.0))


def test_a_query_of_nan_on_the_device_finds_nothing(cupy, made, queries):
    _, there = made()
    queries[3, 2] = np.nan
    scores, ids = (part.get() for part in there.search(cupy.asarray(queries), 7))
    assert (ids[3] == -1).all()
    assert np.isneginf(scores[3]).all()
    assert (ids[[0, 1, 2, 4]] >= 0).all()
    with pytest.raises(sx.InvalidInputError, match="x holds NaN"):
        there.search(queries, 7)


@pytest.mark.torch
@pytest.mark.parametrize("params", [None, sx.SearchParameters(budget=50)])
def test_tensors_stay_on_the_device(torch, made, queries, params):
    index, there = made()
    known = index.search(queries, 7, params=params)
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.from_numpy(queries).to("cuda", non_blocking=True).bfloat16()
        found = there.search(x, 7, params=params)
        assert all(part.device == x.device for part in found)
        same([part.cpu().numpy() for part in found], known)
        D, I = torch.zeros(9, 7, device="cuda"), torch.zeros(9, 7, device="cuda", dtype=torch.int64)  # noqa: E741
        assert there.search(x, 7, params=params, D=D, I=I)[0] is D
        same([D.cpu().numpy(), I.cpu().numpy()], known)


@pytest.mark.parametrize("kind", ["numpy", "cupy"])
def test_keys_arrive_bit_by_bit_and_go(cupy, made, queries, kind):
    index, there = made(n=0)
    rng = np.random.default_rng(2)
    for size in (1, 40, 3, 500, 17):
        keys = whole(rng, size, D)
        index.add(keys)
        there.add(keys if kind == "numpy" else cupy.asarray(keys))
        same(there.search(queries, 20), index.search(queries, 20))
    assert there.ntotal == index.ntotal == 561
    assert there.remove_ids(np.arange(0, 300, 7)) == index.remove_ids(np.arange(0, 300, 7))
    same(there.search(queries, 20), index.search(queries, 20))
    same([there.reconstruct_n(1, 3)], [index.reconstruct_n(1, 3)])
    there.reset()
    assert (there.search(queries, 3)[1] == -1).all()


def test_training_on_the_device_finds_as_good_a_partition(cupy, blobs, exact):
    keys, queries = blobs(4000, D), blobs(300, D, seed=1)
    recalls = []
    for device, move in (("cpu", np.asarray), ("cuda", np.asarray), ("cuda", cupy.asarray)):
        index = sx.IndexSAAP(D, 64, nprobe=6, device=device)
        index.train(move(keys), xq_train=move(queries))
        index.add(move(keys))
        assert index.device.startswith(device)
        found = index.search(queries, 10)[1]
        known = exact(queries, keys, 10)[1]
        recalls.append((found[:, :, None] == known[:, None]).any(axis=2).mean())
    assert max(recalls) - min(recalls) < 0.05


def test_views_of_rotated_keys(cupy, queries):
    rng = np.random.default_rng(0)
    rope = sx.Rope(dim=D)
    params = sx.IndexParameters(view="unrotated", niter=2)
    index = sx.IndexSAAP(D, NLIST, rope=rope, params=params, nprobe=4)
    index.train(whole(rng, 400, D), xq_train=whole(rng, 200, D))
    index.add(whole(rng, 300, D))
    there = index.to("cuda")
    known = index.search(queries, 5)
    np.testing.assert_array_equal(there.search(queries, 5)[1], known[1])
    np.testing.assert_array_equal(there.search(cupy.asarray(queries), 5)[1].get(), known[1])


def test_a_router_with_weights(cupy, made, queries):
    from saapindex.partition.routers import MLPRouter

    index, _ = made()
    rng = np.random.default_rng(3)
    index.router = MLPRouter(
        whole(rng, 20, D), whole(rng, 20), whole(rng, NLIST, 20), whole(rng, NLIST), "key"
    )
    there = index.to("cuda")
    known = index.search(queries, 9)
    same(there.search(queries, 9), known)
    same([part.get() for part in there.search(cupy.asarray(queries), 9)], known)


def test_there_and_back(made, queries, tmp_path):
    index, there = made()
    assert there.device == "cuda:0"
    assert there.to("cuda") is there
    assert "cuda" not in index.device
    back = sx.index_gpu_to_cpu(there)
    again = sx.index_cpu_to_gpu(None, 0, back)
    known = index.search(queries, 9)
    for other in (there, back, again):
        same(other.search(queries, 9), known)
    there.add(whole(np.random.default_rng(4), 5, D))
    assert (there.ntotal, back.ntotal, index.ntotal) == (505, 500, 500)
    sx.write_index(again, tmp_path / "index")
    same(sx.read_index(tmp_path / "index").search(queries, 9), known)
    same(sx.read_index(tmp_path / "index", backend="cuda").search(queries, 9), known)


def test_an_index_on_the_host_refuses_arrays_of_the_device(cupy, made, queries):
    index, _ = made()
    with pytest.raises(sx.InvalidInputError, match="x is on cuda:0, but the index is on cpu"):
        index.search(cupy.asarray(queries), 3)


def test_too_little_memory_changes_nothing(cupy, made, queries):
    index, there = made()
    known = there.search(queries, 9)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    keys = np.zeros((200_000, D), np.float32)
    pool.set_limit(size=pool.total_bytes() + (1 << 20))
    try:
        with pytest.raises(sx.DeviceMemoryError, match=r"add on cuda:0, by an index of 500 keys.*allocating"):
            there.add(keys)
        index.add(keys)
        with pytest.raises(sx.DeviceMemoryError, match=r"to on cuda:0.*as it was"):
            index.to("cuda")
        assert there.ntotal == 500
        same(there.search(queries, 9), known)
    finally:
        pool.set_limit(size=0)
    there.add(keys)
    assert there.ntotal == 200_500


def test_two_devices_in_one_process(cupy, made, queries):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    index, there = made()
    other = index.to("cuda:1")
    known = index.search(queries, 9)
    same(other.search(queries, 9), known)
    same(there.search(queries, 9), known)
    with cupy.cuda.Device(1):
        x = cupy.asarray(queries)
    found = other.search(x, 9)
    assert all(part.device.id == 1 for part in found)
    same([part.get() for part in found], known)
    with pytest.raises(sx.InvalidInputError, match="x is on cuda:1, but the index is on cuda:0"):
        there.search(x, 9)
