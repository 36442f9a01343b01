"""Run one layout and measure it.

A run reports its losses and norms; every rank gives the gradients and updates of every part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isnan, sqrt
from pathlib import Path

import torch
from runs import rows_of

import pretrain_gpt
from parity.mutations import applied
from trivium.launch import Process
from trivium.mesh import Mesh
from trivium.optim.optimizer import Optimizer
from trivium.testing import run_ranks

# Everything that has gone wrong elsewhere, at once: fewer key-value heads than ranks, a tied head,
# a vocabulary of 97, an odd number of layers, biases, QK norms, partial rotation, unequal masks,
# gradient accumulation, hidden dropout, a clip that bites.
RUN = (
    "--hidden-size 32 --num-attention-heads 4 --init-method-std 0.1"
    " --hidden-dropout 0.1 --attention-dropout 0"
    " --seq-length 16 --micro-batch-size 1 --global-batch-size 8 --eod-mask-loss"
    " --clip-grad 0.3 --train-iters 20 --lr 5e-3 --adam-eps 1e-3 --weight-decay 0.1"
    " --tokenizer-type NullTokenizer --vocab-size 96 --make-vocab-size-divisible-by 16"
    " --num-workers 0 --device cpu"
    " --eval-interval 20 --eval-iters 2 --split 80,20,0 --log-interval 20"
)
THREE_LAYERS = "--num-layers 3"
LLAMA_WIDTHS = f"{THREE_LAYERS} --ffn-hidden-size 48 --group-query-attention --num-query-groups 2"
YARN = '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":8}'
LINEAR = '{"rope_type":"linear","factor":2.0}'
LLAMA = (
    f"{LLAMA_WIDTHS} --swiglu --qk-layernorm --add-qkv-bias"
    " --position-embedding-type rope --rotary-percent 0.5"
)
# Learned positions, LayerNorm, GELU, every bias, tied.
GPT = f"{THREE_LAYERS} --max-position-embeddings 20"
MODELS = {
    "llama": LLAMA,
    "gpt": GPT,
    "untied": (
        f"{THREE_LAYERS} --ffn-hidden-size 48 --group-query-attention --num-query-groups 1"
        " --squared-relu --normalization RMSNorm --disable-bias-linear"
        " --position-embedding-type rope --untie-embeddings-and-output-weights"
    ),
    # What the families of Hugging Face have beside these: projections normalized over all ranks,
    # norms after the branches, windows, capped scores and logits, two kinds of rotation, weights of
    # norms around 1, branches side by side.
    "olmo": (
        f"{LLAMA_WIDTHS} --swiglu --normalization RMSNorm --disable-bias-linear"
        " --position-embedding-type rope --untie-embeddings-and-output-weights"
        " --norm-placement post --qk-layernorm --qk-layernorm-width projection"
        f" --rope-scaling {YARN}"
    ),
    "gemma": (
        f"{LLAMA_WIDTHS} --geglu --normalization RMSNorm --apply-layernorm-1p"
        " --norm-placement both --disable-bias-linear --position-embedding-type rope"
        " --qk-layernorm --scale-embeddings --window-size 4,0 --window-attn-skip-freq 2"
        " --attn-logit-softcapping 5 --final-logit-softcapping 3 --softmax-scale 0.3"
        f" --rotary-base-local 100 --rope-scaling {LINEAR}"
    ),
    "neox": (
        f"{THREE_LAYERS} --ffn-hidden-size 48 --parallel-residual --exact-gelu"
        " --position-embedding-type rope --rotary-percent 0.5"
        " --untie-embeddings-and-output-weights --window-size 5,0"
    ),
    "deep": LLAMA.replace(THREE_LAYERS, "--num-layers 7"),
    "documents": f"{LLAMA} --reset-attention-mask --reset-position-ids",
    "narrow": f"{GPT} --ffn-hidden-size 9",
}
SGD = "--optimizer sgd --exit-interval 3 --eval-iters 0"
COUNTED_UPDATES = 3
LR = 5e-3


@dataclass
class Measured:
    """What one run reports and does.

    losses, norms: of each update
    valid: the losses of each evaluation
    gradients: of the first update, unclipped, by part
    weights: before the first update, by part
    updates: what COUNTED_UPDATES updates add to the weights, by part
    """

    losses: list[float]
    norms: list[float]
    valid: list[float]
    gradients: dict[str, torch.Tensor]
    updates: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


@dataclass
class Held:
    """A box of a part as one rank holds it.

    shape: of the whole part
    box: first and last index + 1 in each dimension
    counted: whether this rank is the one that accounts for it
    """

    name: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    tensor: torch.Tensor
    counted: bool

    @property
    def place(self) -> tuple[slice, ...]:
        """Return the box as an index of the whole part."""
        return tuple(slice(*bounds) for bounds in self.box)


@dataclass
class Spied:
    """What one rank held in a run: the first gradients, the weights before and after updates."""

    gradients: list[Held]
    before: list[Held]
    after: list[Held]


def measure(arguments: str, ranks: int, folder: Path, mutation: str | None = None) -> Measured:
    """Run pretrain_gpt.py's own main on `ranks` gloo ranks.

    mutation: a key of MUTATIONS, to break the engine on purpose
    """
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    arguments = f"{arguments} --metrics-jsonl {metrics}"
    if ranks == 1:
        found = [spied_run(Mesh.plan(1, 0), arguments, mutation)]
    else:
        found = run_ranks(ranks, spied_run, arguments, mutation, timeout=240)
    before = assemble([rank.before for rank in found])
    after = assemble([rank.after for rank in found])
    rows = rows_of(metrics)
    return Measured(
        losses=[row["lm_loss"] for row in rows],
        norms=[row["grad_norm"] for row in rows],
        valid=[row["lm_loss"] for row in rows_of(metrics, "valid")],
        gradients=assemble([rank.gradients for rank in found]),
        updates={name: after[name] - before[name] for name in before},
        weights=before,
    )


def spied_run(mesh: Mesh, arguments: str, mutation: str | None) -> Spied:
    """Run on one rank, and look at what its optimizer holds at each of the first updates."""
    gradients: list[Held] = []
    weights: list[list[Held]] = []
    honest = Optimizer.update

    def update(self, lr, grad_scale, skip):
        if not gradients:
            gradients.extend(held(self, lambda bucket: bucket.pieces(bucket.gradients)))
        if len(weights) < COUNTED_UPDATES + 1:
            weights.append(held(self, lambda bucket: bucket.pieces(bucket.masters)))
        honest(self, lr, grad_scale, skip)

    Optimizer.update = update
    try:
        with applied(mutation):
            process = Process(mesh.rank, mesh.world_size, mesh.rank)
            pretrain_gpt.main(arguments.split(), process)
    finally:
        Optimizer.update = honest
    return Spied(gradients, weights[0], weights[-1])


def held(optimizer: Optimizer, pieces: Callable) -> list[Held]:
    """Copy what an optimizer holds; pieces(bucket) gives the pieces to copy."""
    found = []
    for bucket in optimizer.buckets:
        first_copy = bucket.reduction.copies.rank == 0
        for piece in pieces(bucket):
            counted = piece.primary and first_copy
            copy = piece.tensor.clone()
            found.append(Held(piece.name, piece.shape, piece.box, copy, counted))
    return found


def assemble(ranks: list[list[Held]]) -> dict[str, torch.Tensor]:
    """Build whole tensors from the boxes of all ranks.

    Asserts that every element is counted exactly once, and that all its copies have equal bits.
    """
    whole: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for piece in (piece for rank in ranks for piece in rank if piece.counted):
        whole.setdefault(piece.name, torch.zeros(piece.shape))[piece.place] = piece.tensor
        counts.setdefault(piece.name, torch.zeros(piece.shape))[piece.place] += 1
    for name, count in counts.items():
        times = f"{count.min():.0f} to {count.max():.0f} times"
        assert (count == 1).all(), f"{name}: elements are counted {times}"
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            counted = whole[piece.name][piece.place]
            # An overflow of fp16 is NaN on all ranks.
            same = (piece.tensor == counted) | (piece.tensor.isnan() & counted.isnan())
            where = f"{piece.name} {piece.box}"
            assert same.all(), f"{where}: rank {rank}'s copy differs from the one that counts"
    return whole


def differences(found: Measured, reference: Measured) -> dict[str, float]:
    """Return how far a run is from one process, each in units of its tolerance: 1 or less passes.

    Tolerances are for fp32 with sums in another order; docs/parallelism.md derives them.
    Losses and norms of all updates: 1e-5 relative.
    A gradient: 1e-5 of its norm, or of its share G sqrt(n / N) of the whole model's norm where the
    true gradient is (nearly) zero, as a key bias' is.
    An update of three: 1e-4 of its norm, or of 0.01 lr sqrt(n), or 2^-24 of the weights' norm,
    which is half a step of fp32 for each element.
    """
    assert found.gradients.keys() == reference.gradients.keys()
    result: dict[str, float] = {}
    for kind in ("losses", "norms", "valid"):
        worst = _worst_relative(getattr(found, kind), getattr(reference, kind))
        result[kind] = worst / 1e-5
    total = sqrt(sum(g.square().sum().item() for g in reference.gradients.values()))
    count = sum(g.numel() for g in reference.gradients.values())
    for name, g in reference.gradients.items():
        limit = 1e-5 * max(g.norm().item(), total * sqrt(g.numel() / count))
        result[f"gradient of {name}"] = (found.gradients[name] - g).norm().item() / limit
    for name, update in reference.updates.items():
        limit = max(
            1e-4 * update.norm().item(),
            1e-6 * LR * sqrt(update.numel()),
            2**-24 * reference.weights[name].norm().item(),
        )
        result[f"update of {name}"] = (found.updates[name] - update).norm().item() / limit
    # A NaN would pass every comparison.
    return {name: inf if isnan(value) else value for name, value in result.items()}


def _worst_relative(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference; a different number of values is an error."""
    return max((abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)), default=0.0)
