"""The `k` best of a stream: a binary heap whose root is the worst kept, and its sorting.

The order is total, larger score first and lower id first among equals, so what is kept does not
depend on the order of the stream.
"""

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True, inline="always")
def worse(score, id, other_score, other_id):  # type: ignore[no-untyped-def]
    """Whether (score, id) comes after (other_score, other_id)."""
    return score < other_score or (score == other_score and id > other_id)


@njit(cache=True, nogil=True)
def replace_root(scores, ids, size, score, id):  # type: ignore[no-untyped-def]
    """Put (score, id) in place of the worst entry of the heap of `size` entries."""
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= size:
            break
        right = child + 1
        if right < size and worse(scores[right], ids[right], scores[child], ids[child]):
            child = right
        if not worse(scores[child], ids[child], score, id):
            break
        scores[hole], ids[hole] = scores[child], ids[child]
        hole = child
    scores[hole], ids[hole] = score, id


@njit(cache=True, nogil=True)
def sort_heap(scores, ids):  # type: ignore[no-untyped-def]
    """Sort a heap in place, best first."""
    for size in range(len(scores) - 1, 0, -1):
        score, id = scores[size], ids[size]
        scores[size], ids[size] = scores[0], ids[0]
        replace_root(scores, ids, size, score, id)
