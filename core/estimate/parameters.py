"""Count parameters: of a whole model, of its matrix products, and of what one rank holds.

Every count is a sum over core/model/shape.py, which says what a model is made of. Letters as there.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config import ModelConfig
from ..model.shape import (
    LayerShape,
    ParameterShape,
    TensorCut,
    ends_shape,
    layer_shape,
    parameter_shapes,
)
from ..role import Role

# Whole models.


def parameters_by_role(config: ModelConfig, vocab_size: int) -> dict[Role, int]:
    """Count the trained numbers of a model by the role they play, padding left out."""
    counts: Counter[Role] = Counter()
    for shape in parameter_shapes(config, vocab_size):
        counts[shape.role] += shape.numel
    return dict(counts)


def total_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Count every trained number of a model, padding left out."""
    return sum(parameters_by_role(config, vocab_size).values())


def matrix_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Count the parameters in matrix products, padding left out.

    The head counts, the look-up of embeddings does not; a tied matrix counts once, as the head.
    """
    counts = parameters_by_role(config, vocab_size)
    return counts.get(Role.MATRIX, 0) + vocab_size * config.hidden_size


# What one rank holds.


@dataclass(frozen=True)
class ModelChunk:
    """The part of a model that a rank runs in one piece: some layers, and which of its ends."""

    layers: int
    embeds: bool = True
    predicts: bool = True


class LocalWidths(NamedTuple):
    """The widths of one layer on each rank of tp, in numbers of a token.

    query: q. key: k, with fewer key-value heads than ranks one whole head. feed_forward: f.
    up: the outputs of the up projection, 2 f where it is gated.
    """

    query: int
    key: int
    feed_forward: int
    up: int

    @property
    def qkv(self) -> int:
        """Return the outputs of the fused projection: queries, keys and values."""
        return self.query + 2 * self.key


def local_widths(model: ModelConfig, tp: int) -> LocalWidths:
    """Return the widths of a layer on each of `tp` ranks."""
    feed_forward = model.ffn_hidden_size // tp
    kv_heads = max(1, model.num_kv_heads // tp)
    return LocalWidths(
        query=model.num_attention_heads // tp * model.head_size,
        key=kv_heads * model.head_size,
        feed_forward=feed_forward,
        up=2 * feed_forward if model.gated else feed_forward,
    )


def local_vocabulary(model: ModelConfig, vocab_size: int, tp: int) -> int:
    """Return the rows of the embedding on each of `tp` ranks, padding included."""
    return model.padded_vocabulary(vocab_size, tp) // tp


@dataclass(frozen=True)
class LocalParameter:
    """One parameter as a rank holds it.

    numel: its elements, padding included. alone: whether it has a bucket of its own, as the tied
    matrix has, whose gradient two stages add up.
    """

    numel: int
    alone: bool = False


def any_layer(model: ModelConfig) -> LayerShape:
    """Describe a layer. All layers have the same weights; only their windows differ."""
    return layer_shape(model, 0)


def layer_parameters(model: ModelConfig, tp: int) -> list[LocalParameter]:
    """List one layer's parameters on each rank of tp, in the order in which they are made."""
    shapes = any_layer(model).parameters
    return [LocalParameter(shape.local_numel(tp)) for shape in shapes]


def local_parameters(
    model: ModelConfig, vocab_size: int, tp: int, chunks: Sequence[ModelChunk]
) -> list[LocalParameter]:
    """List every parameter of a rank's chunks, in the order in which its buckets are filled.

    A tied head on the rank of the embedding is the same parameter, so it is there once.
    """
    ends = ends_shape(model, vocab_size)
    layer = layer_parameters(model, tp)
    words = LocalParameter(ends.words.local_numel(tp), alone=model.tied)
    embeds_somewhere = any(chunk.embeds for chunk in chunks)
    found: list[LocalParameter] = []
    for chunk in chunks:
        if chunk.embeds and ends.positions is not None:
            found.append(LocalParameter(ends.positions.local_numel(tp)))
        # The order of nn.Module.parameters(): a module's own, such as positions and head, come
        # before those of its children. Another order would fill the buckets differently.
        if chunk.predicts and not (model.tied and embeds_somewhere):
            found.append(words)  # the head, as large as the embedding
        if chunk.embeds:
            found.append(words)
        found += layer * chunk.layers
        if chunk.predicts:
            norms = ends.final_norm.parameters
            found += [LocalParameter(shape.local_numel(tp)) for shape in norms]
    return found


# Gradients that the ranks of tp add up.


class PartialGradients(NamedTuple):
    """The elements of a rank whose gradient is a share of the whole one.

    over_tp: whole on every rank of tp, each of which sees its own tokens or heads.
    over_copies: key-value heads that several ranks hold, where there are fewer heads than ranks.
    """

    over_tp: int
    over_copies: int


def partial_gradients(
    model: ModelConfig, tp: int, chunks: Sequence[ModelChunk], *, sequence_parallel: bool
) -> PartialGradients:
    """Count the gradients of a rank's chunks that tp, or some of its ranks, must add up."""
    cuts = {TensorCut.HEADS, TensorCut.TOKENS} if sequence_parallel else {TensorCut.HEADS}
    shapes: list[ParameterShape] = []
    for chunk in chunks:
        shapes += _shapes_of(model, chunk)
    whole = sum(shape.numel for shape in shapes if shape.cut in cuts)
    return PartialGradients(whole, _shared_heads(shapes, tp))


def _shapes_of(model: ModelConfig, chunk: ModelChunk) -> list[ParameterShape]:
    """List the shapes of a chunk, its tables of words left out: they are cut by rows."""
    ends = ends_shape(model, vocab_size=1)
    shapes = any_layer(model).parameters * chunk.layers
    if chunk.predicts:
        shapes += ends.final_norm.parameters
    if chunk.embeds and ends.positions is not None:
        shapes.append(ends.positions)
    return shapes


def _shared_heads(shapes: Iterable[ParameterShape], tp: int) -> int:
    """Count this rank's elements of key-value heads, which several ranks may hold alike."""
    total = 0
    for shape in shapes:
        for part in shape.parts:
            if part.shared_heads is not None:
                # With fewer heads than ranks, a rank holds one head whole.
                heads = max(1, part.shared_heads // tp)
                total += heads * part.numel // part.shared_heads
    return total
