"""Run CUDA kernels on the host, compiled by g++ on `cuda_on_host.h`: those whose argument is one struct."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from saapindex.backends.cuda.module import source

HEADER = Path(__file__).parent / "cuda_on_host.h"
# What stands in the place of inline PTX, and of shared memory of a length known at the launch.
REPLACED = {
    r'asm volatile\("ld.acquire.*?\);': "let_others_run(); x = *(volatile const u32*)p;",
    r'asm volatile\("red.release.*?"memory"\);': "*counter += 1;",
    r'float y;\s*asm\("cvt.f32.f16.*?return y;': "return (float)same_bits<_Float16>(x);",
    r'u16 y;\s*asm\("cvt.rn.f16.*?return y;': "return same_bits<u16>((_Float16)x);",
    r'asm\("fma.rn.f32.*?\);': "x = fmaf(a, b, c);",
    r'asm\("add.rn.f32.*?\);': "x = a + b;",
    r'float y;\s*asm\("ex2.approx.*?return y;': "return exp2f(x);",
    r'asm volatile\("cp.async.cg.*?\);': "memcpy(to, from, 16);",
    r'asm volatile\("cp.async.(?:commit|wait)_group.*?\);': ";",
    r'asm volatile\("cp.async.ca.*?\);': "memcpy(to, from, 4);",
    r'asm volatile\("ldmatrix.sync.aligned.m8n8.x4.shared.*?\);': "load_fragments(x, row, false);",
    r'asm volatile\("ldmatrix.sync.aligned.m8n8.x4.trans.*?\);': "load_fragments(x, row, true);",
    r'asm\("cvt.rn.f16x2.*?\);': "pair = pair_of_bits(float_to_float16(x), float_to_float16(y));",
    r'asm\("cvt.rn.bf16x2.*?\);': "pair = pair_of_bits(float_to_bfloat16(x), float_to_bfloat16(y));",
    r'asm(?: volatile)?\(\s*"mma.sync.aligned.m16n8k16\S*?f32.f16.*?\);': (
        "multiply_pairs(c, a, b0, b1, float16_to_float);"
    ),
    r'asm\("mma.sync.aligned.m16n8k16.*?f32.bf16.*?\);': "multiply_pairs(c, a, b0, b1, bfloat16_to_float);",
    r'asm volatile\("mov.u64 %0, %globaltimer.*?\);': "now = 0;",
    r'asm volatile\("prefetch.*?\);': ";",
    r'asm volatile\("cp.async.bulk[^"]*cluster.global.*?"memory"\);': (
        "fetch_bytes(to, from, bytes, barrier);"
    ),
    r'asm volatile\("red.global.add.v4.*?"memory"\);': ";",
    r'asm\("mma.sync.aligned.m16n8k8.row.col.f32.tf32.*?\)\);': "multiply_tf32(c, a, b0, b1);",
    r'asm\("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.*?\);': "multiply_quads(c, a, b0, b1);",
    r'asm\("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.*?\);': "multiply_signed_quads(c, a, b0, b1);",
    r'asm\("mapa.*?\);': "there = 0;",
    r'asm volatile\("mbarrier.init.*?"memory"\);': "begin_emulated(barrier);",
    r'asm volatile\("mbarrier.arrive.expect_tx.*?"memory"\);': "expect_emulated(barrier, bytes);",
    r'asm volatile\("\{\\n.reg .pred.*?"memory"\);': "done = come_emulated(barrier);",
    r'asm volatile\("st.async[^"]*bytes.b32.*?"memory"\);': "send_emulated(to, rank, {x}, barrier);",
    r'asm volatile\("st.async[^"]*bytes.v2.b32.*?"memory"\);': "send_emulated(to, rank, {x, y}, barrier);",
    r'asm volatile\("st.async[^"]*bytes.v4.b32.*?"memory"\);': "send_bytes(to, x, 16, rank, barrier);",
    r'asm volatile\("fence.proxy.*?"memory"\);': ";",
    r'asm volatile\("cp.async.bulk.*?"memory"\);': "send_bytes(to, here, bytes, rank, barrier);",
    r'asm volatile\("bar.sync %0.*?"memory"\);': "meet(some_of_block(barrier), threads);",
    r'asm volatile\("bar.arrive %0.*?"memory"\);': "come_by(some_of_block(barrier), THREADS);",
    r'asm volatile\("fence.mbarrier_init.*?"memory"\);': ";",
    r'asm volatile\("barrier.cluster.wait.*?"memory"\);': "meet_in_cluster();",
    r"extern __shared__ (?:__align__\(16\) )?u8 memory\[\];": "u8* memory = shared_memory();",
}


def build(folder, file, struct="Step", **macros):
    """Compile the kernel called as its file; return a function (grid, threads, shared bytes, argument)."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile kernels for the host with")
    text = source(file)
    for pattern, replacement in REPLACED.items():
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    assert "asm" not in re.sub(r"//.*", "", text)
    launch = (
        f'extern "C" int launch(unsigned grid, unsigned threads, size_t shared, const {struct}* p) '
        f"{{ return run_grid(grid, threads, shared, [=]() {{ {file}(*p); }}); }}\n"
    )
    name = "-".join([file, *(f"{key}{value}" for key, value in macros.items())])
    code, library = folder / f"{name}.cpp", folder / f"{name}.so"
    code.write_text(f'#include "{HEADER}"\n{text}\n{launch}')
    defined = [f"-D{key}={value}" for key, value in {"CLUSTER": 1, **macros}.items()]
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o", library, code, *defined]
    subprocess.run(command, check=True)
    kernel = ctypes.CDLL(str(library)).launch

    def run(grid, threads, shared, argument):
        pointer = argument.ctypes.data_as(ctypes.c_void_p)
        assert kernel(grid, threads, ctypes.c_size_t(shared), pointer) == 0, "the kernel does not end"

    return run
