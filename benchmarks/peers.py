"""Build Trivium and its peers as updates to call.

All of them train the same model from the same weights on the same tokens with the same optimizer.
The other peers are in peer_plain.py and peer_megatron.py.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.engine import Updates, fixed_batch, vocabulary
from trivium import launch, ops
from trivium.config import Config
from trivium.interop.families import write_config
from trivium.interop.hf_names import hf_correspondences
from trivium.interop.name_map import assemble, their_shapes
from trivium.layout import layout_of
from trivium.model.gpt import GPT
from trivium.precision import working_dtype

Step = Callable[[], float]  # do one update and return its loss
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids, labels [B, T] to the mean loss
Weights = dict[str, torch.Tensor]

TRANSFORMERS = "transformers.models.llama.modeling_llama"


def write_weights(config: Config, path: Path) -> None:
    """Write Trivium's initial weights by their names; they depend on the model and --seed alone."""
    cpu_ops = ops.select_ops("torch", torch.device("cpu"), torch.float32)
    model = GPT(config.model, vocabulary(config), ops=cpu_ops, seed=config.batch.seed)
    weights: Weights = {}
    for parameter in model.parameters():
        for piece in layout_of(parameter).pieces(parameter.data):
            weights[piece.name] = piece.tensor.clone()
    torch.save(weights, path)


def read_weights(path: Path) -> Weights:
    """Read what write_weights wrote, without copying it into memory."""
    return torch.load(path, weights_only=True, mmap=True)


def trivium(config: Config, weights: Path, device: torch.device) -> Step:
    """Build Trivium's update. It makes its own weights, from the seed of those in the file."""
    mesh = launch.plan_mesh(config, launch.Process()).connect("gloo", 10)
    return Updates(config, mesh, device).step


def transformers_llama(config: Config, weights: Path, device: torch.device) -> Step:
    """Build the update of transformers' LlamaForCausalLM; in bf16 its weights are bf16."""
    model = llama(config, read_weights(weights))
    model.to(device, working_dtype(config.precision)).train()

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

    return training_step(config, model, device, loss)


def llama(config: Config, ours: Weights) -> nn.Module:
    """Return transformers' model of Trivium's weights, in fp32 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    no_ids = {"bos_token_id": None, "eos_token_id": None}
    shape = LlamaConfig.from_dict(write_config(config.model, vocabulary(config), no_ids))
    shape._attn_implementation = "sdpa"
    model = LlamaForCausalLM(shape)
    places = hf_correspondences(config.model, vocabulary(config))
    theirs = {name: assemble(name, places, ours.__getitem__) for name in their_shapes(places)}
    model.load_state_dict(theirs, strict=not config.model.tied)
    return model


def training_step(config: Config, model: nn.Module, device: torch.device, loss_of: Loss) -> Step:
    """Build a peer's update: forward, backward, clip, AdamW.

    As in Trivium, weight decay is for matrices alone.

    config: the rates and the batch
    loss_of: computes the mean loss of ids and labels
    """
    optimizer = config.optimizer
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        fused=True,
    )
    batch = fixed_batch(config)
    ids = batch.tokens.to(device)
    labels = batch.labels.to(device)

    def step() -> float:
        loss = loss_of(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optimizer.clip_grad)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step
