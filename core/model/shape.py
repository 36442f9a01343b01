"""A block described once: its weights, norms, window and activation, as plain values.

Everything that has to know what a layer is made of reads it here: the modules build their
parameters from it, decoding fills the native block step from it, and parameter counts, memory
estimates and the names of Hugging Face's files follow from it. A new switch of the model is said
in config/fields.py and, where it changes a weight or a norm, in this file alone. No torch.

Shapes are written in these letters, here and in every file that uses letters:

    B  sequences of a micro-batch
    T  tokens of a sequence; T/cp on a rank of context parallel, T/cp/tp under sequence parallel
    H  hidden size, the width of the residual stream
    F  width of the feed-forward layer
    A  query heads
    K  key-value heads; A is a multiple of K
    D  size of a head
    V  vocabulary, padding included where a tensor is meant
    E  experts

An example, the weights of one layer of a gated model without biases:

    attention.qkv   [A D + 2 K D, H]   parts q, k, v   each cut by rows over tp
    attention.out   [H, A D]                           cut by columns
    mlp.up          [2 F, H]           parts gate, up  each cut by rows
    mlp.down        [H, F]                             cut by columns
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from ..config import ModelConfig
from ..role import Role


class TensorCut(StrEnum):
    """The way that tensor-parallel ranks share a parameter, and the gradient that each sees."""

    ROWS = "rows"
    """Cut by rows, each part by itself."""

    COLUMNS = "columns"
    """Cut by columns."""

    VOCABULARY = "vocabulary"
    """Cut by rows, after padding to a multiple that every rank's share is one of."""

    TOKENS = "tokens"
    """Whole on every rank. With sequence parallel each sees the gradient of its own tokens."""

    HEADS = "heads"
    """Whole on every rank. Each sees the gradient of its own heads."""


@dataclass(frozen=True)
class PartShape:
    """One named tensor as a checkpoint holds it: global and without padding.

    Fields:
        name: of the tensor, such as layers.3.attention.q.weight
        shape: (rows, columns) of a matrix, (rows,) of a vector
        shared_heads: number of heads its rows are, where ranks share a head once there are more
            ranks than heads; None where every rank must get rows of its own
    """

    name: str
    shape: tuple[int, ...]
    shared_heads: int | None = None

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterShape:
    """One parameter: a named tensor, or several fused by rows in this order.

    Fields:
        parts: the tensors it is made of
        role: what it does in the model
        cut: how it is cut over tensor parallel
        std: standard deviation of its initial values; None for a constant
        fill: that constant
        multiple: what a rank's share of the rows is padded to a multiple of (VOCABULARY)
    """

    parts: tuple[PartShape, ...]
    role: Role
    cut: TensorCut
    std: float | None = None
    fill: float = 0.0
    multiple: int = 1

    @property
    def numel(self) -> int:
        """Return the number of elements over all ranks, each once, without padding."""
        return sum(part.numel for part in self.parts)

    def local_numel(self, tp: int) -> int:
        """Return the number of elements on each of `tp` ranks, padding included."""
        return sum(self._local(part, tp) for part in self.parts)

    def _local(self, part: PartShape, tp: int) -> int:
        rows = part.shape[0]
        if self.cut in (TensorCut.TOKENS, TensorCut.HEADS):
            return part.numel
        if self.cut == TensorCut.VOCABULARY:
            # Padded so that every rank has as many rows, a multiple of `multiple`.
            local_rows = math.ceil(rows / (self.multiple * tp)) * self.multiple
            return local_rows * part.numel // rows
        if part.shared_heads is not None:
            heads = max(1, part.shared_heads // tp)
            return heads * part.numel // part.shared_heads
        return part.numel // tp


@dataclass(frozen=True)
class LinearShape:
    """A linear layer, y = x W^T + b; no bias where it is None."""

    weight: ParameterShape
    bias: ParameterShape | None

    @property
    def parameters(self) -> tuple[ParameterShape, ...]:
        """Return its parameters in the order in which the module has them."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class NormShape:
    """A norm: a LayerNorm where it has a bias, else an RMSNorm.

    Fields:
        epsilon: added to the variance
        from_one: the weight is stored as its distance from 1
        over_projection: the mean square is that of all heads together, on all ranks
    """

    weight: ParameterShape
    bias: ParameterShape | None
    epsilon: float
    from_one: bool = False
    over_projection: bool = False

    @property
    def parameters(self) -> tuple[ParameterShape, ...]:
        """Return its parameters in the order in which the module has them."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer.

    Fields:
        heads, kv_heads, head_size: A, K and D
        scale: factor of the scores; D^-1/2 if None
        softcap: c of c tanh(score / c); None where scores have no cap
        window: tokens a query sees, itself included; None where it sees all before it
        interleaved: the rotation turns neighbouring dims instead of the two halves of a head
        dropout: of the attention probabilities
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float | None
    softcap: float | None
    window: int | None
    interleaved: bool
    dropout: float
    qkv: LinearShape
    q_norm: NormShape | None
    k_norm: NormShape | None
    out: LinearShape


@dataclass(frozen=True)
class MLPShape:
    """The feed-forward layer of one block.

    Fields:
        width: F
        activation: the kind of its function, as `Ops.activation` calls it
        gated: the function of one projection multiplies the other
    """

    width: int
    activation: str
    gated: bool
    up: LinearShape
    down: LinearShape


@dataclass(frozen=True)
class LayerShape:
    """One block. A norm that the layer does not have is None.

    Fields:
        layer: number of the layer, from 0 over the whole model
        name: what the names of its tensors begin with
        hidden: H
        dropout: of both branches
        parallel_residual: both branches read the same x
    """

    layer: int
    name: str
    hidden: int
    dropout: float
    parallel_residual: bool
    attention_norm: NormShape | None
    attention: AttentionShape
    attention_post_norm: NormShape | None
    mlp_norm: NormShape | None
    mlp: MLPShape
    mlp_post_norm: NormShape | None

    @property
    def parameters(self) -> list[ParameterShape]:
        """Return every parameter, in the order in which the module has them."""
        attention, mlp = self.attention, self.mlp
        attends = (self.attention_norm, attention.qkv, attention.q_norm, attention.k_norm)
        feeds = (self.mlp_norm, mlp.up, mlp.down, self.mlp_post_norm)
        held = (*attends, attention.out, self.attention_post_norm, *feeds)
        return [shape for one in held if one is not None for shape in one.parameters]


@dataclass(frozen=True)
class EndsShape:
    """The tensors beside the layers. words: [V, H]; positions and head where the model has them."""

    words: ParameterShape
    positions: ParameterShape | None
    final_norm: NormShape
    head: ParameterShape | None


def layer_shape(config: ModelConfig, layer: int) -> LayerShape:
    """Describe layer number `layer`. Raises ValueError for a window that cannot be read."""
    make = _Maker(config, f"layers.{layer}.")
    before = config.norm_placement in ("pre", "both")
    after = config.norm_placement in ("post", "both")
    return LayerShape(
        layer=layer,
        name=f"layers.{layer}",
        hidden=config.hidden_size,
        dropout=config.hidden_dropout,
        parallel_residual=config.parallel_residual,
        attention_norm=make.norm("attention_norm") if before else None,
        attention=_attention(config, layer, make),
        attention_post_norm=make.norm("attention_post_norm") if after else None,
        mlp_norm=make.norm("mlp_norm") if before else None,
        mlp=_mlp(config, make),
        mlp_post_norm=make.norm("mlp_post_norm") if after else None,
    )


def ends_shape(config: ModelConfig, vocab_size: int) -> EndsShape:
    """Describe what stands before and after the layers; `vocab_size` is without padding."""
    make = _Maker(config, "")
    positions = None
    if config.position_embedding_type == "learned_absolute":
        table = (config.max_position_embeddings, config.hidden_size)
        positions = make.table("embedding.position", table, TensorCut.TOKENS)
    words = (vocab_size, config.hidden_size)
    head = None if config.tied else make.table("head", words, TensorCut.VOCABULARY, Role.HEAD)
    return EndsShape(
        words=make.table("embedding.word", words, TensorCut.VOCABULARY),
        positions=positions,
        final_norm=make.norm("final_norm"),
        head=head,
    )


def parameter_shapes(config: ModelConfig, vocab_size: int) -> Iterator[ParameterShape]:
    """Yield every parameter of a whole model, in the order in which `GPT.parameters` has them."""
    ends = ends_shape(config, vocab_size)
    yield from (shape for shape in (ends.positions, ends.head, ends.words) if shape is not None)
    for layer in range(config.num_layers):
        yield from layer_shape(config, layer).parameters
    yield from ends.final_norm.parameters


def _attention(config: ModelConfig, layer: int, make: "_Maker") -> AttentionShape:
    size = config.head_size
    queries = config.num_attention_heads * size
    keys = config.num_kv_heads * size
    projections = {"attention.q": queries, "attention.k": keys, "attention.v": keys}
    # With more ranks than key-value heads, several ranks hold the same head.
    shared = ("attention.k", "attention.v")
    q_norm = k_norm = None
    if config.qk_layernorm and config.qk_layernorm_width == "projection":
        q_norm = make.projection_norm("attention.q_norm", queries, shared=False)
        k_norm = make.projection_norm("attention.k_norm", keys, shared=True)
    elif config.qk_layernorm:
        q_norm = make.norm("attention.q_norm", size, TensorCut.HEADS)
        k_norm = make.norm("attention.k_norm", size, TensorCut.HEADS)
    return AttentionShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_kv_heads,
        head_size=size,
        scale=config.softmax_scale,
        softcap=config.attn_logit_softcapping,
        window=config.window(layer),
        interleaved=config.rotary_interleaved,
        dropout=config.attention_dropout,
        qkv=make.into(projections, bias=config.qkv_bias, shared=shared),
        q_norm=q_norm,
        k_norm=k_norm,
        out=make.out_of("attention.out", queries, bias=config.attention_out_bias),
    )


def _mlp(config: ModelConfig, make: "_Maker") -> MLPShape:
    width = config.ffn_hidden_size
    projections = {"mlp.gate": width, "mlp.up": width} if config.gated else {"mlp.up": width}
    return MLPShape(
        width=width,
        activation=config.activation,
        gated=config.gated,
        up=make.into(projections, bias=config.linear_bias),
        down=make.out_of("mlp.down", width, bias=config.linear_bias),
    )


@dataclass(frozen=True)
class _Maker:
    """Make the shapes of one layer, or of the ends: their names begin with `prefix`."""

    config: ModelConfig
    prefix: str
    residual_std: float = field(init=False)

    def __post_init__(self) -> None:
        # What writes into the residual stream starts smaller, as two sums a layer add up.
        std = self.config.init_method_std / math.sqrt(2 * self.config.num_layers)
        object.__setattr__(self, "residual_std", std)

    def into(
        self, projections: dict[str, int], *, bias: bool, shared: tuple[str, ...] = ()
    ) -> LinearShape:
        """Describe a linear layer out of the residual stream; `projections`: rows by name."""
        heads = dict.fromkeys(shared, self.config.num_kv_heads)
        columns, std = (self.config.hidden_size,), self.config.init_method_std

        def fused(kind: str, role: Role, columns: tuple[int, ...], std: float | None):
            parts = tuple(
                PartShape(f"{self.prefix}{name}.{kind}", (rows, *columns), heads.get(name))
                for name, rows in projections.items()
            )
            return ParameterShape(parts, role, TensorCut.ROWS, std)

        weight = fused("weight", Role.MATRIX, columns, std)
        return LinearShape(weight, fused("bias", Role.BIAS, (), None) if bias else None)

    def out_of(self, name: str, inputs: int, *, bias: bool) -> LinearShape:
        """Describe a linear layer [H, inputs] whose output joins the residual stream."""
        hidden = self.config.hidden_size
        part = PartShape(f"{self.prefix}{name}.weight", (hidden, inputs))
        weight = ParameterShape((part,), Role.MATRIX, TensorCut.COLUMNS, self.residual_std)
        return LinearShape(weight, self._vector(f"{name}.bias", hidden) if bias else None)

    def norm(
        self, name: str, width: int | None = None, cut: TensorCut = TensorCut.TOKENS
    ) -> NormShape:
        """Describe a norm of vectors of `width`, H if None, of the kind --normalization names."""
        width = self.config.hidden_size if width is None else width
        from_one = self.config.apply_layernorm_1p
        part = PartShape(f"{self.prefix}{name}.weight", (width,))
        weight = ParameterShape((part,), Role.NORM, cut, fill=0.0 if from_one else 1.0)
        centred = self.config.normalization == "LayerNorm"
        bias = self._vector(f"{name}.bias", width, cut) if centred else None
        return NormShape(weight, bias, self.config.norm_epsilon, from_one)

    def projection_norm(self, name: str, width: int, *, shared: bool) -> NormShape:
        """Describe an RMSNorm over all heads of a projection of `width` rows together."""
        heads = self.config.num_kv_heads if shared else None
        part = PartShape(f"{self.prefix}{name}.weight", (width,), heads)
        weight = ParameterShape((part,), Role.NORM, TensorCut.ROWS, fill=1.0)
        return NormShape(weight, None, self.config.norm_epsilon, over_projection=True)

    def table(
        self, name: str, shape: tuple[int, int], cut: TensorCut, role: Role = Role.EMBEDDING
    ) -> ParameterShape:
        """Describe a table [rows, H] of the model's ends."""
        padded = cut == TensorCut.VOCABULARY
        multiple = self.config.make_vocab_size_divisible_by if padded else 1
        part = PartShape(f"{name}.weight", shape)
        return ParameterShape((part,), role, cut, self.config.init_method_std, multiple=multiple)

    def _vector(self, name: str, size: int, cut: TensorCut = TensorCut.TOKENS) -> ParameterShape:
        part = PartShape(f"{self.prefix}{name}", (size,))
        return ParameterShape((part,), Role.BIAS, cut)
