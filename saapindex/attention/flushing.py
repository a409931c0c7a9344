"""Windows of all layers of a model at once, for steps that are captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

from saapindex.attention.store import AttentionStore
from saapindex.devices import get_cupy
from saapindex.errors import InvalidInputError

__all__ = ["flush_layers"]


def flush_layers(indexes: Sequence[AttentionStore]) -> None:
    """Let keys that are due leave the windows of all layers, before each adds a token by `attend`.

    In a CUDA graph nobody but the device knows when that is, so each layer asks in a launch of its own,
    unless this has asked for all of them in one. Call it at the beginning of what is captured, and before, as
    one warms up a graph: then the kernel is there. Outside of a capture, and on the host, `add` and `attend`
    see to it themselves, and nothing is done.

    Parameters
    ----------
    indexes
        Of one device, with keys; each is then to attend to one token with ``k=`` and ``v=``.

    Raises
    ------
    InvalidInputError
        If they are on several devices, or differ in the size or type of their keys; or if one has no room
        reserved (`AttentionStore.reserve`).

    Examples
    --------
    >>> import numpy as np
    >>> from saapindex.attention import AttentionIndex, fit_layer, flush_layers
    >>> keys = np.random.default_rng(0).standard_normal((1, 500, 16))
    >>> layers = [AttentionIndex(fit_layer(keys, keys[:, :100], 8, words=1)) for _ in range(2)]
    >>> flush_layers(layers)
    """
    devices = {index.device for index in indexes}
    if len(devices) > 1:
        raise InvalidInputError(f"indexes are on {sorted(devices)}, expected one device")
    if not devices or devices == {"cpu"}:
        return
    from saapindex.attention.device_batch import DeviceBatch
    from saapindex.attention.device_keeping import capturing
    from saapindex.backends.cuda.append import flush_streams, load_flush

    batches = [index._batch for index in indexes]
    held = [batch for batch in batches if isinstance(batch, DeviceBatch)]
    kinds = {(batch.keeping.book.codebook.d, batch.keeping.dtype) for batch in held}
    if len(held) < len(batches) or len(kinds) > 1:
        raise InvalidInputError(
            f"indexes hold keys of {sorted(kinds)} and {len(batches) - len(held)} none, expected keys of one "
            "size and type in all of them"
        )
    with indexes[0]._current():
        made = [batch.to_flush() for batch in held]
        d, dtype = held[0].keeping.book.codebook.d, held[0].streams.keys.dtype
        if capturing(get_cupy()):
            flush_streams(made, d, dtype)
        else:
            load_flush(made, d, dtype)
