"""Which implementation of each op a run uses: decided once, from the flags, the device and the dtype; an obstacle is named, never passed over."""

import torch

from ..config import FlagError
from ..logs import get_logger
from . import cpu, ops
from .attention import check_backend
from .ops import OPS, STEP_IS_MADE_OF, Ops


def select_ops(
    kernels: str, device: torch.device, dtype: torch.dtype, attention_backend: str = "auto"
) -> Ops:
    """The ops for --kernels on `device` with activations of `dtype`.

    kernels: one of auto, torch, triton, native, and after commas OP=IMPLEMENTATION for single ops ("auto,rope=torch"). auto: native on
    a CPU, triton on a GPU, each where it can serve, else torch, and the log says why.
    Raises FlagError, naming the flag and the remedy, where an implementation or backend asked for by name cannot serve.
    """
    check_backend(attention_backend, device)
    general, *exceptions = kernels.split(",")
    if general not in ("auto", "torch", *_OBSTACLES):
        raise FlagError(
            f"--kernels {kernels}: {general!r} is not one of auto, torch, {', '.join(_OBSTACLES)}"
        )
    overrides = tuple(_override(kernels, exception, device, dtype) for exception in exceptions)
    chosen = Ops(
        _implementation(general, device, dtype),
        attention_backend,
        _uses_fp32_matmul(device, dtype),
        overrides,
    )
    if ("block_step", "native") in overrides and chosen.implementations["block_step"] != "native":
        raise FlagError(
            f"--kernels {kernels}: block_step=native is made of native {', '.join(STEP_IS_MADE_OF)} and --attention-backend auto; "
            "choose those, or leave block_step=native out"
        )
    return chosen


def _implementation(kernels: str, device: torch.device, dtype: torch.dtype) -> str:
    if kernels == "torch":
        return "torch"
    wanted = kernels if kernels != "auto" else "native" if device.type == "cpu" else "triton"
    obstacle = _OBSTACLES[wanted](device, dtype)
    if obstacle is None:
        return wanted
    if kernels != "auto":
        raise FlagError(f"--kernels {kernels}: {obstacle}, or use --kernels auto")
    get_logger().info(f"kernels: PyTorch in place of {wanted}: {obstacle}")
    return "torch"


def _override(
    kernels: str, exception: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    op, equals, wanted = exception.partition("=")
    if not equals or op not in OPS:
        raise FlagError(
            f"--kernels {kernels}: {exception!r} is not OP=IMPLEMENTATION with an op of {', '.join(OPS)}"
        )
    if wanted not in ("torch", *OPS[op]):
        raise FlagError(
            f"--kernels {kernels}: {op} has torch, {', '.join(OPS[op])}, and not {wanted or 'nothing'}"
        )
    obstacle = None if wanted == "torch" else _OBSTACLES[wanted](device, dtype)
    if obstacle is not None:
        raise FlagError(f"--kernels {kernels}: {obstacle}, or leave {exception} out")
    return op, wanted


def _uses_fp32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether 16-bit matrix products are to be computed in fp32: a processor without instructions for them is some 10 to 100 times slower at them."""
    if device.type != "cpu" or dtype not in _PRODUCTS:
        return False
    found = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release
    return found.get("architecture") == "x86_64" and not any(
        found.get(name) for name in _PRODUCTS[dtype]
    )


# What x86 processors call their instructions for products of a dtype.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def _native_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native kernels cannot serve, and what to do about it; None where they can."""
    if device.type != "cpu":
        return f"the native kernels run on the CPU and the device is {device.type}; use --kernels triton"
    if not cpu.AVAILABLE:
        return "trivium._native is not built; install a C++17 compiler and run `pip install --no-deps --no-build-isolation -e .`"
    if dtype not in cpu.DTYPES:
        return f"the native kernels have float32 and bfloat16, not {dtype}; use --bf16"
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot serve, and what to do about it; None where it can."""
    if ops.triton_rms_norm is None:
        return "triton cannot be imported; install triton>=3.6"
    if device.type == "cpu" and not ops.triton_rms_norm.INTERPRETED:
        return "Triton has no CPU target; set TRITON_INTERPRET=1 (slow, for tests)"
    if device.type == "cuda" and ops.triton_rms_norm.INTERPRETED:
        return "TRITON_INTERPRET=1 would run the kernels on the CPU; unset it"
    return None


_OBSTACLES = {"triton": _triton_obstacle, "native": _native_obstacle}
