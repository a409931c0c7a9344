"""What the kernels of sparse attention read and write on a device.

A *stream* is one KV head of one sequence: stream `s` of `H` KV heads is head ``s % H`` of sequence ``s //
H``. Everything is on the device, in arrays that stay where they are while a context grows, so that a decode
step can be captured in a graph.

Shapes: `B` sequences, `H` KV heads, ``S = B * H`` streams, `L` lists, `d` dimensions, `P` the most pages of a
stream, `N` pages of the pool, `R` places of the ring, `W` words of a code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Streams"]

Array = Any  # cupy.ndarray


class Streams(NamedTuple):
    """Keys and values of several sequences: near ones in a ring, all others in pages that belong to lists.

    Keys, values and queries are float16, float32, or uint16 that holds the bits of bfloat16.

    A page holds `LANES` keys of one list. Pages of a stream are numbered in the order in which they were
    begun, so the pages of a list rise, and all are full but the list's last one. `pages` says where in the
    pool the page is. A page that is shared (by forks) is full or belongs to one stream.

    The near key at position `p` stands at place `p` if ``p < sinks``, else at ``sinks + (p - sinks) % R``.
    Keys at positions ``sinks : first`` are in lists, those from `first` on in the ring.

    Attributes
    ----------
    lengths, first
        (B,) int32: keys of each sequence, and the position of the first one in the ring.
    near_keys, near_values
        (S, sinks + R, d).
    keys, values
        (N, LANES, d), the pool.
    codes
        (N, W, LANES) uint32.
    exponents
        (N, LANES) uint8.
    ids
        (N, LANES) int32, position of each key.
    pages
        (S, P) int32: the place in the pool of each page of a stream.
    labels
        (S, P) int32: ``list << 5 | lanes`` of each page, `lanes` (1 to 16) being filled.
    orders
        (S, P) int32: how many pages of its list come before it.
    before
        (S, P) int32: the page of its list that comes before it, -1 for none.
    counts
        (S,) int32: pages of each stream.
    sizes, coded
        (S, L) int32: keys in each list, and how many there were when its anchor was last set.
    last
        (S, L) int32: the last page of each list, -1 for none.
    anchors, anchor_scales
        (S, L, d) int8 and (S, L) float32: keys are coded relative to their product.
    sums
        (S, L, d) float32: of the values in each list.
    means, mean_scales
        (S, L, d) int8 and (S, L) float32: their product is the mean value of the list.
    squares
        (S, L) float32: sum of the squared scales of the codes in the list.
    sinks
        How many first keys are never in lists.
    """

    lengths: Array
    first: Array
    near_keys: Array
    near_values: Array
    keys: Array
    values: Array
    codes: Array
    exponents: Array
    ids: Array
    pages: Array
    labels: Array
    orders: Array
    before: Array
    counts: Array
    sizes: Array
    coded: Array
    last: Array
    anchors: Array
    anchor_scales: Array
    sums: Array
    means: Array
    mean_scales: Array
    squares: Array
    sinks: int
