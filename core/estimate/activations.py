"""Bytes that one rank needs beside its state: what autograd keeps of a micro-batch, and what a pass needs on top. No torch.

Read off this engine's own operations, tensor by tensor, as Korthikanti et al. 2022, section 4, do for Megatron-LM's. Memory that several
operations keep is counted once, parameters not at all.

Letters, beside the usual ones: b micro-batch, t tokens of a sequence on this rank (T/cp), s those of its norms (t/tp with sequence
parallel, else t), q, k and f the local widths, e bytes of a number.
"""

from dataclasses import dataclass
from math import gcd

from ..config import Config, ModelConfig
from ..config.sizes import LOGITS_AT_A_TIME, LOGITS_IN_CACHE
from .memory import FP32, Chunk, itemsize, local_widths, norm_weights


@dataclass(frozen=True)
class Cut:
    """What the activations of a micro-batch depend on beside the shape of the model. Sequence parallel over one rank is none.

    fused: the ops that run as kernels of our own, which keep their input alone. flash: attention that stores no scores; masks force
    it, CPUs have none with dropout. widens: a CPU without instructions for 16-bit products makes them of fp32 copies; a configuration cannot tell.
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
    flash: bool = True
    documents: bool = False  # attention stays inside a document
    device: str = "gpu"
    fused: frozenset[str] = frozenset({"rms_norm"})
    widens: bool = False

    @staticmethod
    def of(config: Config) -> "Cut":
        parallel, on_cpu = config.parallel, config.parallel.device == "cpu"
        masked = (
            config.data.reset_attention_mask
            or _window_share(config.model, config.batch.seq_length) == 1
        )
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
            (masked or parallel.attention_backend not in ("unfused", "local"))
            and not (on_cpu and config.model.attention_dropout > 0),
            config.data.reset_attention_mask,
            "cpu" if on_cpu else "gpu",
            _fused(parallel.kernels, on_cpu, config.precision.fp16),
        )

    @property
    def tokens(self) -> int:
        """b t"""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def norm_tokens(self) -> int:
        """b s"""
        return self.tokens // (self.tp if self.sequence_parallel else 1)


def _fused(kernels: str, on_cpu: bool, fp16: bool) -> frozenset[str]:
    """Of --kernels: native has all of these in fp32 and bf16, Triton RMSNorm."""
    general, *exceptions = kernels.split(",")
    if general == "auto":
        general = "triton" if not on_cpu else "torch" if fp16 else "native"
    chosen = dict.fromkeys(
        ("rms_norm", "layer_norm", "rope", "activation", "cross_entropy"), general
    )
    chosen |= dict(exception.split("=") for exception in exceptions)
    return frozenset(
        op for op, one in chosen.items() if one == "native" or (op, one) == ("rms_norm", "triton")
    )


def layer_saved(model: ModelConfig, cut: Cut) -> dict[str, int]:
    """Bytes that autograd keeps of one layer and micro-batch, by what keeps them.

    Norms: their input and, for the linear layer behind, their output, 4 e b s h. Attention: q, k, v, o and the log-sum-exp of flash
    attention; q, k and v are views that keep the whole fused projection; PyTorch's rope adds rotated copies of q and k. Feed-forward: gate, up
    and silu(gate) * up, 3 e b t f, with PyTorch's also silu(gate); or pre-activation and image, 2 e b t f. For a llama on a GPU
    e b (4 s h + t (3 q + 3 k + 4 f)), on a CPU e b (4 s h + t (2 q + 2 k + 3 f)); for a GPT in 16 bits with dropout 34 b t h, as in
    Korthikanti et al. 2022, equation 1, without its 5 a s / h of scores; all and b t 4 A / tp and less.
    """
    bt, bs, e = cut.tokens, cut.norm_tokens, cut.e
    f = local_widths(model, cut.tp)[2]
    shared = (
        e * bs * model.hidden_size * (model.parallel_residual and _norm_input(model, cut) == e)
    )  # two norms keep one x
    saved = {
        "norms": model.norms_per_layer * _norm_saved(model, cut, bs, model.hidden_size) - shared,
        "inputs of qkv and up": 2 * e * bs * model.hidden_size,
        "attention": _attention_saved(model, cut),
        "mlp": e * bt * f * _mlp_widths(model, cut),
    }
    if model.hidden_dropout > 0:
        saved["dropout masks"] = 2 * bs * model.hidden_size
    return saved


def _mlp_widths(model: ModelConfig, cut: Cut) -> int:
    """In multiples of f: what enters the activation, what comes out, and on the way PyTorch's silu(gate)."""
    return (4 - ("activation" in cut.fused)) if model.gated else 2


def _norm_saved(model: ModelConfig, cut: Cut, rows: int, width: int, view: bool = False) -> int:
    """A norm's input, its statistics, and what PyTorch's RMSNorm normalized. A view of something that is kept anyway costs nothing, but copied."""
    plain = model.normalization == "RMSNorm" and "rms_norm" not in cut.fused
    normalized = (FP32 if model.apply_layernorm_1p else cut.e) * plain
    kept = normalized + _norm_input(model, cut) * (not view or _norm_copies(model, cut))
    return kept * rows * width + norm_weights(model) * FP32 * rows


def _norm_input(model: ModelConfig, cut: Cut) -> int:
    """Bytes of a number of x as its norm keeps it: PyTorch's RMSNorm and weights around 1 (--apply-layernorm-1p) take an fp32 copy."""
    plain = model.normalization == "RMSNorm" and "rms_norm" not in cut.fused
    return FP32 if plain or model.apply_layernorm_1p else cut.e


def _norm_copies(model: ModelConfig, cut: Cut) -> bool:
    """Whether what a norm keeps of a view is a copy."""
    kernel = "layer_norm" if model.normalization == "LayerNorm" else "rms_norm"
    return kernel in cut.fused or _norm_input(model, cut) != cut.e


def _attention_saved(model: ModelConfig, cut: Cut) -> int:
    """From the fused projection to the input of the output projection, that input included."""
    (q, k, _), bt, e = local_widths(model, cut.tp), cut.tokens, cut.e
    heads = model.num_attention_heads // cut.tp
    # Where they are no longer views of the projection: our own rope turns them where they stand.
    moved = model.qk_layernorm or (
        model.position_embedding_type == "rope" and "rope" not in cut.fused
    )
    projection, output = e * bt * (q + 2 * k), e * bt * q
    norms, viewed = _qk_norms_saved(model, cut)
    kept, inputs, views = (
        _tables_saved(model, cut) + norms,
        projection + e * bt * (q + k) * moved,
        projection * viewed,
    )
    if cut.granularity == "selective":
        return kept + inputs + output
    way = cut.cp_comm_type if cut.cp > 1 else None
    capped = model.attn_logit_softcapping is not None  # scores are made again in backward
    if not cut.flash and not capped and way in (None, "a2a"):
        # Scores in fp32, with dropout also their mask and their product; q, k and v in fp32, one key head for each query head.
        scores = FP32 * bt * cut.seq_length * heads * (3 if model.attention_dropout > 0 else 1)
        return kept + views + 3 * FP32 * bt * q + scores + output
    wide = cut.widens and way != "p2p"  # q, k, v and o stay in fp32, beside o in 16 bits
    a = FP32 if wide else e
    kept += a * bt * q + FP32 * bt * heads  # o, log of the sum
    if way != "p2p":  # the ring makes its masks again
        share = (
            1
            if cut.documents or not (cut.flash or capped)
            else _window_share(model, cut.seq_length) / cut.micro_batch
        )
        kept += int(
            (1 if capped else a) * bt * cut.seq_length * (cut.cp if way == "a2a" else 1) * share
        )  # in the dtype of the scores
    if way in (None, "p2p"):
        return kept + (a * bt * (q + 2 * k) + views + output if wide else inputs)
    kept += views + output  # o is put together again
    if (
        way == "allgather"
    ):  # in fp32 each of the two chunks of queries has a copy of the keys it sees
        return kept + (
            a * bt * (q + (2 * cut.cp + 1) * k)
            if wide
            else (output if moved else projection) + e * bt * cut.cp * 2 * k
        )
    repeated = k * (cut.cp // gcd(k // model.head_size, cut.cp))
    return kept + a * bt * (q + 2 * repeated)


def _window_share(model: ModelConfig, seq_length: int) -> float:
    """Of the layers, how many have a window that a sequence is longer than, and so a mask, the same for all samples."""
    windows = [model.window(layer) for layer in range(model.num_layers)]
    return sum(window is not None and window < seq_length for window in windows) / model.num_layers


def _tables_saved(model: ModelConfig, cut: Cut) -> int:
    """cos and sin, where every layer casts them for q and for k."""
    return (
        2
        * _table(model, cut)
        * cut.e
        * _casts_tables(cut)
        * (model.position_embedding_type == "rope")
    )


def _casts_tables(cut: Cut) -> bool:
    """PyTorch's rope takes its angles in 16 bits; else all layers share one pair of tables in fp32."""
    return cut.e != FP32 and "rope" not in cut.fused


def _table(model: ModelConfig, cut: Cut) -> int:
    """Numbers in cos and sin, of layers without and with a window where they differ."""
    return (
        (1 if model.rotary_base_local is None else 2)
        * cut.seq_length
        // cut.cp
        * int(model.head_size * model.rotary_percent)
    )


def _qk_norms_saved(model: ModelConfig, cut: Cut) -> tuple[int, bool]:
    """Bytes that the norms of q and k keep, and whether they keep the projection by a view of it as well."""
    (q, k, _), bt = local_widths(model, cut.tp), cut.tokens
    if not model.qk_layernorm:
        return 0, False
    if (
        model.qk_layernorm_width == "projection"
    ):  # in plain PyTorch: the normalized, and x if it is an fp32 copy
        return (cut.e if cut.e == FP32 else FP32 + cut.e) * bt * (
            q + k
        ) + 2 * FP32 * bt, cut.e == FP32
    return _norm_saved(
        model, cut, bt * (q + k) // model.head_size, model.head_size, view=True
    ), not _norm_copies(model, cut)


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
    saved += _ends_saved(model, chunk, cut)
    output = 0 if chunk.predicts else cut.e * cut.norm_tokens * model.hidden_size
    return Activations(
        saved, output, _deferred(model, chunk, cut), _working(model, vocab_size, chunk, cut, group)
    )


def _layers_saved(model: ModelConfig, layers: int, cut: Cut) -> tuple[int, int]:
    """Bytes kept, and those that one group makes again in backward (Chen et al. 2016; Korthikanti et al. 2022, section 5)."""
    layer, hidden = (
        sum(layer_saved(model, cut).values()),
        cut.e * cut.norm_tokens * model.hidden_size,
    )
    tables = FP32 * _table(model, cut) if layers and model.position_embedding_type == "rope" else 0
    if cut.granularity != "full":
        return layers * layer + tables * (not _casts_tables(cut)), 0
    if cut.method == "uniform":
        return -(-layers // cut.group) * hidden + tables, min(cut.group, layers) * layer
    again = min(cut.group, layers)
    return again * hidden + (layers - again) * layer + tables, layer if again else 0


def _ends_saved(model: ModelConfig, chunk: Chunk, cut: Cut) -> int:
    bt, bs, h = cut.tokens, cut.norm_tokens, model.hidden_size
    saved = 0
    if chunk.embeds:
        saved += (9 if cut.tp > 1 else 8) * bt  # ids; with tp also which of them are this rank's
        saved += (
            8 * cut.seq_length // cut.cp * (model.position_embedding_type == "learned_absolute")
        )
        saved += bs * h * (model.hidden_dropout > 0)
    return saved + _head_saved(model, cut) * chunk.predicts


def _head_saved(model: ModelConfig, cut: Cut) -> int:
    """The last norm's, and the gradient of its output: the loss computes it, with that of the weight, while it has logits."""
    return (
        _norm_saved(model, cut, cut.norm_tokens, model.hidden_size)
        + cut.e * cut.norm_tokens * model.hidden_size
    )


def _logits(model: ModelConfig, vocab_size: int, cut: Cut) -> int:
    """Of one token on this rank."""
    return model.padded_vocabulary(vocab_size, cut.tp) // cut.tp


def _deferred(model: ModelConfig, chunk: Chunk, cut: Cut) -> int:
    """Each linear layer's x, cut by tokens where it was gathered, and dy, whole: b e ((2 s + 2 t) h + t (2 q + 2 k + 3 f))."""
    (q, k, f), bt, bs, h = (
        local_widths(model, cut.tp),
        cut.tokens,
        cut.norm_tokens,
        model.hidden_size,
    )
    up = f * (2 if model.gated else 1)
    inputs, gradients = 2 * bs * h + bt * (q + f), bt * (2 * h + q + 2 * k + up)
    return chunk.layers * (cut.e * inputs + (FP32 if cut.widens else cut.e) * gradients)


def _working(model: ModelConfig, vocab_size: int, chunk: Chunk, cut: Cut, group: int) -> int:
    """The fullest of a few moments: the loss; backward through down, the activation and up of the last layer, beside what a layer computes
    again; the embedding's, when all else is gone.
    """
    f, bt, bs, h, e = (
        local_widths(model, cut.tp)[2],
        cut.tokens,
        cut.norm_tokens,
        model.hidden_size,
        cut.e,
    )
    up, found, head = f * (2 if model.gated else 1), [0], _head_saved(model, cut) * chunk.predicts
    if chunk.predicts:
        found.append(_loss_working(model, vocab_size, cut))
    if chunk.layers:
        dy, before = e * bs * h, group - head
        gathered = e * bt * h * cut.sequence_parallel
        found.append(before + dy + gathered + _linear_working(cut, f, h))
        found.append(before + dy + e * bt * up)
        found.append(
            before
            + dy
            + gathered
            + e * bt * (up - f * _mlp_widths(model, cut))
            + _linear_working(cut, h, up)
        )
    if chunk.embeds:
        found.append(
            e * h * (bt + _logits(model, vocab_size, cut))
            - _layers_saved(model, chunk.layers, cut)[0]
            - head
        )
    return max(found)


def _linear_working(cut: Cut, inputs: int, outputs: int) -> int:
    """A linear layer's dx, and its weight's gradient in 16 bits before that joins the fp32 sum; in fp32 the product adds it itself.

    Where the product takes fp32 copies, those of dy and the weight, and dx as it comes out.
    """
    dx, weight = cut.tokens * inputs, inputs * outputs
    return (
        FP32 * (dx + weight + cut.tokens * outputs)
        if cut.widens
        else cut.e * (dx + weight * (cut.e != FP32))
    )


def _loss_working(model: ModelConfig, vocab_size: int, cut: Cut) -> int:
    """Beside the input of the head, in place of which its gradient will be kept: that gradient whole, the logits of some tokens, and more of
    their size in fp32: a cap's derivative, and in PyTorch two copies, three from 16 bits; or the weight's gradient in 16 bits.
    """
    bt, h, words, narrow = (
        cut.tokens,
        model.hidden_size,
        _logits(model, vocab_size, cut),
        cut.e != FP32 and not cut.widens,
    )
    e = FP32 if cut.widens else cut.e
    logits = min(bt, max(1, LOGITS_AT_A_TIME[cut.device] // words)) * words
    copied = (
        0
        if "cross_entropy" in cut.fused
        else min(logits, LOGITS_IN_CACHE)
        if cut.device == "cpu"
        else logits
    )
    capped = logits * (model.final_logit_softcapping is not None)
    most = max(
        FP32 * max(2 * capped, capped + copied * (3 if narrow else 2)),
        FP32 * capped + e * words * h * narrow,
    )
    operands = FP32 * h * (bt + words) * cut.widens + cut.e * bt * h * cut.sequence_parallel
    return operands + e * (bt * h + logits) + most
