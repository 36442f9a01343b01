"""One run under one layout, measured: the losses and norms it reports, and from every rank the gradients and updates of every part."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from runs import rows_of

import pretrain_gpt
from parity.mutations import applied
from trivium.launch import Process
from trivium.mesh import Mesh
from trivium.optim.optimizer import Optimizer
from trivium.testing import run_ranks

# What has gone wrong elsewhere, all at once: fewer key-value heads than ranks, a tied head, a vocabulary of 97, an odd number of
# layers, biases, QK norms, partial rotation, unequal masks, gradient accumulation, hidden dropout, a clip that bites.
RUN = (
    "--hidden-size 32 --num-attention-heads 4 --init-method-std 0.1 --hidden-dropout 0.1 --attention-dropout 0 --seq-length 16 "
    "--micro-batch-size 1 --global-batch-size 8 --eod-mask-loss --clip-grad 0.3 --train-iters 20 --lr 5e-3 --adam-eps 1e-3 --weight-decay 0.1 "
    "--tokenizer-type NullTokenizer --vocab-size 96 --make-vocab-size-divisible-by 16 --num-workers 0 --device cpu "
    "--eval-interval 20 --eval-iters 2 --split 80,20,0 --log-interval 20"
)
MODELS = {
    "llama": "--num-layers 3 --ffn-hidden-size 48 --group-query-attention --num-query-groups 2 --swiglu --qk-layernorm --add-qkv-bias "
    "--position-embedding-type rope --rotary-percent 0.5",
    "gpt": "--num-layers 3 --max-position-embeddings 20",  # learned positions, LayerNorm, GELU, every bias, tied
    "untied": "--num-layers 3 --ffn-hidden-size 48 --group-query-attention --num-query-groups 1 --squared-relu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights",
}
# What the families of Hugging Face have beside these: projections normalized over all ranks, norms after the branches, windows, capped scores
# and logits, two kinds of rotation, weights of norms around 1, branches side by side.
MODELS |= {
    "olmo": "--num-layers 3 --ffn-hidden-size 48 --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --norm-placement post --qk-layernorm "
    '--qk-layernorm-width projection --rope-scaling {"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":8}',
    "gemma": "--num-layers 3 --ffn-hidden-size 48 --group-query-attention --num-query-groups 2 --geglu --normalization RMSNorm "
    "--apply-layernorm-1p --norm-placement both --disable-bias-linear --position-embedding-type rope --qk-layernorm --scale-embeddings "
    "--window-size 4,0 --window-attn-skip-freq 2 --attn-logit-softcapping 5 --final-logit-softcapping 3 --softmax-scale 0.3 "
    '--rotary-base-local 100 --rope-scaling {"rope_type":"linear","factor":2.0}',
    "neox": "--num-layers 3 --ffn-hidden-size 48 --parallel-residual --exact-gelu --position-embedding-type rope --rotary-percent 0.5 "
    "--untie-embeddings-and-output-weights --window-size 5,0",
}
MODELS["deep"] = MODELS["llama"].replace("--num-layers 3", "--num-layers 7")
MODELS["documents"] = MODELS["llama"] + " --reset-attention-mask --reset-position-ids"
MODELS["narrow"] = MODELS["gpt"] + " --ffn-hidden-size 9"
SGD = "--optimizer sgd --exit-interval 3 --eval-iters 0"
COUNTED_UPDATES = 3
LR = 5e-3


@dataclass
class Measured:
    """losses, norms: of each update. valid: the losses of each evaluation. gradients: of the first update, unclipped.

    updates: w - w0 after three, of `weights` w0.
    """

    losses: list[float]
    norms: list[float]
    valid: list[float]
    gradients: dict[str, torch.Tensor]
    updates: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


@dataclass
class Held:
    """A box of a part as one rank holds it; `counted` on the one rank that accounts for it."""

    name: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    tensor: torch.Tensor
    counted: bool


def measure(arguments: str, ranks: int, folder: Path, mutation: str | None = None) -> Measured:
    """Run pretrain_gpt.py's own main on `ranks` gloo ranks; with a mutation, code that is broken on purpose."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    arguments = f"{arguments} --metrics-jsonl {metrics}"
    if ranks == 1:
        found = [spied_run(Mesh.plan(1, 0), arguments, mutation)]
    else:
        found = run_ranks(ranks, spied_run, arguments, mutation, timeout=240)
    rows = rows_of(metrics)
    gradients, first, last = (assemble([rank[k] for rank in found]) for k in range(3))
    updates = {name: last[name] - first[name] for name in first}
    valid = [row["lm_loss"] for row in rows_of(metrics, "valid")]
    return Measured(
        [row["lm_loss"] for row in rows],
        [row["grad_norm"] for row in rows],
        valid,
        gradients,
        updates,
        first,
    )


def spied_run(
    mesh: Mesh, arguments: str, mutation: str | None
) -> tuple[list[Held], list[Held], list[Held]]:
    """The first update's gradients, the weights before it and those after the third, as this rank holds them."""
    gradients, weights, honest = [], [], Optimizer.update

    def update(self, lr, grad_scale, skip):
        if not gradients:
            gradients.extend(held(self, lambda bucket: bucket.pieces(bucket.gradients)))
        if len(weights) < COUNTED_UPDATES + 1:
            weights.append(held(self, lambda bucket: bucket.pieces(bucket.masters)))
        honest(self, lr, grad_scale, skip)

    Optimizer.update = update
    try:
        with applied(mutation):
            pretrain_gpt.main(arguments.split(), Process(mesh.rank, mesh.world_size, mesh.rank))
    finally:
        Optimizer.update = honest
    return gradients, weights[0], weights[-1]


def held(optimizer: Optimizer, pieces) -> list[Held]:
    return [
        Held(
            piece.name,
            piece.shape,
            piece.box,
            piece.tensor.clone(),
            piece.primary and bucket.reduction.copies.rank == 0,
        )
        for bucket in optimizer.buckets
        for piece in pieces(bucket)
    ]


def assemble(ranks: list[list[Held]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the boxes of all ranks: every element counted exactly once, and every copy of it the same, bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for piece in (piece for rank in ranks for piece in rank if piece.counted):
        place = tuple(slice(*bounds) for bounds in piece.box)
        whole.setdefault(piece.name, torch.zeros(piece.shape))[place] = piece.tensor
        counts.setdefault(piece.name, torch.zeros(piece.shape))[place] += 1
    for name, count in counts.items():
        assert (count == 1).all(), (
            f"{name}: elements are counted {count.min():.0f} to {count.max():.0f} times"
        )
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            counted = whole[piece.name][tuple(slice(*bounds) for bounds in piece.box)]
            same = (piece.tensor == counted) | (
                piece.tensor.isnan() & counted.isnan()
            )  # an overflow of fp16 is an overflow on all
            assert same.all(), (
                f"{piece.name} {piece.box}: the copy on rank {rank} differs from the one that counts"
            )
    return whole


def differences(found: Measured, reference: Measured) -> dict[str, float]:
    """How far a run is from one process, each in units of its tolerance: at most 1 passes.

    Tolerances (fp32, sums in another order; docs/parallelism.md derives them): losses and norms 1e-5 relative, over all updates. Every
    gradient 1e-5 of its norm, or of its share G sqrt(n / N) of the whole model's norm where the true gradient is (nearly) zero, as a key
    bias' is. Every update of three 1e-4 of its norm, or of 0.01 lr sqrt(n), or 2^-24 of the weights' norm: half a step of fp32 for each.
    """
    assert found.gradients.keys() == reference.gradients.keys()
    assert (
        len(found.losses) == len(reference.losses)
        and len(found.valid) == len(reference.valid)
        and len(found.norms) == len(reference.norms)
    )
    result = {
        kind: _worst_relative(getattr(found, kind), getattr(reference, kind)) / 1e-5
        for kind in ("losses", "norms", "valid")
    }
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
    return {name: value if value == value else float("inf") for name, value in result.items()}


def _worst_relative(found: list[float], expected: list[float]) -> float:
    return max((abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)), default=0.0)
