"""The door to every op of a model and its optimizer, bound to the implementations of this run."""

from dataclasses import dataclass, field
from types import ModuleType

from . import cpu, reference, triton
from .attention import AttentionOps

# Implementations beside plain PyTorch. A new one is a module with functions of the same names.
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": cpu, "triton": triton}

# What --kernels calls an op, and the functions that it is made of: those of reference.py.
FUNCTIONS = {
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "rope": ("rope", "split_heads"),
    "activation": ("activation", "gated_activation"),
    "few_rows": ("few_rows_product",),
    "block_step": ("block_step",),
    "cross_entropy": ("cross_entropy_statistics", "cross_entropy_gradient_"),
    "grad_norm": ("squared_norm",),
    "adamw": ("adamw_",),
}


def _implementations_of(functions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the modules that have all of these functions."""
    return tuple(
        name
        for name, module in IMPLEMENTATIONS.items()
        if all(hasattr(module, function) for function in functions)
    )


# Each op with the implementations it has beside plain PyTorch: {"rms_norm": ("native", "triton")}.
OPS = {op: _implementations_of(functions) for op, functions in FUNCTIONS.items()}

# A step of a whole block in one call is made of these kernels, or it is not made at all.
STEP_IS_MADE_OF = ("rms_norm", "layer_norm", "rope", "activation", "few_rows")


@dataclass(frozen=True)
class Ops(AttentionOps):
    """The ops of a model and its optimizer. `Ops()` is plain PyTorch; `select_ops` reads the flags.

    The functions below are bound when an Ops is made, each to one implementation's, so that a call
    goes straight to it. reference.py has their contracts. Products and attention are methods.

    Without a gradient are: functions that end in an underscore, products, attention_block, the
    statistics of the loss and block_step. Autograd functions are made of them.

    kernels: torch, triton or native, for every op that has it; other ops are PyTorch's.
    attention_backend: as --attention-backend.
    fp32_matmul: see ProductOps.
    overrides: (op, implementation) for each op that is to differ from `kernels`.
    implementations: what each op runs on, derived from the above.
    """

    kernels: str = "torch"
    attention_backend: str = "auto"
    fp32_matmul: bool = False
    overrides: tuple[tuple[str, str], ...] = ()

    implementations: dict[str, str] = field(init=False, compare=False, repr=False)
    few_rows: int = field(init=False, compare=False, repr=False)

    rms_norm = staticmethod(reference.rms_norm)
    add_rms_norm = staticmethod(reference.add_rms_norm)
    layer_norm = staticmethod(reference.layer_norm)
    add_layer_norm = staticmethod(reference.add_layer_norm)
    rope = staticmethod(reference.rope)
    split_heads = staticmethod(reference.split_heads)
    activation = staticmethod(reference.activation)
    gated_activation = staticmethod(reference.gated_activation)
    few_rows_product = staticmethod(reference.few_rows_product)
    block_step = staticmethod(reference.block_step)
    cross_entropy_statistics = staticmethod(reference.cross_entropy_statistics)
    cross_entropy_gradient_ = staticmethod(reference.cross_entropy_gradient_)
    squared_norm = staticmethod(reference.squared_norm)
    adamw_ = staticmethod(reference.adamw_)

    def __post_init__(self) -> None:
        chosen = self._choice()
        bound: dict[str, object] = {"implementations": chosen}
        bound["few_rows"] = cpu.FEW_ROWS if chosen["few_rows"] == "native" else 0
        for op, name in chosen.items():
            if name != "torch":
                for function in FUNCTIONS[op]:
                    bound[function] = getattr(IMPLEMENTATIONS[name], function)
        for attribute, value in bound.items():
            object.__setattr__(self, attribute, value)

    def _choice(self) -> dict[str, str]:
        """Return the implementation of each op."""
        chosen = {op: self.kernels if self.kernels in OPS[op] else "torch" for op in OPS}
        chosen |= dict(self.overrides)
        parts = {chosen[op] for op in STEP_IS_MADE_OF}
        if self.attention_backend != "auto" or parts != {"native"}:
            chosen["block_step"] = "torch"
        return chosen

    def describe(self) -> str:
        """Return one line for the log: what each op runs on."""
        parts = []
        for name in dict.fromkeys(self.implementations.values()):
            ops = [op for op, one in self.implementations.items() if one == name]
            described = f"native ({cpu.simd()})" if name == "native" else name
            parts.append(f"{', '.join(ops)} {described}")
        parts.append(f"attention sdpa ({self.attention_backend})")
        if self.fp32_matmul:
            parts.append(
                "matrix products of 16-bit numbers in fp32, which is faster on this processor"
            )
        return f"kernels: {' | '.join(parts)}"
