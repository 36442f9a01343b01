"""Every Triton kernel compiles for real devices, as far as that can be told without one."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process of its own: the tests around it run the kernels in the interpreter, which is decided
# when they are imported.
CODE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from trivium.kernels import adamw, rms_norm

BUFFERS = "rstd mean partial masters exp_avg exp_avg_sq grads"
NUMBERS = "step_size root_correction grad_scale"
POINTERS = {name: "*fp32" for name in f"{BUFFERS} {NUMBERS}".split()}
POINTERS |= {name: "*bf16" for name in "x y dx dy weight weights".split()} | {"skip": "*i1"}
SCALARS = {"rows": "i32", "columns": "i32", "size": "i64"}  # the others are fp32

def asm_of(kernel, target, warps, **constants):
    kinds, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kinds[name] = POINTERS.get(name) or SCALARS.get(name, "fp32")
        if name in POINTERS or name in ("columns", "size"):
            aligned[i,] = [["tt.divisibility", 16]]
    kinds |= {name: "constexpr" for name in constants}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, kinds, constants, aligned)
    return compile(source, target=target, options={"num_warps": warps}).asm

backend, arch, width = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(width))
made = [asm_of(adamw._adamw, target, 8, BLOCK=adamw._BLOCK, COPY=True)]
for columns in (128, 384, 4096, rms_norm.MAX_TILE):
    rows, block, warps = rms_norm._tile(columns)
    for kernel in (rms_norm._forward, rms_norm._backward):
        made.append(asm_of(kernel, target, warps, ROWS=rows, BLOCK=block))
for kernel in (rms_norm._forward_wide, rms_norm._row_means, rms_norm._backward_wide):
    made.append(asm_of(kernel, target, 8, BLOCK=rms_norm._BLOCK))
if backend == "cuda":
    print(*("ld.global.v4" in asm["ptx"] for asm in made))
else:
    print(*("global_load_dwordx" in asm["amdgcn"] for asm in made))
"""


@pytest.mark.parametrize(
    ("backend", "arch", "warp_size"),
    [("cuda", "90", "32"), ("cuda", "80", "32"), ("hip", "gfx942", "64")],
)
def test_kernels_compile_and_load_in_vectors(backend, arch, warp_size, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, backend, arch, warp_size],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 12
