"""The GPT: embedding, blocks, final norm and head, whole or one pipeline stage of it, the same code for every layout."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..gradients import use
from ..layout import Layout, Role
from ..ops import Ops
from ..parallel.embedding import VocabParallelEmbedding
from ..parallel.linear import column_parallel
from ..parallel.loss import head_loss
from ..parallel.sharding import Sharding
from .attention import KVCache
from .block import Block
from .norm import Norm
from .recompute import Recompute
from .rotary import Angles, Rotary
from .tokens import TokenContext


class GPT(nn.Module):
    """A decoder over a vocabulary of `vocab_size` ids (end of document included; padding is added and masked here), or a stage of one.

    A stage has the layers of the range `layers`, the embedding if it `embeds`, final norm, head and loss if it `predicts`. A head that is
    tied to the embedding of another stage on this rank is given as `tied_weight`. seed None leaves the weights to be loaded. Parameters
    are fp32 on the CPU until an optimizer or `to_device` moves them.
    """

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
        self.config, self.vocab_size, self.embeds, self.predicts = (
            config,
            vocab_size,
            embeds,
            predicts,
        )
        self.sharding, self.ops = sharding or Sharding(), ops
        sharding = self.sharding
        self.recompute = recompute = recompute or Recompute()
        tp, sequence_parallel, init = (
            sharding.tp,
            sharding.sequence_parallel,
            rng.Init(seed, config.init_method_std),
        )
        padded = config.padded_vocabulary(vocab_size, tp.size)
        words = Layout.vocabulary_cut(
            "embedding.word.weight", vocab_size, padded, config.hidden_size, tp
        )
        if config.tied:
            words = words.tied(sharding.embedding, uses=2 if sharding.embedding.size == 1 else 1)
        self.embedding = VocabParallelEmbedding(words, sharding, init) if embeds else None
        self.positions = None
        if embeds and config.position_embedding_type == "learned_absolute":
            shape = (config.max_position_embeddings, config.hidden_size)
            layout = Layout.whole(
                "embedding.position.weight",
                shape,
                tp,
                partial=sequence_parallel,
                role=Role.EMBEDDING,
            )
            self.positions = rng.new_parameter(layout, init)
        layers = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleList(
            Block(layer, config, sharding, ops, seed, recompute) for layer in layers
        )
        self.final_norm = self.head = None
        if predicts:
            self.final_norm = Norm(
                "final_norm",
                config.hidden_size,
                config,
                sharding,
                ops,
                seed,
                cut_input=sequence_parallel,
            )
            if not config.tied:
                words = Layout.vocabulary_cut(
                    "head.weight", vocab_size, padded, config.hidden_size, tp, role=Role.HEAD
                )
            if not (config.tied and embeds):
                self.head = (
                    tied_weight if tied_weight is not None else rng.new_parameter(words, init)
                )
        self.rotary = self.local_rotary = None  # of layers without and with a window
        if config.position_embedding_type == "rope":
            self.rotary = Rotary(config)
            self.local_rotary = (
                self.rotary if config.rotary_base_local is None else Rotary(config, local=True)
            )

    def to_device(self, device: torch.device, dtype: torch.dtype) -> "GPT":
        """Move to `device` with weights in `dtype`; the rotary frequencies stay fp32, in which positions are exact."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device, dtype)
        for rotary in (self.rotary, self.local_rotary):
            if rotary is not None:
                rotary.to(device)
        return self

    def forward(
        self,
        x: torch.Tensor,
        context: TokenContext | None = None,
        caches: list[KVCache] | None = None,
        targets: tuple[torch.Tensor, torch.Tensor] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T/cp, V/tp], padding columns included, of a stage that predicts; else hidden states [B, T/cp, H], cut by sequence parallel.

        x: tokens int64 [B, T/cp] for a stage that embeds; else the hidden states of the stage before. No context: whole sequences from
        position 0, without dropout. With caches, tokens continue what they hold. targets: labels and weights (see Targets); what comes back is then
        the sum of weights * cross-entropy in nats, 0-d, and every label's, fp32 [B, T/cp]. The sum has a gradient, the losses have none;
        with an optimizer, backward must start from the sum itself: see head_loss.
        last_only: logits [B, 1, V/tp] of the last token alone, where this rank holds the whole sequence.
        """
        steps = caches and context is None and x.shape[1] == 1 and not torch.is_grad_enabled()
        if context is None:
            start = caches[0].length if caches else 0
            context = TokenContext(
                torch.arange(start, start + x.shape[1], device=x.device), length=start + x.shape[1]
            )
        if self.embedding is not None:
            x = self._embed(x, context)
        angles = self._angles(context)
        if caches:
            for block, cache in zip(self.layers, caches, strict=True):
                turned = angles[block.windowed]
                x = (
                    cache.take_step(x, turned)
                    if steps and cache.step is not None
                    else block(x, turned, context, cache)
                )
        else:
            x = self.recompute.layers(
                [
                    partial(block, angles=angles[block.windowed], context=context)
                    for block in self.layers
                ],
                x,
            )
        if not self.predicts:
            return x
        if last_only:
            x = x[:, -1:]
        x, head, cap = (
            self.final_norm(x),
            self.embedding.weight if self.head is None else self.head,
            self.config.final_logit_softcapping,
        )
        if targets is not None:
            return head_loss(
                x, head, *targets, self.vocab_size, self.sharding, self.ops, softcap=cap
            )
        logits = column_parallel(x, head, self.sharding, self.ops)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rotates_otherwise(self, length: int, longer: int) -> bool:
        """Whether a sequence of `longer` tokens is rotated by other frequencies than one of `length`."""
        return self.rotary is not None and self.rotary.is_long(longer) != self.rotary.is_long(
            length
        )

    def caches(self, batch: int, capacity: int) -> list[KVCache]:
        """An empty key-value cache per layer."""
        weight, heads = self.embedding.weight, self.config.num_kv_heads
        return [
            KVCache(
                batch,
                capacity,
                heads,
                self.config.head_size,
                weight.dtype,
                weight.device,
                layer.step(batch),
            )
            for layer in self.layers
        ]

    def _angles(self, context: TokenContext) -> tuple[Angles | None, Angles | None]:
        """Of layers without a window, and of those with one."""
        if self.rotary is None:
            return None, None
        length = context.whole_length
        everywhere = self.rotary(context.positions, length)
        return everywhere, everywhere if self.local_rotary is self.rotary else self.local_rotary(
            context.positions, length
        )

    def _embed(self, tokens: torch.Tensor, context: TokenContext) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = (
                x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype).item()
            )  # the root in the working dtype, as Gemma has it
        if self.positions is not None:
            x = x + F.embedding(self.sharding.own_tokens(context.positions), use(self.positions))
        return rng.dropout(x, self.config.hidden_dropout, context.stream, "embedding")
