"""Count the bytes that one micro-batch needs on a rank beside the rank's state.

Autograd keeps every tensor that a backward formula reads, from the forward pass of a micro-batch to
its backward pass. With p stages a rank holds up to p micro-batches at a time, so these tensors are
most of the memory of a large run. This module counts them the way Korthikanti et al. 2022, section
4, do for Megatron-LM: operation by operation, for this engine's own operations. Memory that several
operations keep is counted once; parameters are not counted, since a rank holds them anyway.

An example: one layer of a llama in bf16 on a GPU, no tensor parallelism, so s = t (letters: see
pass_spec.py; e = 2 bytes). Read the layer from its input to its output:

    operation        keeps                                              bytes
    norm             its input x; one fp32 statistic a token            e b s H + 4 b s
    q, k, v          their input, the norm's output                     e b s H
    rope             nothing of q and k, but cos and sin in bf16        2 e t D x 2
    attention        the fused projection                               e b t (q + 2 k)
                     q and k as rope turned them                        e b t (q + k)
                     o; the log-sum-exp of each head                    e b t q + 4 b t A
    out              o again: counted already                           0
    residual sum     nothing: a sum needs no operand to go backward     0
    norm             as above                                           e b s H + 4 b s
    gate, up         their input, the norm's output                     e b s H
    SwiGLU           gate, up and silu(gate)                            3 e b t f
    down             silu(gate) up                                      e b t f

    sum              e b (4 s H + t (3 q + 3 k + 4 f)), and a few bytes a token

A CPU's kernels keep less: rope turns q and k in place, the fused SwiGLU makes silu(gate) again, so
a layer keeps e b (4 s H + t (2 q + 2 k + 3 f)). For a GPT in 16 bits with dropout the same
reading gives 34 b t H, equation 1 of Korthikanti et al. without its 5 a s / h of attention scores.

Tensor parallelism makes q, k and f narrower, sequence parallelism makes s = t / tp, context
parallelism makes t = T / cp. Recomputation keeps the input of a group of layers in place of all
this, and makes the rest again in backward. tests/estimate/test_activations.py holds every number
against the storages that autograd really keeps.

ops_kept.py and attention_kept.py count single operations, working.py the memory of a pass that
is gone again when it ends.
"""

from dataclasses import dataclass

from ..config import ModelConfig
from .attention_kept import AttentionKept, casts_rope_tables, shared_rope_tables
from .ops_kept import NormKept, activation_widths
from .parameters import ModelChunk, local_widths
from .pass_spec import FP32, PassSpec
from .working import working_bytes

INT64, BOOL = 8, 1  # bytes


@dataclass(frozen=True)
class ActivationMemory:
    """The bytes of one micro-batch in one model chunk.

    saved: by autograd, from the forward to the backward pass.
    output: what the stage gave away, which the pipeline keeps to start its backward pass from.
    deferred: inputs and output gradients of the linear layers, from the backward pass of the inputs
        to that of the weights, in schedules that split the two.
    working: on top of these, at the fullest moment of a pass.
    """

    saved: int
    output: int
    deferred: int
    working: int

    @property
    def held(self) -> int:
        """Return what stays from the forward to the backward pass."""
        return self.saved + self.output


def activations_of(
    model: ModelConfig, vocab_size: int, chunk: ModelChunk, spec: PassSpec
) -> ActivationMemory:
    """Count the bytes of a chunk: its layers, and its embedding, head and loss if it has them."""
    layers = _layers_saved(model, chunk.layers, spec)
    head = _head_saved(model, spec) if chunk.predicts else 0
    embedding = _embedding_saved(model, spec) if chunk.embeds else 0
    working = working_bytes(
        model, vocab_size, chunk, spec, recomputed=layers.recomputed, layers=layers.kept, head=head
    )
    return ActivationMemory(
        saved=layers.kept + embedding + head,
        output=0 if chunk.predicts else spec.hidden_bytes(model),
        deferred=_deferred(model, chunk, spec),
        working=working,
    )


# One layer.


def layer_saved(model: ModelConfig, spec: PassSpec) -> dict[str, int]:
    """Count the bytes that autograd keeps of one layer and micro-batch, by what keeps them."""
    hidden = spec.hidden_bytes(model)
    saved = {
        "norms": _layer_norms_saved(model, spec),
        "inputs of qkv and up": 2 * hidden,
        "attention": AttentionKept(model, spec).total(),
        "mlp": _mlp_saved(model, spec),
    }
    if model.hidden_dropout > 0:
        saved["dropout masks"] = 2 * BOOL * spec.norm_tokens * model.hidden_size
    return saved


def _layer_norms_saved(model: ModelConfig, spec: PassSpec) -> int:
    """Count what the norms of the hidden states keep.

    With a parallel residual both norms read the same x. It is kept once, unless each norm makes a
    copy of its own.
    """
    norm = NormKept.of(model, spec)
    saved = model.norms_per_layer * norm.bytes(spec.norm_tokens, model.hidden_size)
    if model.parallel_residual and norm.input == spec.itemsize:
        saved -= spec.hidden_bytes(model)
    return saved


def _mlp_saved(model: ModelConfig, spec: PassSpec) -> int:
    """Count what the activation keeps, and its result, the input of the down projection."""
    width = local_widths(model, spec.tp).feed_forward
    tensor = spec.itemsize * spec.tokens * width
    return tensor * activation_widths(model, spec)


# The layers of a chunk.


@dataclass(frozen=True)
class LayersSaved:
    """The bytes of all layers of a chunk.

    kept: until the backward pass. recomputed: what the largest group makes again in the backward
    pass (Chen et al. 2016; Korthikanti et al. 2022, section 5).
    """

    kept: int
    recomputed: int


def _layers_saved(model: ModelConfig, layers: int, spec: PassSpec) -> LayersSaved:
    """Count the layers of a chunk under its kind of recomputation.

    None or selective     every layer keeps its own
    full, uniform         each group of n layers keeps its input alone
    full, block           the first n layers keep their inputs alone, the others everything
    """
    layer = sum(layer_saved(model, spec).values())
    hidden = spec.hidden_bytes(model)
    tables = shared_rope_tables(model, spec) if layers else 0
    if spec.recompute != "full":
        # Layers that cast cos and sin for themselves do not keep the shared pair.
        shared = 0 if casts_rope_tables(spec) else tables
        return LayersSaved(layers * layer + shared, 0)
    again = min(spec.recompute_layers, layers)
    if spec.recompute_method == "uniform":
        groups = -(-layers // spec.recompute_layers)
        return LayersSaved(groups * hidden + tables, again * layer)
    kept = again * hidden + (layers - again) * layer + tables
    return LayersSaved(kept, layer if again else 0)


# The ends of the model.


def _embedding_saved(model: ModelConfig, spec: PassSpec) -> int:
    """Count ids and positions that the look-ups keep, and the mask of the embeddings' dropout."""
    saved = INT64 * spec.tokens
    if spec.tp > 1:
        saved += BOOL * spec.tokens  # which of the ids are in this rank's rows
    if model.position_embedding_type == "learned_absolute":
        saved += INT64 * spec.seq_length // spec.cp
    if model.hidden_dropout > 0:
        saved += BOOL * spec.norm_tokens * model.hidden_size
    return saved


def _head_saved(model: ModelConfig, spec: PassSpec) -> int:
    """Count what the last norm keeps, and the gradient of its output.

    The loss computes that gradient in the forward pass, with the weight's, while it has logits.
    """
    norm = NormKept.of(model, spec)
    return norm.bytes(spec.norm_tokens, model.hidden_size) + spec.hidden_bytes(model)


# Weight gradients that wait.


def _deferred(model: ModelConfig, chunk: ModelChunk, spec: PassSpec) -> int:
    """Count the operands of the weight gradients: x and dy of each linear layer.

    x       qkv and up: [b, s, H], cut by tokens where it was gathered; out: q; down: f
    dy      out and down: [b, t, H], whole; qkv: q + 2 k; up: f, or 2 f where it is gated
    """
    widths = local_widths(model, spec.tp)
    h, bt = model.hidden_size, spec.tokens
    inputs = 2 * spec.norm_tokens * h + bt * (widths.query + widths.feed_forward)
    gradients = bt * (2 * h + widths.qkv + widths.up)
    gradient_size = FP32 if spec.widens else spec.itemsize
    return chunk.layers * (spec.itemsize * inputs + gradient_size * gradients)
