"""Run what the kernels' tests do at small sizes, to be watched by compute-sanitizer.

::

    compute-sanitizer --show-backtrace device --tool memcheck python tests/sanitize.py     # and racecheck
    compute-sanitizer --show-backtrace device --tool initcheck --check-api-memory-access no \
        python tests/sanitize.py

With a backtrace of the host the tool keeps the frames of Python that launched something, and with them forks
of an index that nobody holds any more: tests that count the holders of pages then fail. Without the other
option initcheck also reports copies of pages that nothing was written to yet, when a pool grows; with it,
those by CuPy of pages that are not full, when an index is forked. Memory comes straight from CUDA, so that
what is read or written past the end of an array is seen.
"""

from __future__ import annotations

import sys

import pytest

SMALL = (
    "arrays_of_the_device or (every_output and not 65) or (tensor_cores_assign and 1000-600 and (128 or 80)) "
    "or (ties_to_the_lowest and 70-) or (sums and (257 or 5000)) or 16_bits_are_rotated "
    "or (long_lists and 3- and (10- or 300-)) or (many_lists and (100 or 4097)) or (encoding and cuda-64-3) "
    "or (short_way and float16) or few_keys or a_search_on or (head_sizes and float16-64) "
    "or (few_pages and alone-bfloat16)"
)

if __name__ == "__main__":
    import cupy

    cupy.cuda.set_allocator(None)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "-k",
        SMALL,
        "tests/backends",
        "tests/emulation",
        "tests/attention/test_device.py::TestSteps",
        "tests/test_index_device.py",
        *sys.argv[1:],
    ]
    sys.exit(pytest.main(options))
