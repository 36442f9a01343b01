"""Bytes that one rank needs, from the configuration alone: weights, gradients, optimizer state, and what autograd keeps. No torch.

What autograd keeps is read off this engine's own operations, tensor by tensor, as Korthikanti et al. 2022, section 4, do for Megatron-LM's.
Memory that several operations keep is counted once, parameters not at all.

Letters, beside the usual ones: b micro-batch, t tokens of a sequence on this rank (T/cp), s those of its norms (t/tp with sequence
parallel, else t), q, k and f the local width of queries (A D/tp), of keys (K D/tp) and of the feed-forward layer (F/tp), e bytes of a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from ..config import Config, ModelConfig

FP32 = 4
_LOGITS_IN_CACHE = 1 << 18  # logits that a loss on the CPU handles at a time
_ALIGNMENT = 64  # elements between the slots of a bucket
_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1}


@dataclass(frozen=True)
class Chunk:
    """What a rank holds in one of its model chunks."""

    layers: int
    embeds: bool = True
    predicts: bool = True


# Parameters.


def local_widths(model: ModelConfig, tp: int) -> tuple[int, int, int]:
    """q, k and f: with fewer key-value heads than ranks, each rank holds one whole head."""
    heads = max(1, model.num_kv_heads // tp)
    return model.num_attention_heads // tp * model.head_size, heads * model.head_size, model.ffn_hidden_size // tp


@dataclass(frozen=True)
class Weight:
    """One parameter as this rank holds it, padding included; `alone` in its bucket: the embedding that is also the head."""

    name: str
    numel: int
    alone: bool = False


def layer_weights(model: ModelConfig, tp: int) -> list[Weight]:
    """One layer's parameters on each rank of tp, in the order in which they are made."""
    h, norm = model.hidden_size, _norm_weights(model)
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


def weights_of(model: ModelConfig, vocab_size: int, tp: int, chunks: Sequence[Chunk]) -> list[Weight]:
    """Every parameter of a rank's chunks once, in the order in which its buckets are filled: a tied head on the embedding's rank is no other."""
    words = Weight("embedding.word", model.padded_vocabulary(vocab_size, tp) // tp * model.hidden_size, alone=model.tied)
    layer, found = layer_weights(model, tp), []
    for chunk in chunks:
        if chunk.embeds and model.position_embedding_type == "learned_absolute":
            found.append(Weight("embedding.position", model.max_position_embeddings * model.hidden_size))
        if chunk.predicts and not (model.tied and any(other.embeds for other in chunks)):
            found.append(Weight("head", words.numel, alone=model.tied))
        found += [words] * chunk.embeds + layer * chunk.layers
        if chunk.predicts:
            found += [Weight("final_norm", model.hidden_size)] * _norm_weights(model)
    return found


def _norm_weights(model: ModelConfig) -> int:
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
    moments = _MOMENTS[config.optimizer.optimizer]
    if parallel.data_parallel_sharding_strategy == "optim_grads_params":
        return _fully_sharded(weights, count, e, shards, moments)
    buckets = _buckets(weights, parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * copies), shards)
    size = sum(buckets)
    keeps = parallel.data_parallel_sharding_strategy != "optim_grads"
    masters = FP32 * size // shards if e != FP32 else 0
    transient = 0 if keeps else FP32 * sum(sorted(buckets)[-2:])
    return State(count, e * size, FP32 * size // (1 if keeps else shards), masters, moments * FP32 * size // shards, transient)


def _buckets(weights: Sequence[Weight], size: int, shards: int) -> list[int]:
    """Elements of each bucket: neighbours up to about `size`, as optim.buckets fills them."""
    sums, room = [], 0
    for weight in weights:
        slot = _aligned(weight.numel, _ALIGNMENT)
        if weight.alone or room <= 0:
            sums.append(slot)
            room = 0 if weight.alone else size - weight.numel
        else:
            sums[-1] += slot
            room -= weight.numel
    return [_aligned(total, _ALIGNMENT * shards) for total in sums]


def _fully_sharded(weights: Sequence[Weight], count: int, e: int, shards: int, moments: int) -> State:
    """ZeRO-3 as torch's fully_shard does it: fp32 shards of parameters, gradients and moments, 4 P / d each.

    Gathered in the working dtype: what is outside the layers, for the whole pass, and two layers, one computing and one arriving. The
    largest unit's gradient is whole at a time, in the working dtype and, while it is reduced, in fp32.
    """
    layer = sum(weight.numel for weight in weights if weight.name.startswith(("attention", "mlp")))
    layers = sum(weight.name == "mlp.down" for weight in weights)
    unit, outside = layer // max(1, layers), count - layer
    shard = FP32 * -(-count // shards)
    return State(count, e * (outside + min(2, layers) * unit), shard, shard, moments * shard, (e + FP32) * max(outside, unit))


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def itemsize(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.precision.bf16 or config.precision.fp16 else FP32


# Activations.


@dataclass(frozen=True)
class Cut:
    """What the activations of a micro-batch depend on beside the shape of the model. Sequence parallel over one rank is none.

    fused_norm: RMSNorm by a kernel of our own. flash: attention that stores no scores; CPUs have none with dropout. chunked_loss: softmax
    over a few rows at a time, on CPUs.
    """

    micro_batch: int
    seq_length: int
    e: int = 2
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    cp_comm_type: str = "p2p"
    granularity: str | None = None  # of what is computed again
    method: str = "uniform"
    group: int = 1
    fused_norm: bool = True
    flash: bool = True
    documents: bool = False  # attention stays inside a document
    chunked_loss: bool = False

    @staticmethod
    def of(config: Config) -> "Cut":
        parallel, on_cpu = config.parallel, config.parallel.device == "cpu"
        return Cut(
            config.batch.micro_batch_size,
            config.batch.seq_length,
            itemsize(config),
            parallel.tensor_model_parallel_size,
            parallel.context_parallel_size,
            parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
            parallel.cp_comm_type,
            parallel.recompute_granularity,
            parallel.recompute_method,
            parallel.recompute_num_layers,
            parallel.kernels != "torch",
            parallel.attention_backend not in ("unfused", "local") and not (on_cpu and config.model.attention_dropout > 0),
            config.data.reset_attention_mask,
            on_cpu,
        )

    @property
    def tokens(self) -> int:
        """b t"""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def norm_tokens(self) -> int:
        """b s"""
        return self.tokens // (self.tp if self.sequence_parallel else 1)


def layer_saved(model: ModelConfig, cut: Cut) -> dict[str, int]:
    """Bytes that autograd keeps of one layer and micro-batch, by what keeps them.

    Norms: their input and, for the linear layer behind, their output, 4 e b s h. Attention: q, k, v, o and the log-sum-exp of flash
    attention; v is a view that keeps the whole fused projection, beside rotated copies of q and k. Feed-forward: gate, up, silu(gate) and their
    product, 4 e b t f, or pre-activation and image, 2 e b t f. For a llama e b (4 s h + t (3 q + 3 k + 4 f)), for a GPT in 16 bits with
    dropout 34 b t h, as in Korthikanti et al. 2022, equation 1, without its 5 a s / h of scores; both and b t 4 A / tp and less.
    """
    bt, bs, e = cut.tokens, cut.norm_tokens, cut.e
    f = local_widths(model, cut.tp)[2]
    fused = cut.fused_norm or model.normalization == "LayerNorm"
    shared = e * bs * model.hidden_size * (model.parallel_residual and (fused or e == FP32) and not (model.apply_layernorm_1p and e != FP32))
    saved = {
        "norms": model.norms_per_layer * _norm_saved(model, cut, bs, model.hidden_size) - shared,
        "inputs of qkv and up": 2 * e * bs * model.hidden_size,
        "attention": _attention_saved(model, cut),
        "mlp": e * bt * f * (4 if model.gated else 2),
    }
    if model.hidden_dropout > 0:
        saved["dropout masks"] = 2 * bs * model.hidden_size
    return saved


def _norm_saved(model: ModelConfig, cut: Cut, rows: int, width: int) -> int:
    """A norm's input and statistics. RMSNorm in plain PyTorch keeps an fp32 copy of x in place of x, and the normalized x.

    Weights around 1 (--apply-layernorm-1p) are applied in fp32, to an fp32 copy of x.
    """
    e = FP32 if model.apply_layernorm_1p else cut.e
    if model.normalization == "LayerNorm":
        return e * rows * width + 2 * FP32 * rows
    return (e if cut.fused_norm else FP32 + e) * rows * width + FP32 * rows


def _attention_saved(model: ModelConfig, cut: Cut) -> int:
    """From the fused projection to the input of the output projection, that input included."""
    (q, k, _), bt, e = local_widths(model, cut.tp), cut.tokens, cut.e
    heads = model.num_attention_heads // cut.tp
    moved = model.position_embedding_type == "rope" or model.qk_layernorm  # q and k are no longer views of the projection
    projection, output = e * bt * (q + 2 * k), e * bt * q
    kept, inputs = _tables_saved(model, cut) + _qk_norms_saved(model, cut), projection + e * bt * (q + k) * moved
    if cut.granularity == "selective":
        return kept + inputs + output
    way = cut.cp_comm_type if cut.cp > 1 else None
    # The norms of q and k keep the projection, unless they copy their input out of it.
    copies = e != FP32 if model.qk_layernorm_width == "projection" else cut.fused_norm and model.normalization == "RMSNorm"
    views = model.qk_layernorm and not copies
    capped = model.attn_logit_softcapping is not None  # scores are made again in backward
    if not cut.flash and not capped and way in (None, "a2a"):
        # Scores in fp32, with dropout also their mask and their product; q, k and v in fp32, one key head for each query head.
        scores = FP32 * bt * cut.seq_length * heads * (3 if model.attention_dropout > 0 else 1)
        return kept + projection * views + 3 * FP32 * bt * q + scores + output
    kept += output + FP32 * bt * heads  # o, log of the sum
    masked = way != "p2p"  # the ring makes its masks again
    if cut.documents or not (cut.flash or capped):
        kept += (1 if capped else e) * bt * cut.seq_length * (cut.cp if way == "a2a" else 1) * masked  # the mask, in the dtype of the scores
    else:
        kept += (
            (1 if capped else e)
            * _window_share(model, cut)
            * cut.tokens
            * cut.seq_length
            * (cut.cp if way == "a2a" else 1)
            * masked
            // cut.micro_batch
        )
    if way in (None, "p2p"):
        return kept + inputs  # v is a view, which keeps the projection
    kept += projection * views + output  # o is put together again
    if way == "allgather":
        return kept + (e * bt * q if moved else projection) + e * bt * cut.cp * 2 * k
    repeated = k * (cut.cp // gcd(k // model.head_size, cut.cp))
    return kept + e * bt * (q + 2 * repeated)


def _window_share(model: ModelConfig, cut: Cut) -> float:
    """Of the layers, how many have a window that a sequence is longer than, and so a mask, the same for all samples."""
    windows = [model.window(layer) for layer in range(model.num_layers)]
    return sum(window is not None and window < cut.seq_length for window in windows) / model.num_layers


def _tables_saved(model: ModelConfig, cut: Cut) -> int:
    """cos and sin, cast to 16 bits by every layer for q and for k; in fp32 all layers share one pair."""
    if model.position_embedding_type != "rope" or cut.e == FP32:
        return 0
    return 2 * _table(model, cut) * cut.e


def _table(model: ModelConfig, cut: Cut) -> int:
    """Numbers in cos and sin, of layers without and with a window where they differ."""
    return (1 if model.rotary_base_local is None else 2) * cut.seq_length // cut.cp * int(model.head_size * model.rotary_percent)


def _qk_norms_saved(model: ModelConfig, cut: Cut) -> int:
    """The kernel copies q and k out of the projection; LayerNorm and fp32 RMSNorm in plain PyTorch keep views of it."""
    if not model.qk_layernorm:
        return 0
    q, k, _ = local_widths(model, cut.tp)
    numbers, rows = cut.tokens * (q + k), cut.tokens * (q + k) // model.head_size
    if model.qk_layernorm_width == "projection":
        return (cut.e if cut.e == FP32 else FP32 + cut.e) * numbers + 2 * FP32 * cut.tokens
    if model.normalization == "LayerNorm":
        return 2 * FP32 * rows
    return (cut.e if cut.fused_norm or cut.e == FP32 else FP32 + cut.e) * numbers + FP32 * rows


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch in one chunk.

    saved: by autograd, from the forward to the backward. output: what the stage gave away, which the pipeline keeps to start its backward
    from. deferred: inputs and output gradients of the linear layers, from a backward of inputs alone to that of the weights. working: on
    top, at the fullest moment of a pass.
    """

    saved: int
    output: int
    deferred: int
    working: int

    @property
    def held(self) -> int:
        return self.saved + self.output


def activations_of(model: ModelConfig, vocab_size: int, chunk: Chunk, cut: Cut) -> Activations:
    """Of a whole chunk: its layers, and what embedding, head and loss keep."""
    saved, group = _layers_saved(model, chunk.layers, cut)
    saved += _ends_saved(model, vocab_size, chunk, cut)
    output = 0 if chunk.predicts else cut.e * cut.norm_tokens * model.hidden_size
    return Activations(saved, output, _deferred(model, vocab_size, chunk, cut), _working(model, vocab_size, chunk, cut, group))


def _layers_saved(model: ModelConfig, layers: int, cut: Cut) -> tuple[int, int]:
    """Bytes kept, and those that one group makes again in backward (Chen et al. 2016; Korthikanti et al. 2022, section 5)."""
    layer, hidden = sum(layer_saved(model, cut).values()), cut.e * cut.norm_tokens * model.hidden_size
    tables = FP32 * _table(model, cut) if layers and model.position_embedding_type == "rope" else 0
    if cut.granularity != "full":
        return layers * layer + (tables if cut.e == FP32 else 0), 0
    if cut.method == "uniform":
        return -(-layers // cut.group) * hidden + tables, min(cut.group, layers) * layer
    again = min(cut.group, layers)
    return again * hidden + (layers - again) * layer + tables, layer if again else 0


def _ends_saved(model: ModelConfig, vocab_size: int, chunk: Chunk, cut: Cut) -> int:
    bt, bs, h = cut.tokens, cut.norm_tokens, model.hidden_size
    saved = 0
    if chunk.embeds:
        saved += (9 if cut.tp > 1 else 8) * bt  # ids; with tp also which of them are this rank's
        saved += 8 * cut.seq_length // cut.cp * (model.position_embedding_type == "learned_absolute")
        saved += bs * h * (model.hidden_dropout > 0)
    if chunk.predicts:
        saved += _norm_saved(model, cut, bs, h) + cut.e * bs * h
        capped = 1 if model.final_logit_softcapping is None else 2  # also as the tanh gave them
        saved += capped * cut.e * bt * _logits(model, vocab_size, cut) + 14 * bt  # column, whether it is here, log of the sum, mask
    return saved


def _logits(model: ModelConfig, vocab_size: int, cut: Cut) -> int:
    """Of one token on this rank."""
    return model.padded_vocabulary(vocab_size, cut.tp) // cut.tp


def _deferred(model: ModelConfig, vocab_size: int, chunk: Chunk, cut: Cut) -> int:
    """Each linear layer's x, cut by tokens where it was gathered, and dy, whole: b e ((2 s + 2 t) h + t (2 q + 2 k + 3 f))."""
    (q, k, f), bt, bs, h = local_widths(model, cut.tp), cut.tokens, cut.norm_tokens, model.hidden_size
    up = f * (2 if model.gated else 1)
    layer = 2 * bs * h + 2 * bt * h + bt * (2 * q + 2 * k + up + f)
    head = bs * h + bt * _logits(model, vocab_size, cut) if chunk.predicts else 0
    return cut.e * (chunk.layers * layer + head)


def _working(model: ModelConfig, vocab_size: int, chunk: Chunk, cut: Cut, group: int) -> int:
    """The fullest of a few moments: the loss, which makes fp32 copies of the logits, three forward from 16 bits, two from fp32; the head's
    weight gradient; with the logits gone, down's and up's, beside what a layer computes again; the embedding's, when all else is gone.

    A weight's gradient is whole in 16 bits before it is added to the fp32 sum; in fp32 the product itself adds it, but not the embedding's.
    """
    f, bt, h = local_widths(model, cut.tp)[2], cut.tokens, model.hidden_size
    up, kept = (2 * f, 4 * f) if model.gated else (f, 2 * f)
    words, narrow, found = _logits(model, vocab_size, cut), cut.e != FP32, [0]
    logits = cut.e * bt * words * chunk.predicts
    if chunk.predicts:
        copied = min(bt * words, _LOGITS_IN_CACHE) if cut.chunked_loss else bt * words
        found += [FP32 * copied * (3 if narrow else 2), cut.e * h * (bt + words * narrow)]
    if chunk.layers:
        incoming = h * (bt + cut.norm_tokens * cut.sequence_parallel)  # its whole, and the slice it was gathered from
        found.append(group - logits + cut.e * (incoming + bt * f + f * h * narrow))
        found.append(group - logits + cut.e * (incoming + bt * (h + up - kept) + up * h * narrow))
    if chunk.embeds:
        found.append(cut.e * h * (bt + words) - _layers_saved(model, chunk.layers, cut)[0] - logits)
    return max(found)
