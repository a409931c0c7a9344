"""An index on a CUDA device: moving it there and back, and queries that are there already.

The index itself stays in the memory of the host, where it is changed, saved and copied; the device holds what
searching reads (the keys in their lists, the table of the router), and computes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from saapindex import arrays
from saapindex.backends import get_ops
from saapindex.backends.base import Ops
from saapindex.devices import check_device, current, device_of, get_cupy
from saapindex.errors import DeviceMemoryError, InvalidInputError

if TYPE_CHECKING:
    from saapindex.index.base import IndexBase
    from saapindex.index.saap import IndexSAAP
    from saapindex.index.state import State
    from saapindex.partition import Router

__all__ = [
    "device_memory",
    "device_number",
    "get_device_ops",
    "hold_on_device",
    "index_cpu_to_gpu",
    "index_gpu_to_cpu",
    "keeping_keys",
    "on_any_device",
    "placed_router",
]

S = TypeVar("S", bound="IndexBase")
P = ParamSpec("P")
R = TypeVar("R")


def get_device_ops(device: str | None, backend: str) -> Ops:
    """Return the operations of an index on `device`, by default where `backend` computes.

    Raises
    ------
    InvalidInputError
        If there is no such device or backend.
    MissingDependencyError
        If CuPy is not installed.
    """
    number = check_device(("cuda" if backend == "cuda" else "cpu") if device is None else device)
    if number is None:
        if backend == "cuda":
            raise InvalidInputError("backend is 'cuda', but device is 'cpu': expected another backend")
        return get_ops(backend)
    from saapindex.backends.cuda.resident import ResidentOps

    return ResidentOps(number)


def device_number(ops: Ops) -> int | None:
    """Return the device that these operations belong to; None for the host."""
    return getattr(ops, "device", None)


def on_any_device(
    method: Callable[Concatenate[S, Any, P], R],
) -> Callable[Concatenate[S, Any, P], R]:
    """Let a method of an index on a device take CuPy arrays and CUDA tensors, on the caller's stream.

    They are brought to the host, and results back to where they came from; only a plain `search` keeps
    everything on the device. On an index in the memory of the host nothing changes.
    """

    @functools.wraps(method)
    def call(self: S, x: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        device, place = device_number(self.ops), device_of(x)
        if place not in (None, device):
            raise InvalidInputError(f"x is on cuda:{place}, but the index is on {self.device}")
        if device is None:
            return method(self, x, *args, **kwargs)
        with current(device if place is None else x), device_memory(self, method.__name__.strip("_")):
            if place is None or _is_plain(self, method.__name__, kwargs):
                return method(self, x, *map(_to_host, args), **_hosted(kwargs))
            buffers = {name: kwargs[name] for name in ("D", "I") if kwargs.get(name) is not None}
            rest = {**_hosted(kwargs), **dict.fromkeys(buffers)}
            found = method(self, _to_host(x), *map(_to_host, args), **rest)
            return _delivered(found, x, buffers)  # type: ignore[no-any-return]

    return cast("Callable[Concatenate[S, Any, P], R]", call)


@contextlib.contextmanager
def device_memory(index: IndexBase, purpose: str) -> Iterator[None]:
    """Turn CuPy's error for too little memory into one that says what for, and how much there is."""
    device = device_number(index.ops)
    if device is None:
        yield
        return
    cupy = get_cupy()
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        cupy.get_default_memory_pool().free_all_blocks()
        free, total = cupy.cuda.Device(device).mem_info
        raise DeviceMemoryError(
            f"{purpose} on cuda:{device}, by an index of {index.ntotal} keys of dimension {index.d}: {error} "
            f"({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free); the index is as it was"
        ) from error


def keeping_keys(ops: Ops) -> contextlib.AbstractContextManager[None]:
    """Keep on the device what is trained on, if `ops` belong to one."""
    training = getattr(ops, "training", None)
    return contextlib.nullcontext() if training is None else training()


def hold_on_device(ops: Ops, state: State) -> None:
    """Bring the lists of `state` to the device, if `ops` belong to one."""
    hold = getattr(ops, "hold", None)
    if hold is not None:
        hold(state.lists.view)


def placed_router(router: Router, queries: Any, ops: Ops) -> Router:
    """Return the router with its weights where `queries` are."""
    if device_of(queries) is None:
        return router
    placed = copy.copy(router)
    for name, value in vars(router).items():
        setattr(placed, name, ops.keep(value))  # type: ignore[attr-defined]
    return placed


def _is_plain(index: Any, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether this is a search that never leaves the device."""
    params = kwargs.get("params")
    other = [getattr(params, setting, None) for setting in ("budget", "top_p", "sel")]
    return (
        name == "_search"
        and index.can_search_in_place
        and all(value is None for value in (kwargs.get("stats"), *other))
    )


def _to_host(value: Any) -> Any:
    """Return an array of a device as NumPy; anything else as it is."""
    if device_of(value) is None:
        return value
    return value.detach().cpu() if hasattr(value, "detach") else value.get()


def _hosted(kwargs: Any) -> dict[str, Any]:
    return {name: value if name in ("D", "I") else _to_host(value) for name, value in kwargs.items()}


def _delivered(found: Any, model: Any, buffers: dict[str, Any]) -> Any:
    """Return results, which are on the host, where `model` is, or in the caller's buffers."""
    if isinstance(found, tuple):
        names = ("D", "I") if len(found) == 2 else ("", "D", "I")
        return tuple(
            _filled(buffers[name], part) if name in buffers else _delivered(part, model, {})
            for name, part in zip(names, found, strict=True)
        )
    if not hasattr(found, "dtype"):
        return found
    if hasattr(model, "detach"):
        return found.to(model.device)
    return get_cupy().asarray(found)


def _filled(buffer: Any, part: Any) -> Any:
    arrays.fill(arrays.as_array(buffer, "buffer", device_of(buffer)), arrays.as_numpy(part, "part"))
    return buffer


def index_cpu_to_gpu(resources: object, device: int, index: IndexSAAP) -> IndexSAAP:
    """Return a copy of `index` on a device: Faiss's spelling of ``index.to("cuda:<device>")``.

    Parameters
    ----------
    resources
        Not read, and may be None: memory comes from CuPy's pool.
    device
        Number of the device.
    index
        Stays as it is.
    """
    return index.to(f"cuda:{device}")


def index_gpu_to_cpu(index: IndexSAAP) -> IndexSAAP:
    """Return a copy of `index` in the memory of the host: Faiss's spelling of ``index.to("cpu")``."""
    return index.to("cpu")
