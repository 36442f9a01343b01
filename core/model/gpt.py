"""The GPT: embedding, pre-norm blocks, final norm and head, the same code for every layout."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import comm, rng
from ..config import ModelConfig
from ..layout import Layout
from ..mesh import Axis
from ..ops import Ops
from ..parallel.embedding import VocabParallelEmbedding
from ..parallel.loss import vocab_parallel_cross_entropy
from . import rotary
from .attention import Angles, Attention, KVCache
from .mlp import MLP
from .norm import Norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch under hidden dropout. x: [B, T, H]."""

    def __init__(self, layer: int, config: ModelConfig, tp: Axis, ops: Ops, seed: int | None):
        super().__init__()
        name = self.name = f"layers.{layer}"
        self.dropout = config.hidden_dropout
        residual_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        self.attention_norm = Norm(f"{name}.attention_norm", config.hidden_size, config, tp, ops, seed)
        self.attention = Attention(f"{name}.attention", config, tp, ops, seed, residual_std)
        self.mlp_norm = Norm(f"{name}.mlp_norm", config.hidden_size, config, tp, ops, seed)
        self.mlp = MLP(f"{name}.mlp", config, tp, ops, seed, residual_std)

    def forward(self, x: torch.Tensor, angles: Angles | None, stream: rng.DropoutStream | None, cache: KVCache | None) -> torch.Tensor:
        branch = self.attention(self.attention_norm(x), angles, cache)
        x = x + rng.dropout(branch, self.dropout, stream, f"{self.name}.attention")
        return x + rng.dropout(self.mlp(self.mlp_norm(x)), self.dropout, stream, f"{self.name}.mlp")


class GPT(nn.Module):
    """A decoder over a vocabulary of `vocab_size` ids (end of document included; padding is added and masked here).

    seed None leaves the weights to be loaded. Parameters are fp32 on the CPU until an optimizer or `.to` moves them.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, tp: Axis, ops: Ops, seed: int | None):
        super().__init__()
        self.config, self.vocab_size, self.tp = config, vocab_size, tp
        padded, init = config.padded_vocabulary(vocab_size, tp.size), rng.Init(seed, config.init_method_std)
        self.embedding = VocabParallelEmbedding("embedding.word", vocab_size, padded, config.hidden_size, tp, init)
        self.positions = None
        if config.position_embedding_type == "learned_absolute":
            shape = (config.max_position_embeddings, config.hidden_size)
            self.positions = rng.new_parameter(Layout.whole("embedding.position.weight", shape, tp), init)
        self.layers = nn.ModuleList(Block(layer, config, tp, ops, seed) for layer in range(config.num_layers))
        self.final_norm = Norm("final_norm", config.hidden_size, config, tp, ops, seed)
        self.head = None  # tied: the embedding's weight
        if not config.tied:
            self.head = rng.new_parameter(Layout.vocabulary_cut("head.weight", vocab_size, padded, config.hidden_size, tp), init)
        rotates = config.position_embedding_type == "rope"
        self.register_buffer("frequencies", rotary.frequencies(config) if rotates else None, persistent=False)

    def place(self, device: torch.device, dtype: torch.dtype) -> "GPT":
        """Move to `device` with weights in `dtype`; the rotary frequencies stay fp32, in which positions are exact."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device, dtype)
        if self.frequencies is not None:
            self.frequencies = self.frequencies.to(device)
        return self

    def forward(self, tokens: torch.Tensor, stream: rng.DropoutStream | None = None, caches: list[KVCache] | None = None) -> torch.Tensor:
        """Logits [B, T, V/tp] of tokens int64 [B, T], padding columns included. With caches, tokens continue what they hold."""
        start = caches[0].length if caches else 0
        stop = start + tokens.shape[1]
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions[start:stop]
        x = rng.dropout(x, self.config.hidden_dropout, stream, "embedding")
        angles = None if self.frequencies is None else rotary.angles(self.frequencies, start, stop)
        for layer, block in enumerate(self.layers):
            x = block(x, angles, stream, caches[layer] if caches else None)
        x = comm.copy_to(self.final_norm(x), self.tp)
        return F.linear(x, self.embedding.weight if self.head is None else self.head)

    def token_losses(self, tokens: torch.Tensor, labels: torch.Tensor, stream: rng.DropoutStream | None = None) -> torch.Tensor:
        """Cross-entropy of every label, fp32 [B, T], in nats."""
        logits = self(tokens, stream)
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), labels.flatten(), self.vocab_size, self.tp).view_as(labels)

    def caches(self, batch: int, capacity: int) -> list[KVCache]:
        """An empty key-value cache per layer."""
        weight, heads = self.embedding.weight, self.config.num_kv_heads // self.tp.size
        return [KVCache(batch, capacity, heads, self.config.head_size, weight.dtype, weight.device) for _ in self.layers]
