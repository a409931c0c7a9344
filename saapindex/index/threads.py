"""How many threads a search runs on, under Faiss's (OpenMP's) names."""

from __future__ import annotations

from saapindex.errors import InvalidInputError
from saapindex.params import check_integer

__all__ = ["omp_get_max_threads", "omp_set_num_threads"]


def omp_set_num_threads(num_threads: int) -> None:
    """Run what the calling thread starts on `num_threads` threads: searches, in the ``"cpu"`` backend.

    As in OpenMP the number belongs to the thread that sets it; a new thread begins with all cores, or with
    what the environment variable ``NUMBA_NUM_THREADS`` said when the process began, which is also the most.
    Matrix products (adding, training) take the threads of NumPy's BLAS instead.

    Raises
    ------
    InvalidInputError
        Below 1, or above the most.

    Examples
    --------
    >>> before = omp_get_max_threads()
    >>> omp_set_num_threads(1)
    >>> omp_get_max_threads()
    1
    >>> omp_set_num_threads(before)
    """
    from saapindex.backends.cpu.threads import most_threads, set_threads

    check_integer("num_threads", num_threads, 1)
    if num_threads > most_threads():
        raise InvalidInputError(f"num_threads is {num_threads}, expected at most {most_threads()}")
    set_threads(num_threads)


def omp_get_max_threads() -> int:
    """Return how many threads a search that the calling thread starts runs on."""
    from saapindex.backends.cpu.threads import get_threads

    return get_threads()
