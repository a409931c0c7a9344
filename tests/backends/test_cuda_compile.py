"""Every CUDA source compiles, for machines that are not here: NVRTC needs no device."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import pytest

from saapindex.backends.cuda.module import options, source

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="pip install 'saapindex[cuda-compile]'")

ELEMENTS = [0, 1, 2]
SIZES = [64, 80, 96, 128, 256]
# What each file is compiled with; a file that is not here is compiled with ELEMENT and D.
MACROS = {
    "append": [
        *({"ELEMENT": e, "D": 128, "BLOCKS": blocks} for e in ELEMENTS for blocks in (1, 2)),
        {"ELEMENT": 1, "D": 80, "BLOCKS": 1},
        {"ELEMENT": 2, "D": 256, "BLOCKS": 1},
        {"ELEMENT": 2, "D": 256, "BLOCKS": 2},
        {"ELEMENT": 1, "D": 128, "BLOCKS": 1, "STATES": 32},
    ],
    "assign": [
        *({"ELEMENT": e, "D": d} for e in ELEMENTS for d in SIZES),
        *({"ELEMENT": e} for e in ELEMENTS),
    ],
    "attend": [
        *({"ELEMENT": e, "D": 128, "QUERY": e, "G": 4, "WORDS": 3} for e in (0, 1)),
        {"ELEMENT": 2, "D": 128, "QUERY": 2, "G": 4, "WORDS": 3, "THREADS": 256},
        *({"ELEMENT": 1, "D": d, "QUERY": 1, "G": 4, "WORDS": 3} for d in (64, 80, 96)),
        {"ELEMENT": 1, "D": 256, "QUERY": 1, "G": 4, "WORDS": 3, "THREADS": 256},
        *({"ELEMENT": 1, "D": 128, "QUERY": 2, "G": g, "WORDS": w} for g, w in ((1, 1), (3, 4))),
        {"ELEMENT": 1, "D": 128, "QUERY": 1, "G": 8, "WORDS": 6, "THREADS": 256},
        {"ELEMENT": 1, "D": 64, "QUERY": 1, "G": 2, "WORDS": 3, "CAPPED": 1},
    ],
    "attend_whole": [
        *({"ELEMENT": e, "D": 128, "QUERY": e, "G": 4} for e in (0, 1)),
        {"ELEMENT": 2, "D": 128, "QUERY": 2, "G": 4, "THREADS": 384},
        *({"ELEMENT": 1, "D": d, "QUERY": 1, "G": 3, "CLUSTER": 16} for d in (64, 80, 96)),
        {"ELEMENT": 1, "D": 256, "QUERY": 1, "G": 4, "THREADS": 256, "CHOOSERS": 128},
        {"ELEMENT": 1, "D": 128, "QUERY": 2, "G": 8, "CLUSTER": 1},
        {"ELEMENT": 1, "D": 64, "QUERY": 1, "G": 1, "CLUSTER": 2, "CAPPED": 1},
    ],
    "chosen": [{}],
    "finite": [{"ELEMENT": e} for e in ELEMENTS],
    "codes": [{"COLUMNS": columns} for columns in range(1, 9)],
    "rope": [*({"ELEMENT": e} for e in ELEMENTS), *({"ELEMENT": e, "PAIRS": 2} for e in (0, 1))],
    "route": [{}],
    "scan": [{"ELEMENT": e, "D": d} for e in (0, 2) for d in SIZES],
    "search": [
        {"ELEMENT": e, "D": d, "DISTANCES": l2, "CLUSTER": cluster}
        for e in (0, 2)
        for d, l2, cluster in ((64, 0, 8), (128, 1, 4), (200, 0, 2))
    ],
}
ANY = [{"ELEMENT": e, "D": d} for e, d in itertools.product(ELEMENTS, SIZES)]
FILES = sorted(
    path.name.removesuffix(".cu")
    for path in (resources.files("saapindex") / "cuda").iterdir()
    if path.name.endswith(".cu")
)
# Clusters of blocks came with sm_90: no launcher asks for these before.
NEWER = {"attend_whole", "search"}
CASES = [
    (file, macros, arch)
    for file in FILES
    for macros in MACROS.get(file, ANY)
    for arch in ("sm_80", "sm_90")
    if arch >= "sm_90" or file not in NEWER
]
# The most bytes that a kernel keeps in local memory with any of these macros; what is not here keeps none.
# `append` is held to 128 registers, so that two blocks fit on a multiprocessor after a long prompt.
SPILLS = {"append": 1600, "assign_many": 16, "attend": 48, "attend_whole": 16}


def compiled(file, macros, arch):
    """Compile; return the log, which tells registers and spills of each kernel."""
    error, program = nvrtc.nvrtcCreateProgram(source(file).encode(), f"{file}.cu".encode(), 0, [], [])
    assert error == 0
    wanted = [*options(macros.items()), f"-arch={arch}", "--ptxas-options=-v"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(wanted), [option.encode() for option in wanted])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode(errors="replace").rstrip("\0 ")
    assert error == 0, text
    nvrtc.nvrtcDestroyProgram(program)
    return text


def resources_of(log):
    """Registers, and bytes spilled, of each kernel in a log."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        spilled = re.search(r"(\d+) bytes spill stores", part)
        registers = re.search(r"Used (\d+) registers", part)
        found[name] = int(registers[1]), int(spilled[1])
    return found


@pytest.mark.parametrize(
    ("file", "macros", "arch"),
    CASES,
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_compiles_without_spills(file, macros, arch, record_property):
    log = compiled(file, macros, arch)
    assert "warning" not in log
    kernels = resources_of(log)
    assert kernels
    for name, (registers, spilled) in kernels.items():
        record_property(f"{name} on {arch}", f"{registers} registers, {spilled} bytes spilled")
        assert spilled <= SPILLS.get(name, 0), f"{name} spills {spilled} bytes with {macros}"


def test_sources_need_no_header():
    for file in FILES:
        assert "#include" not in source(file)
