"""Count the bytes that one rank needs for weights, gradients and optimizer state.

P parameters on the rank, e bytes of a weight, d ranks that share the optimizer's state:

    strategy             weights   gradients   masters   moments (Adam)
    no_shard             e P       4 P         4 P       8 P
    optim                e P       4 P         4 P / d   8 P / d
    optim_grads          e P       4 P / d     4 P / d   8 P / d      and two buckets whole
    optim_grads_params   gathered  4 P / d     4 P / d   8 P / d      and some whole gradients

In fp32 the weights are their own masters. The lower three are the stages 1 to 3 of Rajbhandari et
al. 2020, section 5. The first three live in flat buckets whose slots and shards are aligned. The
counts here include that: they are those of what is allocated, to the byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import OPTIMIZER_STATE, Config
from ..config.sizes import BUCKET_ALIGNMENT
from .parameters import (
    LocalParameter,
    ModelChunk,
    layer_parameters,
    local_parameters,
    local_vocabulary,
)
from .pass_spec import FP32, itemsize


@dataclass(frozen=True)
class StateMemory:
    """The bytes that stay for a whole run, and `transient`.

    parameters: a count, not bytes.
    weights: in the working dtype.
    gradients, masters, moments: in fp32.
    transient: what a backward pass holds of whole gradients at its fullest.
    """

    parameters: int
    weights: int
    gradients: int
    masters: int
    moments: int
    transient: int = 0

    @property
    def optimizer(self) -> int:
        """Return the optimizer's bytes: masters and moments."""
        return self.masters + self.moments

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.weights + self.gradients + self.optimizer + self.transient


def state_of(
    config: Config, vocab_size: int, chunks: Sequence[ModelChunk], *, shards: int, copies: int
) -> StateMemory:
    """Count the state of one rank.

    chunks: the model chunks of the rank. shards: ranks over which each parameter's optimizer state
    is cut. copies: ranks that hold the same parameters, data x context parallel.
    """
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    parameters = local_parameters(config.model, vocab_size, tp, chunks)
    if parallel.data_parallel_sharding_strategy == "optim_grads_params":
        return _fully_sharded(config, vocab_size, parameters, chunks, shards)

    bucket_sizes = _buckets(parameters, parallel.bucket_size(copies), shards)
    elements = sum(bucket_sizes)
    shard = FP32 * elements // shards
    e = itemsize(config)
    gradients = FP32 * elements
    transient = 0
    if parallel.data_parallel_sharding_strategy == "optim_grads":
        # Whole are only the bucket that is being filled and the one that is being reduced.
        gradients = shard
        transient = FP32 * sum(sorted(bucket_sizes)[-2:])
    return StateMemory(
        parameters=sum(parameter.numel for parameter in parameters),
        weights=e * elements,
        gradients=gradients,
        masters=0 if e == FP32 else shard,
        moments=_moments(config) * FP32 * elements // shards,
        transient=transient,
    )


def _moments(config: Config) -> int:
    """Return how many numbers the optimizer keeps of a parameter beside its master."""
    return len(OPTIMIZER_STATE[config.optimizer.optimizer])


def _buckets(parameters: Sequence[LocalParameter], size: int, shards: int) -> list[int]:
    """Return the elements of each bucket, filled as optim.buckets does: neighbours up to `size`.

    A bucket is full once it has `size` elements or more, so it may have some more.
    """
    sums: list[int] = []
    room = 0
    for parameter in parameters:
        slot = _aligned(parameter.numel, BUCKET_ALIGNMENT)
        # The same rule as in optim.buckets.make_buckets: a change there belongs here too.
        if parameter.alone:
            sums.append(slot)
            room = 0  # the next one starts a new bucket
        elif room <= 0:
            sums.append(slot)
            room = size - parameter.numel
        else:
            sums[-1] += slot
            room -= parameter.numel
    return [_aligned(total, BUCKET_ALIGNMENT * shards) for total in sums]


def _fully_sharded(
    config: Config,
    vocab_size: int,
    parameters: Sequence[LocalParameter],
    chunks: Sequence[ModelChunk],
    shards: int,
) -> StateMemory:
    """Count ZeRO-3 as torch's fully_shard does it.

    Masters, gradients and moments are fp32 shards of 4 P / d each. Weights are gathered in the
    working dtype: what is outside the layers for the whole pass, and two layers, one that computes
    and one that arrives. One unit's gradient is whole at a time, in the working dtype and, while it
    is reduced, in fp32: all outside the layers, or a layer beside the head's gradient, which the
    loss has made and which waits for the last unit's turn.
    """
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    e = itemsize(config)
    count = sum(parameter.numel for parameter in parameters)
    layers = sum(chunk.layers for chunk in chunks)
    a_layer = sum(parameter.numel for parameter in layer_parameters(model, tp)) if layers else 0
    outside = count - layers * a_layer
    head = 0
    if any(chunk.predicts for chunk in chunks):
        head = local_vocabulary(model, vocab_size, tp) * model.hidden_size

    # fully_shard pads what does not divide, so the share is rounded up.
    shard = FP32 * -(-count // shards)
    gathered = outside + min(2, layers) * a_layer
    return StateMemory(
        parameters=count,
        weights=e * gathered,
        gradients=shard,
        masters=shard,
        moments=_moments(config) * shard,
        transient=max((e + FP32) * outside, (e + FP32) * a_layer + e * head),
    )


def _aligned(count: int, multiple: int) -> int:
    """Round `count` up to a multiple."""
    return -(-count // multiple) * multiple
