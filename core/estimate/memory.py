"""Bytes that one rank needs for weights, gradients and optimizer state, from the configuration alone; `activations` has the rest. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import OPTIMIZER_STATE, Config, ModelConfig
from ..config.sizes import BUCKET_ALIGNMENT

FP32 = 4


@dataclass(frozen=True)
class Chunk:
    """What a rank holds in one of its model chunks."""

    layers: int
    embeds: bool = True
    predicts: bool = True


# Parameters.


def local_widths(model: ModelConfig, tp: int) -> tuple[int, int, int]:
    """Of queries (A D/tp), keys (K D/tp) and the feed-forward layer (F/tp): with fewer key-value heads than ranks, each holds one whole head."""
    heads = max(1, model.num_kv_heads // tp)
    return (
        model.num_attention_heads // tp * model.head_size,
        heads * model.head_size,
        model.ffn_hidden_size // tp,
    )


@dataclass(frozen=True)
class Weight:
    """One parameter as this rank holds it, padding included; `alone` in its bucket: the embedding that is also the head."""

    name: str
    numel: int
    alone: bool = False


def layer_weights(model: ModelConfig, tp: int) -> list[Weight]:
    """One layer's parameters on each rank of tp, in the order in which they are made."""
    h, norm = model.hidden_size, norm_weights(model)
    q, k, f = local_widths(model, tp)
    up = f * (2 if model.gated else 1)
    before, after = (norm * (model.norm_placement in (place, "both")) for place in ("pre", "post"))
    by_head = model.qk_layernorm_width == "head"
    found = [
        ("attention_norm", h, before),
        ("attention.qkv", (q + 2 * k) * h, 1),
        ("attention.qkv.bias", q + 2 * k, model.qkv_bias),
        ("attention.qk_norms", model.head_size, 2 * norm * model.qk_layernorm * by_head),
        ("attention.q_norm", q, model.qk_layernorm and not by_head),
        ("attention.k_norm", k, model.qk_layernorm and not by_head),
        ("attention.out", q * h, 1),
        ("attention.out.bias", h, model.attention_out_bias),
        ("attention_post_norm", h, after),
        ("mlp_norm", h, before),
        ("mlp.up", up * h, 1),
        ("mlp.up.bias", up, model.linear_bias),
        ("mlp.down", f * h, 1),
        ("mlp.down.bias", h, model.linear_bias),
        ("mlp_post_norm", h, after),
    ]
    return [Weight(name, numel) for name, numel, times in found for _ in range(times)]


def weights_of(
    model: ModelConfig, vocab_size: int, tp: int, chunks: Sequence[Chunk]
) -> list[Weight]:
    """Every parameter of a rank's chunks once, in the order in which its buckets are filled: a tied head on the embedding's rank is no other."""
    words = Weight(
        "embedding.word",
        model.padded_vocabulary(vocab_size, tp) // tp * model.hidden_size,
        alone=model.tied,
    )
    layer, found = layer_weights(model, tp), []
    for chunk in chunks:
        if chunk.embeds and model.position_embedding_type == "learned_absolute":
            found.append(
                Weight("embedding.position", model.max_position_embeddings * model.hidden_size)
            )
        if chunk.predicts and not (model.tied and any(other.embeds for other in chunks)):
            found.append(Weight("head", words.numel, alone=model.tied))
        found += [words] * chunk.embeds + layer * chunk.layers
        if chunk.predicts:
            found += [Weight("final_norm", model.hidden_size)] * norm_weights(model)
    return found


def norm_weights(model: ModelConfig) -> int:
    """Weight, and bias of a LayerNorm."""
    return 2 if model.normalization == "LayerNorm" else 1


# Weights, gradients and optimizer state.


@dataclass(frozen=True)
class State:
    """Bytes that stay for the whole run but `transient`: what a backward pass holds of gradients (or gathers of weights) at its fullest."""

    parameters: int  # a count
    weights: int
    gradients: int
    masters: int
    moments: int
    transient: int = 0

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.transient


def state_of(weights: Sequence[Weight], config: Config, shards: int, copies: int) -> State:
    """Of one rank. shards: over how many ranks each parameter's optimizer state is cut; copies: data x context parallel, all that hold it.

    Flat buckets, each slot and shard aligned. P parameters, d shards: weights e P; gradients 4 P, but 4 P / d where each micro-batch is
    reduced (optim_grads), and then at most two buckets whole, the one being filled and the one under way; masters 4 P / d, none in fp32 where
    they are the weights; moments 8 P / d (Rajbhandari et al. 2020, section 5: stages 1 and 2). optim_grads_params (stage 3) is `_fully_sharded`.
    """
    parallel, count, e = config.parallel, sum(weight.numel for weight in weights), itemsize(config)
    moments = len(OPTIMIZER_STATE[config.optimizer.optimizer])
    if parallel.data_parallel_sharding_strategy == "optim_grads_params":
        return _fully_sharded(weights, count, e, shards, moments)
    buckets = _buckets(weights, parallel.bucket_size(copies), shards)
    size = sum(buckets)
    keeps = parallel.data_parallel_sharding_strategy != "optim_grads"
    masters = FP32 * size // shards if e != FP32 else 0
    transient = 0 if keeps else FP32 * sum(sorted(buckets)[-2:])
    return State(
        count,
        e * size,
        FP32 * size // (1 if keeps else shards),
        masters,
        moments * FP32 * size // shards,
        transient,
    )


def _buckets(weights: Sequence[Weight], size: int, shards: int) -> list[int]:
    """Elements of each bucket: neighbours up to about `size`, as optim.buckets fills them."""
    sums, room = [], 0
    for weight in weights:
        slot = _aligned(weight.numel, BUCKET_ALIGNMENT)
        if weight.alone or room <= 0:
            sums.append(slot)
            room = 0 if weight.alone else size - weight.numel
        else:
            sums[-1] += slot
            room -= weight.numel
    return [_aligned(total, BUCKET_ALIGNMENT * shards) for total in sums]


def _fully_sharded(
    weights: Sequence[Weight], count: int, e: int, shards: int, moments: int
) -> State:
    """ZeRO-3 as torch's fully_shard does it: fp32 shards of parameters, gradients and moments, 4 P / d each.

    Gathered in the working dtype: what is outside the layers, for the whole pass, and two layers, one computing and one arriving. One
    unit's gradient is whole at a time, in the working dtype and, while it is reduced, in fp32; a layer's beside that of the head, which
    the loss has made and which waits for the last unit's turn.
    """
    layer = sum(weight.numel for weight in weights if weight.name.startswith(("attention", "mlp")))
    layers = sum(weight.name == "mlp.down" for weight in weights)
    unit, outside = layer // max(1, layers), count - layer
    shard = FP32 * -(-count // shards)
    predicts = any(weight.name == "final_norm" for weight in weights)
    head = (
        max(
            (weight.numel for weight in weights if weight.name in ("head", "embedding.word")),
            default=0,
        )
        * predicts
    )
    transient = max((e + FP32) * outside, (e + FP32) * unit + e * head)
    return State(
        count, e * (outside + min(2, layers) * unit), shard, shard, moments * shard, transient
    )


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def itemsize(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.precision.bf16 or config.precision.fp16 else FP32
