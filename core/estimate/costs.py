"""What one chunk of a pipeline costs on given hardware: seconds of a micro-batch, and bytes sent over every axis.

The model of time. Arithmetic runs at `peak x efficiency`. A ring collective of n bytes over d devices sends n (d - 1) / d from each, an
all-reduce twice that, at the link's bytes a second: a node's where the axis lies within one (ranks stand in the order tp, cp, dp, pp), else
that between nodes. A tensor-parallel collective is waited for, unless the engine starts it before a GEMM that does not need it; the ring
of context parallelism hides behind attention; what data parallelism overlaps hides behind one micro-batch. What is hidden still costs
HIDDEN of its time, for the processors it takes away. Norms, activations, the optimizer's update, and starting kernels and messages are part
of `efficiency`.
"""

from dataclasses import dataclass
from math import gcd

from ..config import ModelConfig
from .activations import Cut
from .memory import FP32, Chunk, local_widths

HIDDEN = 0.15  # collectives run on about 20 of an H100's 132 multiprocessors


@dataclass(frozen=True)
class Hardware:
    """Defaults: an H100 SXM, its links at 80% of the 450 and 50 GB/s of the datasheets. Bytes and FLOP a second of one device."""

    peak: float = 989e12
    efficiency: float = 0.55  # with it, Llama 3 405B on 8,192 and 16,384 comes within a point of the MFU its report gives, 43% and 41%
    intra_node: float = 360e9
    inter_node: float = 40e9
    devices_per_node: int = 8
    memory: float = 80e9
    reserve: float = 4e9  # context, communicators, fragmentation

    @property
    def rate(self) -> float:
        return self.peak * self.efficiency

    def link(self, extent: int) -> float:
        """Of an axis whose ranks lie within `extent` consecutive ones."""
        return self.intra_node if extent <= self.devices_per_node else self.inter_node


@dataclass(frozen=True)
class Times:
    """Seconds of one micro-batch in one chunk, or of all of a rank's; with what the chunk waits for over tp and cp."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight

    def __add__(self, other: "Times") -> "Times":
        return Times(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )

    def __mul__(self, factor: float) -> "Times":
        return Times(
            self.forward * factor, self.backward_input * factor, self.backward_weight * factor
        )


def exposed(seconds: float, window: float) -> float:
    """What communication of so many seconds costs beside a computation of `window` seconds."""
    return max(0.0, seconds - window) + HIDDEN * min(seconds, window)


def gather(size: float, ranks: int) -> float:
    """Bytes each rank sends to gather, or to reduce and scatter, `size` bytes over a ring."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    return 2 * gather(size, ranks)


def tensor_bytes(model: ModelConfig, chunk: Chunk, cut: Cut) -> tuple[float, float]:
    """Sent over tp for one micro-batch, forward and backward (with what is computed again).

    U = e b t h. Each layer sums 2 U forward and 2 U backward; with sequence parallel it gathers 2 and scatters 2 forward, and backward
    gathers 4 (x again for the weights' gradient, and dy) and scatters 2. The embedding sums once; the head its input's gradient once, and
    forward, since the loss has its gradient made at once.
    """
    unit = cut.e * cut.tokens * model.hidden_size
    again = _recomputed(chunk, cut)
    loss = all_reduce(3 * FP32 * cut.tokens, cut.tp) * chunk.predicts
    if cut.sequence_parallel:
        forward, backward = (
            4 * chunk.layers + chunk.embeds + 2 * chunk.predicts,
            6 * chunk.layers + 4 * again + chunk.embeds,
        )
        return gather(unit, cut.tp) * forward + loss, gather(unit, cut.tp) * backward
    forward, backward = (
        2 * chunk.layers + chunk.embeds + chunk.predicts,
        2 * chunk.layers + 2 * again,
    )
    return all_reduce(unit, cut.tp) * forward + loss, all_reduce(unit, cut.tp) * backward


def context_bytes(model: ModelConfig, cut: Cut) -> tuple[float, float]:
    """Sent over cp for one layer and micro-batch, forward and backward.

    KV = 2 e b t k. p2p: n - 1 hops of KV forward; backward as many, and n of its gradient in fp32. allgather: KV of all ranks, and its
    gradient reduced in fp32. a2a: q, k, v and o, there and back.
    """
    n, bt = cut.cp, cut.tokens
    if n == 1:
        return 0.0, 0.0
    heads = max(1, model.num_kv_heads // cut.tp)
    kv, q = (
        2 * bt * heads * model.head_size,
        bt * model.num_attention_heads // cut.tp * model.head_size,
    )
    again = 2 if cut.granularity is not None else 1
    if cut.cp_comm_type == "p2p":
        return cut.e * kv * (n - 1), cut.e * kv * (n - 1) * again + FP32 * kv * n
    if cut.cp_comm_type == "allgather":
        once = gather(cut.e * kv * n, n)
        return once, once * (again - 1) + gather(FP32 * kv * n, n)
    once = gather(cut.e * (2 * q + kv * (n // gcd(heads, n))), n)
    return once, once * again


def data_bytes(
    parameters: int, strategy: str, shards: int, copies: int, e: int, num_microbatches: int
) -> dict[str, float]:
    """Sent over data x context parallel in one update: gradients (fp32), weights (e bytes each), and over the groups that repeat a shard."""
    gradients, weights = gather(FP32 * parameters, shards), gather(e * parameters, shards)
    rounds = num_microbatches if strategy in ("optim_grads", "optim_grads_params") else 1
    gathers = 2 * num_microbatches if strategy == "optim_grads_params" else 1
    repeated = all_reduce(FP32 * parameters / shards, copies // shards)
    return {"gradients": gradients * rounds, "weights": weights * gathers, "copies": repeated}


def exposed_data_seconds(
    sent: dict[str, float],
    strategy: str,
    overlaps: tuple[bool, bool],
    num_microbatches: int,
    times: Times,
    link: float,
) -> float:
    """What no computation hides: overlapped, gradients hide behind one micro-batch's backward and gathered weights behind its forward."""
    seconds, m = {kind: size / link for kind, size in sent.items()}, num_microbatches
    if strategy == "optim_grads_params":
        return (
            m * exposed((seconds["gradients"] + seconds["weights"]) / m, times.total)
            + seconds["copies"]
        )
    rounds = m if strategy == "optim_grads" else 1
    gradients = rounds * exposed(
        seconds["gradients"] / rounds, overlaps[0] * (times.backward_input + times.backward_weight)
    )
    return gradients + exposed(seconds["weights"], overlaps[1] * times.forward) + seconds["copies"]


def chunk_times(
    model: ModelConfig, vocab_size: int, chunk: Chunk, cut: Cut, schedule: str, hardware: Hardware
) -> Times:
    """Of one micro-batch. Linear layers: 2 b t FLOP a weight, three times over; causal attention: 2 b t T A D / tp forward, twice that backward."""
    bt, h, (q, k, f) = cut.tokens, model.hidden_size, local_widths(model, cut.tp)
    up = f * (2 if model.gated else 1)
    column, row = (
        2 * bt * h * (q + 2 * k + up) / hardware.rate,
        2 * bt * h * (q + f) / hardware.rate,
    )
    attention = 2 * bt * cut.seq_length * q / hardware.rate
    ring = [size / hardware.link(cut.tp * cut.cp) for size in context_bytes(model, cut)]
    if cut.cp_comm_type == "p2p":
        ring = [exposed(ring[0], attention), exposed(ring[1], 2 * attention)]
    unit, split = gather(cut.e * bt * h, cut.tp) / hardware.link(cut.tp), schedule.startswith("zb")
    window = 0.0 if split else column  # zb puts the GEMM off that would hide what is summed
    if cut.sequence_parallel:
        # Backward: two dy are waited for, x is gathered during one GEMM (with zb, later and alone) and dx scattered during the next.
        back = 2 * unit + exposed(2 * unit, window) + (0.0 if split else exposed(2 * unit, column))
        waited, late = 4 * unit, 2 * unit * split
    else:
        waited, late, back = 4 * unit, 0.0, exposed(4 * unit, window)
    forward = column + row + attention + ring[0] + waited
    layer = Times(forward, column + row + 2 * attention + ring[1] + back, column + row + late)
    again = Times(0.0, forward, 0.0) * _recomputed(chunk, cut)
    if cut.granularity == "selective":
        again = Times(0.0, attention, 0.0) * chunk.layers
    head = 2 * bt * h * model.padded_vocabulary(vocab_size, cut.tp) / cut.tp / hardware.rate
    ends = Times()
    if chunk.predicts:
        ends += Times(
            3 * head + 2 * unit, 0.0, 0.0
        )  # with both gradients; what it gathers and scatters, or sums
    if chunk.embeds:
        ends += Times(
            unit if cut.sequence_parallel else 2 * unit, unit * cut.sequence_parallel, 0.0
        )
    return layer * chunk.layers + again + ends


def _recomputed(chunk: Chunk, cut: Cut) -> int:
    """Whole layers that are computed twice."""
    if cut.granularity != "full":
        return 0
    return chunk.layers if cut.method == "uniform" else min(cut.group, chunk.layers)
