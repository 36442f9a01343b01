"""The names of each Hugging Face family: where our tensors lie in a folder of its. Several of ours under one name are fused, in that order."""

from collections.abc import Iterator

import torch

from ..config import ModelConfig
from ..layout import layout_of
from ..model.gpt import GPT
from ..ops import Ops
from .families import family_of
from .name_map import Place, Run

_LLAMA = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_PHI3 = _LLAMA | dict.fromkeys(("attention.q", "attention.k", "attention.v"), "self_attn.qkv_proj")
_PHI3 |= dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj")
_GEMMA = _LLAMA | {"mlp_norm": "pre_feedforward_layernorm"}
_GPT2 = {
    "attention_norm": "ln_1",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn.c_attn"),
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_NEOX = {
    "attention_norm": "input_layernorm",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attention.query_key_value"),
    "attention.out": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_LLAMA_ENDS = {
    "embedding.word": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_LAYERS = {
    "gpt2": ("transformer.h.", _GPT2),
    "gpt_neox": ("gpt_neox.layers.", _NEOX),
    "phi3": ("model.layers.", _PHI3),
}
_LAYERS |= dict.fromkeys(("gemma2", "gemma3_text"), ("model.layers.", _GEMMA))
_ENDS = {
    "gpt2": {
        "embedding.word": "transformer.wte",
        "embedding.position": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "gpt_neox": {
        "embedding.word": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
}


def hf_places(config: ModelConfig, vocab_size: int) -> dict[str, Place]:
    """Part name -> its place in a folder of the model's family, in the order of the model. Raises ValueError where it has none."""
    family = family_of(config).model_type
    by_head = config.head_size if family == "gpt_neox" else None
    return _places(family, part_shapes(config, vocab_size), by_head, transposes=family == "gpt2")


def nanogpt_places(config: ModelConfig, vocab_size: int) -> dict[str, Place]:
    """As hf_places, in the model of a nanoGPT checkpoint: GPT-2's names, matrices the usual way round."""
    return _places("gpt2", part_shapes(config, vocab_size), None, transposes=False)


def _places(
    family: str, shapes: dict[str, tuple[int, ...]], by_head: int | None, transposes: bool
) -> dict[str, Place]:
    prefix, inside = _LAYERS.get(family, ("model.layers.", _LLAMA))
    ends = _ENDS.get(family, _LLAMA_ENDS)
    names: dict[str, str] = {}
    for part in shapes:
        stem, _, kind = part.rpartition(".")
        if stem.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            names[part] = f"{prefix}{layer}.{inside[stem]}.{kind}"
        else:
            names[part] = f"{ends[stem]}.{kind}"
    return dict(_placed(shapes, names, by_head, transposes))


def part_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every part of a whole model by name, in its order, with its global shape. Nothing is allocated."""
    with torch.device("meta"):
        model = GPT(config, vocab_size, ops=Ops(), seed=None)
    return {
        part.name: part.shape
        for parameter in model.parameters()
        for part in layout_of(parameter).parts
    }


def _placed(
    shapes: dict[str, tuple[int, ...]], names: dict[str, str], by_head: int | None, transposes: bool
) -> Iterator[tuple[str, Place]]:
    """by_head: what is fused is so head by head of this size. transposes: the matrices inside the layers are stored columns first."""
    fused: dict[str, list[str]] = {}
    for part, name in names.items():
        fused.setdefault(name, []).append(part)
    for part, name in names.items():
        together, shape = fused[name], shapes[part]
        rows, index = [shapes[other][0] for other in together], together.index(part)
        whole, transposed = (
            (sum(rows), *shape[1:]),
            transposes and len(shape) == 2 and part.startswith("layers."),
        )
        if by_head is not None and len(together) > 1:
            runs = tuple(
                Run(head * by_head, (head * len(together) + index) * by_head, by_head)
                for head in range(shape[0] // by_head)
            )
        else:
            runs = (Run(0, sum(rows[:index]), shape[0]),)
        yield part, Place(name, whole[::-1] if transposed else whole, runs, transposed)
