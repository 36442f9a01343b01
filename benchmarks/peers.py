"""Trivium and its peers, each an update to call: the same model from the same weights on the same tokens, with the same optimizer."""

from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.parallel import random_batches
from trivium import launch, ops
from trivium.config import Config
from trivium.data.loader import Batch
from trivium.interop.families import write_config
from trivium.interop.hf_names import hf_places
from trivium.interop.name_map import assemble, their_shapes
from trivium.layout import layout_of
from trivium.model.gpt import GPT
from trivium.precision import working_dtype
from trivium.train.build import build_trainer
from trivium.train.progress import Progress

Step = Callable[[], float]  # one update; its loss
Weights = dict[str, torch.Tensor]

MEGATRON = "megatron.core.models.gpt"
TRANSFORMERS = "transformers.models.llama.modeling_llama"


def vocabulary(config: Config) -> int:
    """Of a NullTokenizer: the end of document comes on top."""
    return config.data.vocab_size + 1


def tokens(config: Config) -> Batch:
    """The sequences of every update: the same ones over and over, so that what is computed shows in the loss soon."""
    return next(random_batches(config, 0, 1))


def write_weights(config: Config, path: Path) -> None:
    """Trivium's initial weights by their names, which depend on the model and --seed alone."""
    model = GPT(
        config.model,
        vocabulary(config),
        ops=ops.select_ops("torch", torch.device("cpu"), torch.float32),
        seed=config.batch.seed,
    )
    pieces = [
        piece
        for parameter in model.parameters()
        for piece in layout_of(parameter).pieces(parameter.data)
    ]
    torch.save({piece.name: piece.tensor.clone() for piece in pieces}, path)


def read_weights(path: Path) -> Weights:
    return torch.load(path, weights_only=True, mmap=True)


def trivium(config: Config, weights: Path, device: torch.device) -> Step:
    """Weights are its own: those that write_weights wrote came from the same seed."""
    kernels = ops.select_ops("auto", device, working_dtype(config.precision))
    mesh = launch.plan_mesh(config, launch.Process()).connect("gloo", 10)
    trainer = build_trainer(
        config, mesh, device, kernels, vocabulary(config), config.data.vocab_size
    )
    batches, progress = repeat(tokens(config)), Progress()

    def step() -> float:
        nonlocal progress
        result = trainer.step(progress, batches, stop=False)
        progress = result.progress
        return (result.loss_sum / result.num_predictions).item()

    return step


def plain(config: Config, weights: Path, device: torch.device) -> Step:
    """The loop that most people write: PyTorch's modules, autocast for bf16, fused AdamW."""
    model = PlainGPT(config)
    model.load_state_dict(plain_weights(config, read_weights(weights)))
    return loop(config, model.to(device), device, partial(autocast, config, model, device))


def plain_compiled(config: Config, weights: Path, device: torch.device) -> Step:
    model = PlainGPT(config)
    model.load_state_dict(plain_weights(config, read_weights(weights)))
    return loop(
        config, model.to(device), device, partial(autocast, config, torch.compile(model), device)
    )


def autocast(
    config: Config, model: nn.Module, device: torch.device, ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision.bf16):
        return model(ids, labels)


class PlainBlock(nn.Module):
    """x [B, T, H] + attention, + feed-forward layer, each behind its norm."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        width, inner = model.hidden_size, model.ffn_hidden_size
        self.heads = model.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, eps=model.norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, eps=model.norm_epsilon)
        self.up = nn.Linear(width, inner, bias=False)
        self.gelu = nn.GELU(approximate="none" if model.exact_gelu else "tanh")
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(width, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.gelu(self.up(self.mlp_norm(x))))


class PlainGPT(nn.Module):
    """GPT-2's shape without biases in its matrices, the head tied: ids and labels [B, T] to the mean loss."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        self.words = nn.Embedding(vocabulary(config), model.hidden_size)
        self.positions = nn.Embedding(model.max_position_embeddings, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(model.num_layers))
        self.norm = nn.LayerNorm(model.hidden_size, eps=model.norm_epsilon)
        self.head = nn.Linear(model.hidden_size, vocabulary(config), bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def plain_weights(config: Config, ours: Weights) -> Weights:
    """Trivium's weights under PlainGPT's names."""
    theirs = {
        "words.weight": ours["embedding.word.weight"],
        "positions.weight": ours["embedding.position.weight"],
    }
    theirs |= {
        "head.weight": theirs["words.weight"],
        "norm.weight": ours["final_norm.weight"],
        "norm.bias": ours["final_norm.bias"],
    }
    for layer in range(config.model.num_layers):
        own, their = f"layers.{layer}", f"blocks.{layer}"
        theirs[f"{their}.qkv.weight"] = torch.cat(
            [ours[f"{own}.attention.{part}.weight"] for part in "qkv"]
        )
        theirs[f"{their}.out.weight"] = ours[f"{own}.attention.out.weight"]
        theirs |= {
            f"{their}.{name}.weight": ours[f"{own}.mlp.{name}.weight"] for name in ("up", "down")
        }
        norms = (
            f"{norm}.{kind}"
            for norm in ("attention_norm", "mlp_norm")
            for kind in ("weight", "bias")
        )
        theirs |= {f"{their}.{name}": ours[f"{own}.{name}"] for name in norms}
    return theirs


def megatron(config: Config, weights: Path, device: torch.device) -> Step:
    """megatron-core's GPTModel of local layers; bf16 is that of its weights. Only attention is PyTorch's: Megatron's own asks for CUDA."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    model, bf16 = config.model, config.precision.bf16
    shape = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        layernorm_epsilon=model.norm_epsilon,
        activation_func=partial(F.gelu, approximate="none" if model.exact_gelu else "tanh"),
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    spec.submodules.self_attention.submodules.core_attention = MegatronAttention
    peer = GPTModel(
        shape,
        spec,
        vocabulary(config),
        model.max_position_embeddings,
        share_embeddings_and_output_weights=True,
    )
    peer.to(device, shape.params_dtype)
    peer.load_state_dict(
        megatron_weights(config, read_weights(weights)), strict=False
    )  # it has entries of its own that hold no weights

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        return peer(ids, positions, None, labels=labels).mean()

    return loop(config, peer, device, loss)


class MegatronAttention(nn.Module):
    """In the place of megatron-core's attention: q, k, v [T, B, A, D] to [T, B, H]."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **settings):
        super().__init__()

    def forward(self, q, k, v, mask, **settings):
        attended = F.scaled_dot_product_attention(
            *(part.permute(1, 2, 0, 3) for part in (q, k, v)), is_causal=True
        )
        return attended.permute(2, 0, 1, 3).flatten(2)


def megatron_weights(config: Config, ours: Weights) -> Weights:
    """Trivium's weights under megatron-core's names: queries, keys and values are fused head by head."""
    theirs = {
        f"embedding.{kind}_embeddings.weight": ours[f"embedding.{kind}.weight"]
        for kind in ("word", "position")
    }
    theirs |= {
        f"decoder.final_layernorm.{kind}": ours[f"final_norm.{kind}"] for kind in ("weight", "bias")
    }
    heads, width = config.model.num_attention_heads, config.model.hidden_size
    for layer in range(config.model.num_layers):
        own, their = f"layers.{layer}", f"decoder.layers.{layer}"
        by_head = [ours[f"{own}.attention.{part}.weight"].view(heads, -1, width) for part in "qkv"]
        theirs[f"{their}.self_attention.linear_qkv.weight"] = torch.cat(by_head, dim=1).flatten(
            0, 1
        )
        names = {
            "attention.out": "self_attention.linear_proj",
            "mlp.up": "mlp.linear_fc1",
            "mlp.down": "mlp.linear_fc2",
        }
        theirs |= {
            f"{their}.{name}.weight": ours[f"{own}.{part}.weight"] for part, name in names.items()
        }
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "pre_mlp_layernorm"}
        theirs |= {
            f"{their}.{name}.{kind}": ours[f"{own}.{part}.{kind}"]
            for part, name in norms.items()
            for kind in ("weight", "bias")
        }
    return theirs


def transformers_llama(config: Config, weights: Path, device: torch.device) -> Step:
    """LlamaForCausalLM; bf16 is that of its weights."""
    model = llama(config, read_weights(weights)).to(device, working_dtype(config.precision)).train()
    return loop(
        config,
        model,
        device,
        lambda ids, labels: (
            model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        ),
    )


def llama(config: Config, ours: Weights) -> nn.Module:
    """transformers' model of Trivium's weights, fp32 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig.from_dict(
        write_config(config.model, vocabulary(config), {"bos_token_id": None, "eos_token_id": None})
    )
    shape._attn_implementation = "sdpa"
    model, places = LlamaForCausalLM(shape), hf_places(config.model, vocabulary(config))
    model.load_state_dict(
        {name: assemble(name, places, ours.__getitem__) for name in their_shapes(places)},
        strict=not config.model.tied,
    )
    return model


def loop(
    config: Config,
    model: nn.Module,
    device: torch.device,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Step:
    """Forward, backward, clip, AdamW with weight decay on matrices alone: Trivium's rule."""
    optimizer, parameters, batch = config.optimizer, list(model.parameters()), tokens(config)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optimizer.adam_beta1, optimizer.adam_beta2)
    adamw = torch.optim.AdamW(
        groups, lr=optimizer.lr, betas=betas, eps=optimizer.adam_eps, fused=True
    )
    ids, labels = batch.tokens.to(device), batch.labels.to(device)

    def step() -> float:
        loss = loss_of(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optimizer.clip_grad)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step
