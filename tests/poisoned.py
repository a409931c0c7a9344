"""Run tests with memory that is full of NaN where nobody has written, on this processor or a lesser one.

::

    python tests/poisoned.py tests/attention tests/backends            # whatever pytest takes
    python tests/poisoned.py --avx2 tests/attention tests/backends     # numba's code as without AVX-512

Memory that a test gets from the system is usually zero, so code that reads what it never wrote passes there
and fails in a process that has run for a while. Here every new piece has all bits set: NaN in every type of
floats. It takes Linux and a C compiler. Kernels are compiled anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = """
#include <errno.h>
#include <stddef.h>
#include <string.h>
extern void *__libc_malloc(size_t);
extern void *__libc_memalign(size_t, size_t);
static void *filled(void *p, size_t n) { return p ? memset(p, 0xFF, n) : p; }
void *malloc(size_t n) { return filled(__libc_malloc(n), n); }
void *memalign(size_t a, size_t n) { return filled(__libc_memalign(a, n), n); }
void *aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    void *q = memalign(a, n);
    if (q) *p = q;
    return q ? 0 : ENOMEM;
}
"""
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt",
}


def main(arguments: list[str]) -> int:
    """Compile what fills memory, and run pytest under it."""
    lesser = "--avx2" in arguments
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "poison.so"
        command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=SOURCE, text=True, check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "NUMBA_CACHE_DIR": folder}
        pytest = [sys.executable, "-m", "pytest", *(x for x in arguments if x != "--avx2")]
        return subprocess.run(pytest, env=environment | (AVX2 if lesser else {}), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
