r"""Make a wheel that lets Faiss's wheels for CUDA 12 run where there is CUDA 13 only.

::

    python bench/cublas12.py wheels
    pip install --no-deps --target site wheels/*.whl faiss-gpu-cu12==1.8.0.2 nvidia-cuda-runtime-cu12 \
        'numpy<2'

``faiss-gpu-cu12`` asks the package ``nvidia-cublas-cu12`` for ``libcublas.so.12`` and calls eight of its
functions, whose arguments are the same in cuBLAS 13. The wheel has that name, and a library whose functions
jump to those of ``libcublas.so.13``, which the loader has to find (``LD_LIBRARY_PATH``). Needs gcc.
"""

from __future__ import annotations

import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

NAME, VERSION = "nvidia_cublas_cu12", "12.0.0"
FUNCTIONS = (
    *("cublasCreate_v2", "cublasDestroy_v2", "cublasSetStream_v2", "cublasSetMathMode", "cublasGetMathMode"),
    *("cublasSgemmEx", "cublasGemmEx", "cublasGemmStridedBatchedEx"),
)
SOURCE = """
#include <dlfcn.h>
__attribute__((visibility("hidden"))) void* found[%(count)d];
static const char* const names[] = {%(names)s};
__attribute__((constructor)) static void find(void) {
    void* library = dlopen("libcublas.so.13", RTLD_NOW);
    for (int i = 0; library && i < %(count)d; ++i) found[i] = dlsym(library, names[i]);
}
"""
JUMP = '__asm__(".text\\n.globl {name}\\n.type {name},@function\\n{name}: jmp *found+{offset}(%rip)\\n");\n'


def build(folder: Path) -> Path:
    """Compile the library, and return where it is."""
    source, exports, library = folder / "cublas12.c", folder / "exports", folder / "libcublas.so.12"
    names = ", ".join(f'"{name}"' for name in FUNCTIONS)
    jumps = (JUMP.format(name=name, offset=8 * i) for i, name in enumerate(FUNCTIONS))
    source.write_text(SOURCE % {"count": len(FUNCTIONS), "names": names} + "".join(jumps))
    exports.write_text("libcublas.so.12 { global: cublas*; local: *; };\n")
    options = ["-shared", "-fPIC", f"-Wl,--version-script={exports}", "-Wl,-soname,libcublas.so.12"]
    subprocess.run(["gcc", *options, "-o", library, source, "-ldl"], check=True)
    return library


def main(out: Annotated[Path, typer.Argument(help="Folder for the wheel.")]) -> None:
    """Write the wheel."""
    out.mkdir(parents=True, exist_ok=True)
    about, place = f"{NAME}-{VERSION}.dist-info", "nvidia/cublas/lib/libcublas.so.12"
    tag = "py3-none-manylinux2014_x86_64"
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(out / f"{NAME}-{VERSION}-{tag}.whl", "w") as wheel,
    ):
        wheel.write(build(Path(folder)), place)
        name = NAME.replace("_", "-")
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n",
            "WHEEL": f"Wheel-Version: 1.0\nGenerator: saapindex\nRoot-Is-Purelib: false\nTag: {tag}\n",
        }
        texts["RECORD"] = "".join(
            f"{path},,\n" for path in (place, *(f"{about}/{file}" for file in (*texts, "RECORD")))
        )
        for file, text in texts.items():
            wheel.writestr(f"{about}/{file}", text)


if __name__ == "__main__":
    typer.run(main)
