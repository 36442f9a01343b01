"""Train a GPT with the loop that most people write: PyTorch's modules, autocast, fused AdamW."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.engine import vocabulary
from benchmarks.peers import Step, Weights, read_weights, training_step
from trivium.config import Config


def plain(config: Config, weights: Path, device: torch.device) -> Step:
    """Build the update of a plain loop; bf16 is autocast's.

    weights: file of the initial weights
    """
    model = PlainGPT(config)
    model.load_state_dict(plain_weights(config, read_weights(weights)))
    model.to(device)
    loss = partial(autocast_loss, config, model, device)
    return training_step(config, model, device, loss)


def plain_compiled(config: Config, weights: Path, device: torch.device) -> Step:
    """Build the update of a plain loop over torch.compile."""
    model = PlainGPT(config)
    model.load_state_dict(plain_weights(config, read_weights(weights)))
    model.to(device)
    compiled = torch.compile(model)
    loss = partial(autocast_loss, config, compiled, device)
    return training_step(config, model, device, loss)


def autocast_loss(
    config: Config,
    model: nn.Module,
    device: torch.device,
    ids: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the mean loss of ids and labels [B, T], under autocast in a bf16 run."""
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision.bf16):
        return model(ids, labels)


def matrix(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


class PlainBlock(nn.Module):
    """One block: x [B, T, H] + attention, + feed-forward layer, each behind its norm."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        width = model.hidden_size
        inner = model.ffn_hidden_size
        self.heads = model.num_attention_heads
        eps = model.norm_epsilon
        kind = "none" if model.exact_gelu else "tanh"
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.qkv = matrix(width, 3 * width)
        self.out = matrix(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.up = matrix(width, inner)
        self.gelu = nn.GELU(approximate=kind)
        self.down = matrix(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [B, T, H] behind this block."""
        batch, length, width = x.shape
        normed = self.attention_norm(x)
        by_head = []
        for part in self.qkv(normed).split(width, dim=-1):
            heads = part.view(batch, length, self.heads, -1)
            by_head.append(heads.transpose(1, 2))
        q, k, v = by_head  # each [B, A, T, D]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        joined = attended.transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(joined)
        normed = self.mlp_norm(x)
        wide = self.gelu(self.up(normed))
        return x + self.down(wide)


class PlainGPT(nn.Module):
    """GPT-2's shape with its head tied and no bias in its matrices."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        width = model.hidden_size
        words = vocabulary(config)
        blocks = [PlainBlock(config) for _ in range(model.num_layers)]
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(model.max_position_embeddings, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=model.norm_epsilon)
        self.head = matrix(width, words)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of ids and labels [B, T]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        rows = logits.flatten(0, 1)
        return F.cross_entropy(rows, labels.flatten())


def plain_weights(config: Config, ours: Weights) -> Weights:
    """Return Trivium's weights under PlainGPT's names.

    ours: by Trivium's names
    """
    theirs = {
        "words.weight": ours["embedding.word.weight"],
        "positions.weight": ours["embedding.position.weight"],
        "head.weight": ours["embedding.word.weight"],
        "norm.weight": ours["final_norm.weight"],
        "norm.bias": ours["final_norm.bias"],
    }
    for layer in range(config.model.num_layers):
        own = f"layers.{layer}"
        their = f"blocks.{layer}"
        qkv = [ours[f"{own}.attention.{part}.weight"] for part in "qkv"]
        theirs[f"{their}.qkv.weight"] = torch.cat(qkv)
        theirs[f"{their}.out.weight"] = ours[f"{own}.attention.out.weight"]
        for name in ("up", "down"):
            theirs[f"{their}.{name}.weight"] = ours[f"{own}.mlp.{name}.weight"]
        for norm in ("attention_norm", "mlp_norm"):
            for kind in ("weight", "bias"):
                theirs[f"{their}.{norm}.{kind}"] = ours[f"{own}.{norm}.{kind}"]
    return theirs
