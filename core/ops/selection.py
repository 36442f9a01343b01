"""Choose the implementation of each op once, from flags, device and dtype.

When an implementation cannot serve, the log or an error says why; it is never passed over.
"""

import torch

from ..config import FlagError
from ..logs import get_logger
from . import cpu, triton
from .attention import check_backend
from .ops import OPS, STEP_IS_MADE_OF, Ops

# What x86 processors call their instructions for products of a dtype.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def select_ops(
    kernels: str, device: torch.device, dtype: torch.dtype, attention_backend: str = "auto"
) -> Ops:
    """Make the Ops for --kernels.

    kernels: auto, torch, triton or native, and after commas OP=IMPLEMENTATION for single ops, as in
        "auto,rope=torch". auto is native on a CPU and triton on a GPU where they can serve; where
        not it is torch, and the log says why.
    dtype: of the activations.
    Raises FlagError, naming flag and remedy, where an implementation or backend that was asked for
    by name cannot serve.
    """
    check_backend(attention_backend, device)
    general, *exceptions = kernels.split(",")
    if general not in ("auto", "torch", *_OBSTACLES):
        known = ", ".join(_OBSTACLES)
        raise FlagError(f"--kernels {kernels}: {general!r} is not one of auto, torch, {known}")
    overrides = tuple(_override(kernels, exception, device, dtype) for exception in exceptions)
    implementation = _implementation(general, device, dtype)
    # Without such instructions a 16-bit product is slower than one of fp32 copies.
    fp32_matmul = _lacks_instructions(device, dtype)
    selected = Ops(implementation, attention_backend, fp32_matmul, overrides)
    wants_step = ("block_step", "native") in overrides
    if wants_step and selected.implementations["block_step"] != "native":
        raise FlagError(
            f"--kernels {kernels}: block_step=native is made of native "
            f"{', '.join(STEP_IS_MADE_OF)} and --attention-backend auto; "
            "choose those, or leave block_step=native out"
        )
    return selected


def _implementation(kernels: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what the ops without an exception run on: torch, native or triton."""
    if kernels == "torch":
        return "torch"
    fastest = "native" if device.type == "cpu" else "triton"
    wanted = fastest if kernels == "auto" else kernels
    obstacle = _OBSTACLES[wanted](device, dtype)
    if obstacle is None:
        return wanted
    # An implementation that was asked for by name is never replaced by another one in silence.
    if kernels != "auto":
        raise FlagError(f"--kernels {kernels}: {obstacle}, or use --kernels auto")
    get_logger().info(f"kernels: PyTorch in place of {wanted}: {obstacle}")
    return "torch"


def _override(
    kernels: str, exception: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Read one OP=IMPLEMENTATION of --kernels."""
    op, equals, wanted = exception.partition("=")
    if not equals or op not in OPS:
        raise FlagError(
            f"--kernels {kernels}: {exception!r} is not OP=IMPLEMENTATION with an op of "
            f"{', '.join(OPS)}"
        )
    if wanted not in ("torch", *OPS[op]):
        has = ", ".join(OPS[op])
        raise FlagError(
            f"--kernels {kernels}: {op} has torch, {has}, and not {wanted or 'nothing'}"
        )
    obstacle = None if wanted == "torch" else _OBSTACLES[wanted](device, dtype)
    if obstacle is not None:
        raise FlagError(f"--kernels {kernels}: {obstacle}, or leave {exception} out")
    return op, wanted


def _lacks_instructions(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this processor has no instructions for products of a 16-bit dtype."""
    if device.type != "cpu" or dtype not in _INSTRUCTIONS:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # not in every release of torch
    found: dict[str, object] = capabilities()
    if found.get("architecture") != "x86_64":
        return False
    return not any(found.get(name) for name in _INSTRUCTIONS[dtype])


def _native_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the native kernels cannot serve, and what to do about it; None where they can."""
    if device.type != "cpu":
        return (
            f"the native kernels run on the CPU and the device is {device.type}; "
            "use --kernels triton"
        )
    if not cpu.AVAILABLE:
        return (
            "trivium._native is not built; install a C++17 compiler and run "
            "`pip install --no-deps --no-build-isolation -e .`"
        )
    if dtype not in cpu.DTYPES:
        return f"the native kernels have float32 and bfloat16, not {dtype}; use --bf16"
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why Triton cannot serve, and what to do about it; None where it can."""
    if not triton.AVAILABLE:
        return "triton cannot be imported; install triton>=3.6"
    if device.type == "cpu" and not triton.interpreted():
        return "Triton has no CPU target; set TRITON_INTERPRET=1 (slow, for tests)"
    if device.type == "cuda" and triton.interpreted():
        return "TRITON_INTERPRET=1 would run the kernels on the CPU; unset it"
    return None


_OBSTACLES = {"triton": _triton_obstacle, "native": _native_obstacle}
