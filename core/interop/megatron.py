"""A checkpoint of Megatron-LM in its torch_dist format as a source of our tensors. Its pickles are read as plain values (plain_pickle.py)."""

import io
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from ..checkpoint import publish
from ..checkpoint.manifest import CheckpointError, intersect, is_plain_name
from ..config import FlagError, ModelConfig, wrong_types
from ..config.validate import model_problems
from ..layout import Box
from .hf_names import part_shapes
from .name_map import Place, Run
from .plain_pickle import read_plain

# Ours -> theirs; the second name is that of Transformer Engine's fused layers.
_LAYER = {
    "attention_norm": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "attention.q": ("self_attention.linear_qkv.",),
    "attention.k": ("self_attention.linear_qkv.",),
    "attention.v": ("self_attention.linear_qkv.",),
    "attention.q_norm": ("self_attention.q_layernorm.",),
    "attention.k_norm": ("self_attention.k_layernorm.",),
    "attention.out": ("self_attention.linear_proj.",),
    "mlp_norm": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    "mlp.gate": ("mlp.linear_fc1.",),
    "mlp.up": ("mlp.linear_fc1.",),
    "mlp.down": ("mlp.linear_fc2.",),
}
_ENDS = {
    "embedding.word": "embedding.word_embeddings.",
    "embedding.position": "embedding.position_embeddings.",
    "final_norm": "decoder.final_layernorm.",
    "head": "output_layer.",
}
# Arguments that change what a model computes in ways that are not built here: the values that can be read.
_ONLY = {
    "num_experts": (None,),
    "multi_latent_attention": (None, False),
    "qk_l2_norm": (None, False),
    "attention_output_gate": (None, False),
    "no_rope_freq": (None,),
    "rotary_seq_len_interpolation_factor": (None, 1, 1.0),
    "quick_geglu": (None, False),
    "glu_linear_offset": (None, 0, 0.0),
    "activation_func_clamp_value": (None,),
    "softmax_type": (None, "vanilla"),
    "apply_residual_connection_post_layernorm": (None, False),
    "fp32_residual_connection": (None, False),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "position_embedding_type": (None, "learned_absolute", "rope", "none"),
    "normalization": (None, "LayerNorm", "RMSNorm"),
}
_FLOATS = {
    item.name for item in fields(ModelConfig) if float in (get_args(item.type) or (item.type,))
}
_MODEL = ("embedding.", "decoder.", "output_layer.")  # what the names of weights begin with
# Arguments that mean what our field of the same name means.
_SAME = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention max_position_embeddings
    position_embedding_type rotary_base rotary_percent rotary_interleaved use_rope_scaling rope_scaling_factor normalization apply_layernorm_1p
    softmax_scale swiglu squared_relu add_qkv_bias qk_layernorm untie_embeddings_and_output_weights make_vocab_size_divisible_by init_method_std
    attention_dropout hidden_dropout
""".split()


class _Chunk(NamedTuple):
    """A box of a tensor, and where the torch.save of it lies."""

    box: Box
    file: str
    start: int
    length: int


class MegatronDist:
    """The weights of SAVE or SAVE/iter_N, `config` and `vocab_size` in our terms; optimizer state is left out.

    The vocabulary is the --vocab-size given, or all rows there are, padding included. Raises CheckpointError for a folder that is not
    torch_dist, an architecture that is not built here, and where tensors are missing.
    """

    def __init__(self, path: Path, vocab_size: int | None = None):
        self.folder = _iteration_folder(Path(path))
        metadata, arguments = read_plain(self.folder / ".metadata"), _arguments(self.folder)
        self._chunks = _chunks(metadata, self.folder)
        self.config = _config(arguments)
        padded = self._size("embedding.word_embeddings.weight")[0]
        self.vocab_size = vocab_size or padded
        if not 0 < self.vocab_size <= padded:
            raise FlagError(
                f"--vocab-size {vocab_size} is more than the {padded} rows of the embedding in {self.folder}"
            )
        self._shapes = part_shapes(self.config, self.vocab_size)
        self._places = {name: self._place(name, shape) for name, shape in self._shapes.items()}
        self._check_consumed()

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        place = self._places[name][0]
        return self._load(self._chunks[place.name][0]).dtype

    def read(self, name: str) -> torch.Tensor:
        place, prefix = self._places[name]
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=self.dtype(name))
        for start, stop, box in place.boxes(tuple((0, size) for size in shape)):
            self._fill(tensor[start:stop], place.name, (*prefix, *box))
        return tensor

    def _check_consumed(self) -> None:
        """Raises CheckpointError for weights, or rows of one, that no part of ours is made of, but for the padding of the vocabulary."""
        rows: dict[str, int] = defaultdict(int)
        layers: dict[str, set[int]] = defaultdict(set)
        for part, (place, prefix) in self._places.items():
            if not prefix or part.startswith(
                "layers.0."
            ):  # a tensor of all layers is cut alike in each
                rows[place.name] += sum(run.count for run in place.runs)
            layers[place.name].update(range(*prefix[0]) if prefix else ())
        for name in self._chunks:
            if not name.startswith(_MODEL) or name.endswith("_extra_state"):
                continue
            if name not in rows:
                raise CheckpointError(
                    f"{self.folder} holds {name}, which the model of its arguments does not have"
                )
            whole = self._size(name)
            held = whole[len(layers[name]) > 0 :]
            if layers[name] and len(layers[name]) != whole[0]:
                raise CheckpointError(
                    f"{self.folder}: {name} holds {whole[0]} layers, its arguments say {len(layers[name])}"
                )
            if rows[name] != held[0] and not (
                name.startswith(("embedding.word", "output_layer")) and rows[name] < held[0]
            ):
                raise CheckpointError(
                    f"{self.folder}: {name} has {held[0]} rows, the model of its arguments {rows[name]}"
                )

    def _fill(self, target: torch.Tensor, name: str, box: Box) -> None:
        target, filled = target.view([stop - start for start, stop in box]), 0
        for chunk in self._chunks[name]:
            common = intersect(chunk.box, box)
            if common is not None:
                source = self._load(chunk)[_within(common, chunk.box)]
                target[_within(common, box)] = source
                filled += source.numel()
        if filled != target.numel():
            raise CheckpointError(
                f"{self.folder}: {filled} of {target.numel()} elements of {name} are there"
            )

    def _load(self, chunk: _Chunk) -> torch.Tensor:
        with (self.folder / chunk.file).open("rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.length)
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:  # whatever is in there, PyTorch's safe reader has refused it
            raise CheckpointError(
                f"{self.folder / chunk.file} holds no tensor of torch.save's at byte {chunk.start}"
            ) from None
        if (
            not isinstance(tensor, torch.Tensor)
            or not tensor.is_floating_point()
            or tensor.shape != tuple(stop - start for start, stop in chunk.box)
        ):
            raise CheckpointError(
                f"{self.folder / chunk.file} does not hold the tensor at {chunk.start} that its metadata says"
            )
        return tensor

    def _place(self, part: str, shape: tuple[int, ...]) -> tuple[Place, Box]:
        """Where a part lies, and the place of its layer in a tensor that holds all layers."""
        stem, _, kind = part.rpartition(".")
        if not stem.startswith("layers."):
            name = _ENDS[stem] + kind
            return self._checked(Place(name, self._size(name), (Run(0, 0, shape[0]),)), shape), ()
        _, layer, inside = stem.split(".", 2)
        for theirs in _LAYER.get(inside, ()):
            for name, prefix in (
                (f"decoder.layers.{layer}.{theirs}{kind}", ()),
                (f"decoder.layers.{theirs}{kind}", ((int(layer), int(layer) + 1),)),
            ):
                if name in self._chunks:
                    whole = self._size(name)[len(prefix) :]
                    return self._checked(
                        Place(name, whole, self._runs(inside, shape[0])), shape
                    ), prefix
        raise CheckpointError(f"{self.folder} has no {part} under any name of Megatron's")

    def _checked(self, place: Place, shape: tuple[int, ...]) -> Place:
        last = max(run.theirs + run.count for run in place.runs)
        if len(place.shape) != len(shape) or place.shape[1:] != shape[1:] or last > place.shape[0]:
            raise CheckpointError(
                f"{self.folder}: {place.name} is {list(place.shape)}, its arguments make a part of it {list(shape)}"
            )
        return place

    def _runs(self, inside: str, rows: int) -> tuple[Run, ...]:
        """The fused query, key and value rows lie group by group, gate and up one after the other."""
        config, size = self.config, self.config.head_size
        each = config.num_attention_heads // config.num_kv_heads
        first = {
            "attention.q": (0, each),
            "attention.k": (each, 1),
            "attention.v": (each + 1, 1),
        }.get(inside)
        if first is not None:
            before, count = first[0] * size, first[1] * size
            return tuple(
                Run(group * count, group * (each + 2) * size + before, count)
                for group in range(config.num_kv_heads)
            )
        return (Run(0, rows if inside == "mlp.up" and config.gated else 0, rows),)

    def _size(self, name: str) -> tuple[int, ...]:
        if name not in self._chunks:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return tuple(
            max(chunk.box[dim][1] for chunk in self._chunks[name])
            for dim in range(len(self._chunks[name][0].box))
        )


def _iteration_folder(path: Path) -> Path:
    if (path / ".metadata").is_file():
        return path
    iteration = publish.tracked_iteration(path)
    if iteration is None:
        raise CheckpointError(
            f"{path} has neither .metadata nor {publish.TRACKER}: it is no torch_dist checkpoint"
        )
    folder = path / publish.folder_name(iteration)
    if not (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} has no .metadata: only --ckpt-format torch_dist can be read; docs/hugging_face.md says how to get there"
        )
    return folder


def _chunks(metadata: Any, folder: Path) -> dict[str, list[_Chunk]]:
    """Every stored box of every tensor. The metadata is torch.distributed.checkpoint's."""
    try:
        sizes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, entry in metadata.state_dict_metadata.items()
            for chunk in getattr(entry, "chunks", ())
        }
        found: dict[str, list[_Chunk]] = defaultdict(list)
        for index, info in metadata.storage_data.items():
            offsets = None if index.offset is None else tuple(index.offset)
            if (index.fqn, offsets) in sizes:
                if not is_plain_name(info.relative_path):
                    raise CheckpointError(
                        f"{folder / '.metadata'} names the file {info.relative_path!r}, which is no plain name"
                    )
                box = tuple(
                    (start, start + size)
                    for start, size in zip(offsets, sizes[index.fqn, offsets], strict=True)
                )
                if not all(
                    type(number) is int and number >= 0
                    for number in (*sum(box, ()), info.offset, info.length)
                ):
                    raise CheckpointError(
                        f"{folder / '.metadata'} has a box or a place of {index.fqn} that is no whole numbers"
                    )
                found[index.fqn].append(_Chunk(box, info.relative_path, info.offset, info.length))
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder / '.metadata'} is not that of torch.distributed.checkpoint: {error}"
        ) from None
    return found


def _arguments(folder: Path) -> dict[str, Any]:
    common = read_plain(folder / "common.pt")
    arguments = getattr(common.get("args") if isinstance(common, dict) else None, "__dict__", None)
    if not arguments:
        raise CheckpointError(f"{folder / 'common.pt'} holds no args of Megatron-LM's")
    return arguments


def _config(arguments: dict[str, Any]) -> ModelConfig:
    for name, readable in _ONLY.items():
        if arguments.get(name) not in readable:
            raise CheckpointError(
                f"Megatron's argument {name} is {arguments[name]!r}: only {', '.join(map(str, readable))} can be read"
            )
    values = {name: arguments[name] for name in _SAME if arguments.get(name) is not None}
    values |= {
        "norm_epsilon": arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)),
        "disable_bias_linear": not arguments.get("add_bias_linear", True),
        "num_query_groups": (arguments.get("num_query_groups") or 1)
        if arguments.get("group_query_attention")
        else 1,
        # Megatron's fused GELU is the approximation, its plain one is exact.
        "exact_gelu": not (
            arguments.get("swiglu")
            or arguments.get("squared_relu")
            or arguments.get("bias_gelu_fusion", True)
        ),
    }
    if arguments.get("window_size") is not None:
        values |= {"window_size": ",".join(map(str, arguments["window_size"]))}
        frequency = arguments.get("window_attn_skip_freq")
        values |= (
            {} if frequency is None else {"window_attn_skip_freq": str(frequency).replace(" ", "")}
        )
    values = {
        name: float(value) if name in _FLOATS and type(value) is int else value
        for name, value in values.items()
    }
    config = ModelConfig(**values)
    if config.kv_channels is None and config.hidden_size and config.num_attention_heads:
        config = replace(config, kv_channels=config.hidden_size // config.num_attention_heads)
    if problems := wrong_types(config) or model_problems(config):
        raise CheckpointError(
            f"the args of Megatron-LM's are those of no model here: {'; '.join(problems)}"
        )
    missing = [
        name
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        if getattr(config, name) is None
    ]
    if missing:
        raise CheckpointError(f"the args of Megatron-LM's lack {', '.join(missing)}")
    return config


def _within(box: Box, frame: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, frame, strict=True)
    )
