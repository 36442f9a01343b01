"""Estimate what one chunk of a pipeline costs: seconds of a micro-batch, bytes sent by axis.

The model of time:

- Arithmetic runs at `peak x efficiency`. Norms, activations, the optimizer's update, and starting
  kernels and messages are part of `efficiency`.
- A ring collective of n bytes over d devices sends n (d - 1) / d from each, an all-reduce twice
  that, at the link's bytes a second: a node's link where the axis lies within a node (ranks stand
  in the order tp, cp, dp, pp), else the link between nodes.
- A tensor-parallel collective is waited for, unless the engine starts it before a product that does
  not need it. The ring of context parallelism hides behind attention. What data parallelism
  overlaps hides behind one micro-batch.
- What is hidden still costs HIDDEN of its time, for the processors it takes away.

Letters as in pass_spec.py.
"""

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from ..config import ModelConfig
from .flops import PEAK_BF16
from .parameters import ModelChunk, local_widths
from .pass_spec import FP32, PassSpec

HIDDEN = 0.15  # collectives run on about 20 of an H100's 132 multiprocessors


@dataclass(frozen=True)
class Hardware:
    """The devices and links of a plan, in bytes and FLOP a second of one device.

    The defaults are an H100 SXM and its links at 80% of their datasheets' 450 and 50 GB/s.

    efficiency: the share of the peak that products reach. With the default, Llama 3 405B on 8,192
        and 16,384 devices comes within a point of the MFU that its report gives, 43% and 41%.
    memory, reserve: bytes of a device, and those for context, communicators and fragmentation.
    """

    peak: float = PEAK_BF16["H100"]
    efficiency: float = 0.55
    intra_node: float = 360e9
    inter_node: float = 40e9
    devices_per_node: int = 8
    memory: float = 80e9
    reserve: float = 4e9

    @property
    def rate(self) -> float:
        """Return the FLOP a second that products reach."""
        return self.peak * self.efficiency

    def link(self, extent: int) -> float:
        """Return the bytes a second of an axis whose ranks lie within `extent` consecutive ones."""
        return self.intra_node if extent <= self.devices_per_node else self.inter_node


@dataclass(frozen=True)
class PassTimes:
    """The seconds of one micro-batch in one chunk, or in all chunks of a rank.

    They include what the chunk waits for over tp and cp. backward_input and backward_weight: the
    parts of a backward pass that schedules may split.
    """

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the forward and the whole backward pass."""
        return self.forward + self.backward_input + self.backward_weight

    def __add__(self, other: "PassTimes") -> "PassTimes":
        return PassTimes(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )

    def __mul__(self, factor: float) -> "PassTimes":
        return PassTimes(
            self.forward * factor, self.backward_input * factor, self.backward_weight * factor
        )


class BothWays(NamedTuple):
    """Two numbers of one micro-batch: of its forward pass and of its backward pass."""

    forward: float
    backward: float


# Collectives.


def exposed(seconds: float, window: float) -> float:
    """Return what communication of so many seconds costs beside `window` seconds of computation."""
    return max(0.0, seconds - window) + HIDDEN * min(seconds, window)


def gather(size: float, ranks: int) -> float:
    """Return the bytes each rank sends to gather `size` bytes over a ring, or to reduce-scatter."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """Return the bytes each rank sends to sum `size` bytes over a ring."""
    return 2 * gather(size, ranks)


# Bytes sent.


def tensor_bytes(model: ModelConfig, chunk: ModelChunk, spec: PassSpec) -> BothWays:
    """Return what a rank sends over tp for one micro-batch, recomputation included.

    In units of U = e b t H:

                        forward                         backward
        a layer         sums 2 U                        sums 2 U
        with SP         gathers 2 U, scatters 2 U       gathers 4 U (x again for the weights'
                                                        gradient, and dy), scatters 2 U
        embedding       sums U, with SP scatters it     with SP gathers U
        head            sums the gradient of its input: the loss has it made in its forward pass
        loss            sums 3 fp32 numbers a token
    """
    unit = spec.itemsize * spec.tokens * model.hidden_size
    layers = chunk.layers
    again = _recomputed_layers(chunk, spec)
    loss = all_reduce(3 * FP32 * spec.tokens, spec.tp) if chunk.predicts else 0.0
    if spec.sequence_parallel:
        forward = 4 * layers + chunk.embeds + 2 * chunk.predicts
        backward = 6 * layers + 4 * again + chunk.embeds
        once = gather(unit, spec.tp)
    else:
        forward = 2 * layers + chunk.embeds + chunk.predicts
        backward = 2 * layers + 2 * again
        once = all_reduce(unit, spec.tp)
    return BothWays(once * forward + loss, once * backward)


def context_bytes(model: ModelConfig, spec: PassSpec) -> BothWays:
    """Return what a rank sends over cp for one layer and micro-batch, recomputation included.

    n ranks, KV = 2 b t k numbers:

        p2p         forward n - 1 hops of KV; backward as many, and n hops of its fp32 gradient
        allgather   forward KV of all ranks; backward its gradient, reduced in fp32
        a2a         q, k, v and o there and back, key-value heads repeated until each rank has one
    """
    n = spec.cp
    e = spec.itemsize
    bt = spec.tokens
    if n == 1:
        return BothWays(0.0, 0.0)
    kv_heads = max(1, model.num_kv_heads // spec.tp)
    kv = 2 * bt * kv_heads * model.head_size
    q = bt * model.num_attention_heads // spec.tp * model.head_size
    forwards_in_backward = 0 if spec.recompute is None else 1
    match spec.cp_comm_type:
        case "p2p":
            hops = e * kv * (n - 1)
            return BothWays(hops, hops * (1 + forwards_in_backward) + FP32 * kv * n)
        case "allgather":
            once = gather(e * kv * n, n)
            return BothWays(once, once * forwards_in_backward + gather(FP32 * kv * n, n))
        case _:
            repeats = n // gcd(kv_heads, n)
            once = gather(e * (2 * q + kv * repeats), n)
            return BothWays(once, once * (1 + forwards_in_backward))


class DataBytes(NamedTuple):
    """The bytes that a rank sends over data x context parallel in one update.

    gradients: reduced in fp32.
    weights: gathered in the working dtype.
    copies: gradients summed over the groups that repeat a shard.
    """

    gradients: float
    weights: float
    copies: float


def data_bytes(
    parameters: int, strategy: str, shards: int, copies: int, itemsize: int, num_microbatches: int
) -> DataBytes:
    """Return what a rank of `parameters` sends in one update.

    strategy: --data-parallel-sharding-strategy. shards: ranks that share the optimizer's state.
    copies: ranks that hold the same parameters. itemsize: bytes of a weight.
    """
    reductions = gathers = 1
    if strategy in ("optim_grads", "optim_grads_params"):
        reductions = num_microbatches
    if strategy == "optim_grads_params":
        gathers = 2 * num_microbatches  # forward and backward
    return DataBytes(
        gradients=gather(FP32 * parameters, shards) * reductions,
        weights=gather(itemsize * parameters, shards) * gathers,
        copies=all_reduce(FP32 * parameters / shards, copies // shards),
    )


class Overlaps(NamedTuple):
    """The transfers that data parallelism hides behind computation: of gradients, of weights."""

    gradients: bool
    weights: bool


def exposed_data_seconds(
    sent: DataBytes,
    strategy: str,
    overlaps: Overlaps,
    num_microbatches: int,
    times: PassTimes,
    link: float,
) -> float:
    """Return the seconds of data parallelism that no computation hides, in one update.

    Overlapped gradients hide behind one micro-batch's backward pass, overlapped weights behind its
    forward pass. With optim_grads_params both hide behind every micro-batch.
    """
    m = num_microbatches
    gradients = sent.gradients / link
    weights = sent.weights / link
    copies = sent.copies / link
    if strategy == "optim_grads_params":
        return m * exposed((gradients + weights) / m, times.total) + copies
    rounds = m if strategy == "optim_grads" else 1
    backward = overlaps.gradients * (times.backward_input + times.backward_weight)
    forward = overlaps.weights * times.forward
    reduced = rounds * exposed(gradients / rounds, backward)
    return reduced + exposed(weights, forward) + copies


# Time.


def splits_backward(schedule: str) -> bool:
    """Return whether a schedule computes the gradients of inputs and weights apart."""
    return schedule.startswith("zb")


def chunk_times(
    model: ModelConfig,
    vocab_size: int,
    chunk: ModelChunk,
    spec: PassSpec,
    schedule: str,
    hardware: Hardware,
) -> PassTimes:
    """Return the seconds of one micro-batch in a chunk."""
    layer = _layer_times(model, spec, schedule, hardware)
    times = layer * chunk.layers + _recomputed_times(model, chunk, spec, layer, hardware)
    return times + _ends_times(model, vocab_size, chunk, spec, hardware)


def _layer_times(
    model: ModelConfig, spec: PassSpec, schedule: str, hardware: Hardware
) -> PassTimes:
    """Return the seconds of a layer.

    Linear layers: 2 b t FLOP a weight forward, and as many for each of the two gradients. Causal
    attention: 2 b t T A D / tp forward, twice that backward.
    """
    widths = local_widths(model, spec.tp)
    bt = spec.tokens
    h = model.hidden_size
    column = 2 * bt * h * (widths.qkv + widths.up) / hardware.rate
    row = 2 * bt * h * (widths.query + widths.feed_forward) / hardware.rate
    attention = _attention_seconds(model, spec, hardware)
    ring = _context_seconds(model, spec, attention, hardware)
    tensor = _tensor_seconds(model, spec, schedule, column, hardware)
    return PassTimes(
        column + row + attention + ring.forward + tensor.forward,
        column + row + 2 * attention + ring.backward + tensor.backward_input,
        column + row + tensor.backward_weight,
    )


def _attention_seconds(model: ModelConfig, spec: PassSpec, hardware: Hardware) -> float:
    """Return the seconds of the two products of causal attention in a layer's forward pass."""
    query = local_widths(model, spec.tp).query
    return 2 * spec.tokens * spec.seq_length * query / hardware.rate


def _context_seconds(
    model: ModelConfig, spec: PassSpec, attention: float, hardware: Hardware
) -> BothWays:
    """Return what a layer waits for over cp; a ring's hops hide behind attention."""
    sent, link = context_bytes(model, spec), hardware.link(spec.tp * spec.cp)
    forward, backward = sent.forward / link, sent.backward / link
    if spec.cp_comm_type == "p2p":
        return BothWays(exposed(forward, attention), exposed(backward, 2 * attention))
    return BothWays(forward, backward)


def _tensor_seconds(
    model: ModelConfig, spec: PassSpec, schedule: str, column: float, hardware: Hardware
) -> PassTimes:
    """Return what a layer waits for over tp.

    column: seconds of its column-parallel products. A zero-bubble schedule puts off the weights'
    gradient, the product that would hide what is summed.
    """
    gathered = gather(spec.itemsize * spec.tokens * model.hidden_size, spec.tp)
    unit = gathered / hardware.link(spec.tp)
    split = splits_backward(schedule)
    window = 0.0 if split else column
    if not spec.sequence_parallel:
        return PassTimes(4 * unit, exposed(4 * unit, window), 0.0)
    # Backward: two dy are waited for, dx is scattered during the weights' product, and x is
    # gathered during the inputs' product; with zb later and alone.
    x_gathered = 0.0 if split else exposed(2 * unit, column)
    backward = 2 * unit + exposed(2 * unit, window) + x_gathered
    return PassTimes(4 * unit, backward, 2 * unit if split else 0.0)


def _recomputed_times(
    model: ModelConfig, chunk: ModelChunk, spec: PassSpec, layer: PassTimes, hardware: Hardware
) -> PassTimes:
    """Return what is computed again, in the backward pass of the inputs."""
    if spec.recompute == "selective":
        attention = _attention_seconds(model, spec, hardware)
        return PassTimes(0.0, attention, 0.0) * chunk.layers
    return PassTimes(0.0, layer.forward, 0.0) * _recomputed_layers(chunk, spec)


def _recomputed_layers(chunk: ModelChunk, spec: PassSpec) -> int:
    """Return how many whole layers are computed twice."""
    if spec.recompute != "full":
        return 0
    if spec.recompute_method == "uniform":
        return chunk.layers
    return min(spec.recompute_layers, chunk.layers)


def _ends_times(
    model: ModelConfig, vocab_size: int, chunk: ModelChunk, spec: PassSpec, hardware: Hardware
) -> PassTimes:
    """Return the seconds of the head with its loss, and of the embedding's collectives."""
    bt, h = spec.tokens, model.hidden_size
    unit = gather(spec.itemsize * bt * h, spec.tp) / hardware.link(spec.tp)
    vocabulary = model.padded_vocabulary(vocab_size, spec.tp)
    head = 2 * bt * h * vocabulary / spec.tp / hardware.rate
    times = PassTimes()
    if chunk.predicts:
        # The forward pass makes both gradients too, and gathers and scatters, or sums.
        times += PassTimes(3 * head + 2 * unit, 0.0, 0.0)
    if chunk.embeds:
        backward = unit if spec.sequence_parallel else 0.0
        times += PassTimes(unit if spec.sequence_parallel else 2 * unit, backward, 0.0)
    return times
