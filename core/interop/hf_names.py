"""The names of tensors in Hugging Face folders, family by family.

A family whose tensors are named as Llama's needs nothing here. Another one gets a row in _NAMES.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import ModelConfig
from ..model.shape import parameter_shapes
from .families import family_of
from .name_map import Correspondence, Run

_QUERY_KEY_VALUE = ("attention.q", "attention.k", "attention.v")


@dataclass(frozen=True)
class Names:
    """The names that a family gives to its tensors.

    layers: what stands before the number of a layer
    inside: our names inside a layer -> theirs. Several of ours under one name are fused, in order
    ends: our names outside the layers -> theirs
    by_head: what is fused goes head by head: q, k, v of head 0, q, k, v of head 1, ...
    transposed: matrices inside the layers are stored as [columns, rows]
    """

    layers: str
    inside: Mapping[str, str]
    ends: Mapping[str, str]
    by_head: bool = False
    transposed: bool = False

    def of(self, part: str) -> str:
        """Return the name of the tensor that holds our part."""
        stem, _, kind = part.rpartition(".")
        if not stem.startswith("layers."):
            return f"{self.ends[stem]}.{kind}"
        _, layer, inside = stem.split(".", 2)
        return f"{self.layers}{layer}.{self.inside[inside]}.{kind}"


_LLAMA = Names(
    layers="model.layers.",
    inside={
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
    },
    ends={
        "embedding.word": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
)
_GEMMA = replace(_LLAMA, inside={**_LLAMA.inside, "mlp_norm": "pre_feedforward_layernorm"})
_PHI3 = replace(
    _LLAMA,
    inside={
        **_LLAMA.inside,
        **dict.fromkeys(_QUERY_KEY_VALUE, "self_attn.qkv_proj"),
        **dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
    },
)
_GPT2 = Names(
    layers="transformer.h.",
    inside={
        "attention_norm": "ln_1",
        **dict.fromkeys(_QUERY_KEY_VALUE, "attn.c_attn"),
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    ends={
        "embedding.word": "transformer.wte",
        "embedding.position": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    transposed=True,  # transformers kept OpenAI's Conv1D, whose weight is [columns, rows]
)
_NEOX = Names(
    layers="gpt_neox.layers.",
    inside={
        "attention_norm": "input_layernorm",
        **dict.fromkeys(_QUERY_KEY_VALUE, "attention.query_key_value"),
        "attention.out": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    ends={
        "embedding.word": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    by_head=True,
)
# model_type -> names. All other families are named as Llama.
_NAMES = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "phi3": _PHI3,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


def hf_correspondences(config: ModelConfig, vocab_size: int) -> dict[str, Correspondence]:
    """Return where each of our parts lies in a folder of the model's family, in model order.

    Raises ValueError where no family has such a model.
    """
    names = _NAMES.get(family_of(config).model_type, _LLAMA)
    return _correspondences(names, config, vocab_size)


def nanogpt_correspondences(config: ModelConfig, vocab_size: int) -> dict[str, Correspondence]:
    """Return where each of our parts lies in a nanoGPT checkpoint.

    It has GPT-2's names, with matrices the usual way round.
    """
    return _correspondences(replace(_GPT2, transposed=False), config, vocab_size)


def part_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return every part of a whole model, in its order, with its global shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameter_shapes(config, vocab_size):
        for part in parameter.parts:
            shapes[part.name] = part.shape
    return shapes


def _correspondences(
    names: Names, config: ModelConfig, vocab_size: int
) -> dict[str, Correspondence]:
    shapes = part_shapes(config, vocab_size)
    fused: dict[str, list[str]] = {}  # their name -> our parts in it, in order
    for part in shapes:
        fused.setdefault(names.of(part), []).append(part)
    found = {}
    for part, shape in shapes.items():
        name = names.of(part)
        together = fused[name]
        whole = (sum(shapes[other][0] for other in together), *shape[1:])
        is_matrix = len(shape) == 2 and part.startswith("layers.")
        transposed = names.transposed and is_matrix
        if names.by_head and len(together) > 1:
            runs = _runs_by_head(together.index(part), len(together), shape[0], config.head_size)
        else:
            before = together[: together.index(part)]
            first = sum(shapes[other][0] for other in before)
            runs = (Run(0, first, shape[0]),)
        their_shape = whole[::-1] if transposed else whole
        found[part] = Correspondence(name, their_shape, runs, transposed)
    return found


def _runs_by_head(index: int, count: int, rows: int, head_size: int) -> tuple[Run, ...]:
    """Return the rows of the `index`-th of `count` parts that are fused head by head."""
    heads = range(rows // head_size)
    return tuple(
        Run(head * head_size, (head * count + index) * head_size, head_size) for head in heads
    )
