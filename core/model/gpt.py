"""The GPT: embedding, blocks, final norm and head, whole or one pipeline stage of it.

Letters: model/shape.py.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng
from ..config import ModelConfig
from ..gradients import use
from ..ops import Ops
from ..parallel.layers import VocabParallelEmbedding, column_parallel
from ..parallel.loss import head_loss
from ..parallel.sharding import Sharding
from .block import Block
from .norm import Norm
from .recompute import Layer, Recompute
from .rotary import Angles, Rotary
from .shape import EndsShape, ends_shape, layer_shape
from .tokens import TokenContext
from .weights import layout_for, new_parameter


class GPT(nn.Module):
    """A decoder over a vocabulary of `vocab_size` ids, or one pipeline stage of it.

    The ids include that of the end of document; padding of the vocabulary is added and masked
    here. Parameters are fp32 on the CPU until an optimizer or `to_device` moves them.

    Arguments:
        seed: of the initial weights; None where they are to be loaded
        sharding: how the stage is cut over ranks; a whole model in one process if not given
        layers: numbers of the stage's layers; all if not given
        embeds: the stage has the embedding
        predicts: the stage has final norm, head and loss
        tied_weight: the embedding of another stage on this rank, where the head is tied to it
        recompute: activations that are computed again in backward
    """

    layers: Sequence[Block]  # an nn.ModuleList, whose items it says the type of

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        ops: Ops,
        seed: int | None,
        sharding: Sharding | None = None,
        layers: range | None = None,
        embeds: bool = True,
        predicts: bool = True,
        tied_weight: nn.Parameter | None = None,
        recompute: Recompute | None = None,
    ):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embeds, self.predicts = embeds, predicts
        self.sharding = sharding = sharding or Sharding()
        self.ops = ops
        self.recompute = recompute = recompute or Recompute()
        self.recomputes_layers = recompute.full
        self.softcap = config.final_logit_softcapping
        self.dropout = config.hidden_dropout
        # The root of H in the working dtype, as Gemma has it: see `_embed`.
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else None

        ends = ends_shape(config, vocab_size)
        self.embedding: VocabParallelEmbedding | None = None
        self.positions: nn.Parameter | None = None
        if embeds:
            self._add_embedding(ends, seed)
        blocks = [
            Block(layer_shape(config, layer), sharding, ops, seed, recompute)
            for layer in (range(config.num_layers) if layers is None else layers)
        ]
        self.layers = cast(Sequence[Block], nn.ModuleList(blocks))
        self.final_norm: Norm | None = None
        self.head: nn.Parameter | None = None
        if predicts:
            self._add_head(ends, seed, tied_weight)
        # Of layers without a window, and of those with one: they may turn by another base.
        self.rotary: Rotary | None = None
        self.local_rotary: Rotary | None = None
        if config.position_embedding_type == "rope":
            self.rotary = self.local_rotary = Rotary(config)
            if config.rotary_base_local is not None:
                self.local_rotary = Rotary(config, local=True)

    def to_device(self, device: torch.device, dtype: torch.dtype) -> "GPT":
        """Move to `device` with weights in `dtype`.

        The rotary frequencies stay fp32, in which positions are exact.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device, dtype)
        for rotary in (self.rotary, self.local_rotary):
            if rotary is not None:
                rotary.to(device)
        return self

    def forward(
        self,
        x: Tensor,
        context: TokenContext | None = None,
        *,
        targets: tuple[Tensor, Tensor] | None = None,
        predicted: slice | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pass tokens or hidden states through the stage.

        Arguments:
            x: tokens int64 [B, T/cp] for a stage that embeds, else the hidden states
                [B, T/cp, H] of the stage before, cut by tokens under sequence parallel
            context: whole sequences from position 0 without dropout, if not given
            targets: labels int64 and weights fp32, both [B, T/cp] (see Targets)
            predicted: the tokens whose logits are wanted; all if not given

        Returns:
            of a stage that does not predict: hidden states, as x
            without targets: logits [B, T/cp, V/tp], padding columns included
            with targets: the sum of weights * cross-entropy in nats, 0-d, and each label's
                cross-entropy, fp32 [B, T/cp], without a gradient. With an optimizer, backward
                must start from the sum itself: see head_loss.
        """
        if context is None:
            context = TokenContext(torch.arange(x.shape[1], device=x.device))
        if self.embedding is not None:
            x = self._embed(self.embedding(x), context)
        angles = self._angles(context)
        if self.recomputes_layers and torch.is_grad_enabled():
            x = self.recompute.layers(self._bound_layers(angles, context), x)
        else:
            for block in self.layers:
                x = block(x, angles[block.windowed], context)
        if not self.predicts:
            return x
        if predicted is not None:
            # Before the head, whose product would cost V times H for each token that nobody reads.
            x = x[:, predicted]
        assert self.final_norm is not None
        # Under the same name, so that the norm's input is let go: the loss needs the memory.
        x = self.final_norm(x)
        return self._predict(x, targets)

    def _predict(
        self, x: Tensor, targets: tuple[Tensor, Tensor] | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of normalized hidden states, or their losses."""
        head = self.head
        if head is None:
            assert self.embedding is not None, "a head has a weight of its own or the embedding's"
            head = self.embedding.weight
        if targets is not None:
            labels, weights = targets
            return head_loss(
                x,
                head,
                labels,
                weights,
                self.vocab_size,
                self.sharding,
                self.ops,
                softcap=self.softcap,
            )
        logits = column_parallel(x, head, self.sharding, self.ops)
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def _add_embedding(self, ends: EndsShape, seed: int | None) -> None:
        self.embedding = VocabParallelEmbedding(self._words(ends, seed), self.sharding)
        if ends.positions is not None:
            self.positions = new_parameter(ends.positions, self.sharding, seed)

    def _add_head(
        self, ends: EndsShape, seed: int | None, tied_weight: nn.Parameter | None
    ) -> None:
        self.final_norm = Norm(ends.final_norm, self.sharding, self.ops, seed)
        if ends.head is not None:
            self.head = new_parameter(ends.head, self.sharding, seed)
        elif tied_weight is not None:
            self.head = tied_weight
        elif self.embedding is None:
            self.head = self._words(ends, seed)

    def _words(self, ends: EndsShape, seed: int | None) -> nn.Parameter:
        """Make the embedding's weight, which a tied head multiplies by as well."""
        layout = layout_for(ends.words, self.sharding)
        if ends.head is None:
            twins = self.sharding.embedding
            # With both ends on this rank the weight gets two gradients from a micro-batch.
            layout = layout.tied(twins, uses=2 if twins.size == 1 else 1)
        return rng.new_parameter(layout, rng.Init(seed, ends.words.std))

    def _embed(self, x: Tensor, context: TokenContext) -> Tensor:
        """Scale the embeddings x [B, T, H], add positions, and drop out: what the model has."""
        if self.embedding_scale is not None:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype).item()
        if self.positions is not None:
            places = self.sharding.own_tokens(context.positions)
            x = x + F.embedding(places, use(self.positions))
        if self.dropout > 0.0 and context.stream is not None:
            x = rng.dropout(x, self.dropout, context.stream, "embedding")
        return x

    def _angles(self, context: TokenContext) -> tuple[Angles | None, Angles | None]:
        """Return the angles of layers without a window, and of those with one."""
        if self.rotary is None or self.local_rotary is None:
            return None, None
        positions = context.positions
        length = context.length
        if length is None:
            length = positions.shape[-1]
        everywhere = self.rotary(positions, length)
        if self.local_rotary is self.rotary:
            return everywhere, everywhere
        return everywhere, self.local_rotary(positions, length)

    def _bound_layers(
        self, angles: tuple[Angles | None, Angles | None], context: TokenContext
    ) -> list[Layer]:
        """Return the blocks as functions of the hidden states alone."""
        return [
            partial(block, angles=angles[block.windowed], context=context) for block in self.layers
        ]
