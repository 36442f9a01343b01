"""A checkpoint of Megatron-LM in its torch_dist format as a source of our tensors.

Such a folder has three kinds of files:

    common.pt       the arguments of the run, a pickle; they become our ModelConfig
    .metadata       a pickle of torch.distributed.checkpoint's: the boxes each tensor is stored in,
                    and for each box a file, where in it, and how many bytes
    __0_0.distcp    boxes of tensors one after another, each as torch.save writes it

The pickles are read as plain values (plain_pickle.py). A tensor is read box by box. Layers may be
stored one by one (decoder.layers.3.mlp...) or all in one tensor whose first dim is the layer
(decoder.layers.mlp...); a correspondence of ours therefore comes with the box of its layer.
"""

import io
from collections import defaultdict
from collections.abc import Mapping
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
from .name_map import Correspondence, Run, whole_box
from .plain_pickle import read_plain

# Ours -> theirs. The second name is that of Transformer Engine's fused layers.
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
_WORDS = "embedding.word_embeddings."
_ENDS = {
    "embedding.word": _WORDS,
    "embedding.position": "embedding.position_embeddings.",
    "final_norm": "decoder.final_layernorm.",
    "head": "output_layer.",
}
# Arguments that can ask for what is not built here: the values that can be read.
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
_PADDED = ("embedding.word", "output_layer")  # their rows may be more than the vocabulary
# Arguments that mean what our field of the same name means.
_SAME = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention
    max_position_embeddings position_embedding_type rotary_base rotary_percent rotary_interleaved
    use_rope_scaling rope_scaling_factor normalization apply_layernorm_1p softmax_scale swiglu
    squared_relu add_qkv_bias qk_layernorm untie_embeddings_and_output_weights
    make_vocab_size_divisible_by init_method_std attention_dropout hidden_dropout
""".split()


class _Chunk(NamedTuple):
    """A box of a tensor, and where the torch.save of it lies."""

    box: Box
    file: str
    start: int
    length: int


class _Found(NamedTuple):
    """The place of a part of ours: a correspondence within one layer, and the box of that layer.

    layer: ((3, 4),) in a tensor that holds all layers; () in one that holds a single layer
    """

    within: Correspondence
    layer: Box


class MegatronDist:
    """The weights of SAVE or SAVE/iter_N, without the optimizer's state.

    config: our configuration of its model
    vocab_size: the --vocab-size given, or all rows that are stored, padding included

    Raises CheckpointError for a folder that is not torch_dist, an architecture that is not built
    here, and tensors that are missing.
    """

    def __init__(self, path: Path, vocab_size: int | None = None):
        self.folder = _iteration_folder(Path(path))
        metadata = read_plain(self.folder / ".metadata")
        arguments = _arguments(self.folder)
        self._chunks = _chunks(metadata, self.folder)
        self.config = _config(arguments)
        padded = self._size(_WORDS + "weight")[0]
        self.vocab_size = vocab_size or padded
        if not 0 < self.vocab_size <= padded:
            raise FlagError(
                f"--vocab-size {vocab_size} is more than the {padded} rows of the embedding "
                f"in {self.folder}"
            )
        self._shapes = part_shapes(self.config, self.vocab_size)
        self._found = {name: self._find(name, shape) for name, shape in self._shapes.items()}
        self._check_consumed()

    def names(self) -> list[str]:
        """Return our names, in the order of the model."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of our tensor `name`."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return what our tensor `name` is stored in."""
        found = self._found[name].within
        return self._load(self._chunks[found.name][0]).dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor of ours on the CPU."""
        found, layer = self._found[name]
        tensor = torch.empty(self._shapes[name], dtype=self.dtype(name))
        for start, stop, theirs in found.overlaps(whole_box(self._shapes[name])):
            self._fill(tensor[start:stop], found.name, (*layer, *theirs))
        return tensor

    def _check_consumed(self) -> None:
        """Raise CheckpointError for weights, or rows of one, that no part of ours is made of.

        Rows of padding, past the vocabulary, are no part of the model.
        """
        rows: dict[str, int] = defaultdict(int)  # of a tensor: how many of its rows are read
        layers: dict[str, set[int]] = defaultdict(set)  # of a tensor: which of its layers are read
        for part, (found, layer) in self._found.items():
            # A tensor of all layers is cut alike in each: its rows are counted in the first.
            if not layer or part.startswith("layers.0."):
                rows[found.name] += sum(run.num_rows for run in found.runs)
            for bounds in layer:
                layers[found.name].update(range(*bounds))
        for name in self._chunks:
            if not name.startswith(_MODEL) or name.endswith("_extra_state"):
                continue
            if name not in rows:
                raise CheckpointError(
                    f"{self.folder} holds {name}, which the model of its arguments does not have"
                )
            self._check_size(name, rows[name], len(layers[name]))

    def _check_size(self, name: str, num_rows: int, num_layers: int) -> None:
        """Compare a stored tensor with the rows, and the layers, that are read of it.

        num_layers: 0 for a tensor that holds a single layer
        """
        size = self._size(name)
        if num_layers and num_layers != size[0]:
            raise CheckpointError(
                f"{self.folder}: {name} holds {size[0]} layers, its arguments say {num_layers}"
            )
        held = size[1] if num_layers else size[0]
        is_padding = name.startswith(_PADDED) and num_rows < held
        if num_rows != held and not is_padding:
            raise CheckpointError(
                f"{self.folder}: {name} has {held} rows, the model of its arguments {num_rows}"
            )

    def _fill(self, target: torch.Tensor, name: str, box: Box) -> None:
        """Copy a box of a stored tensor from all chunks that have some of it."""
        target = target.view([stop - start for start, stop in box])
        filled = 0
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
        """Return the tensor of one chunk: what torch.save wrote, inside a file of many."""
        path = self.folder / chunk.file
        with path.open("rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.length)
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:  # whatever is in there, PyTorch's safe reader has refused it
            raise CheckpointError(
                f"{path} holds no tensor of torch.save's at byte {chunk.start}"
            ) from None
        shape = tuple(stop - start for start, stop in chunk.box)
        is_weight = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if not is_weight or tensor.shape != shape:
            raise CheckpointError(
                f"{path} does not hold the tensor at {chunk.start} that its metadata says"
            )
        return tensor

    def _find(self, part: str, shape: tuple[int, ...]) -> _Found:
        """Return where a part of ours, of this shape, lies."""
        stem, _, kind = part.rpartition(".")
        if not stem.startswith("layers."):
            name = _ENDS[stem] + kind
            whole = Correspondence(name, self._size(name), (Run(0, 0, shape[0]),))
            return _Found(self._checked(whole, shape), ())
        _, layer, inside = stem.split(".", 2)
        runs = self._runs(inside, shape[0])
        # Megatron's own layers and Transformer Engine's have different names for norms, and either
        # may be stored layer by layer or stacked: the first combination that is there is meant.
        for theirs in _LAYER.get(inside, ()):
            single = f"decoder.layers.{layer}.{theirs}{kind}"
            if single in self._chunks:
                found = Correspondence(single, self._size(single), runs)
                return _Found(self._checked(found, shape), ())
            stacked = f"decoder.layers.{theirs}{kind}"
            if stacked in self._chunks:
                found = Correspondence(stacked, self._size(stacked)[1:], runs)
                return _Found(self._checked(found, shape), ((int(layer), int(layer) + 1),))
        raise CheckpointError(f"{self.folder} has no {part} under any name of Megatron's")

    def _checked(self, found: Correspondence, shape: tuple[int, ...]) -> Correspondence:
        """Return a correspondence. Raises CheckpointError for one that is outside of the tensor."""
        last = max(run.theirs + run.num_rows for run in found.runs)
        fits = len(found.shape) == len(shape) and found.shape[1:] == shape[1:]
        if not fits or last > found.shape[0]:
            raise CheckpointError(
                f"{self.folder}: {found.name} is {list(found.shape)}, "
                f"its arguments make a part of it {list(shape)}"
            )
        return found

    def _runs(self, inside: str, rows: int) -> tuple[Run, ...]:
        """Return where the rows of a part inside a layer lie in Megatron's tensor.

        Query, key and value are fused group by group: the query heads that share a key-value head,
        then that key head, then that value head. Gate and up lie one after the other.
        """
        config = self.config
        groups, size = config.num_kv_heads, config.head_size
        queries = config.num_attention_heads // groups
        heads_before = {"attention.q": 0, "attention.k": queries, "attention.v": queries + 1}
        if inside in heads_before:
            before = heads_before[inside] * size
            num_rows = (queries if inside == "attention.q" else 1) * size
            group_rows = (queries + 2) * size
            return tuple(
                Run(group * num_rows, group * group_rows + before, num_rows)
                for group in range(groups)
            )
        is_second = inside == "mlp.up" and config.gated
        return (Run(0, rows if is_second else 0, rows),)

    def _size(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor: how far its chunks reach."""
        if name not in self._chunks:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        boxes = [chunk.box for chunk in self._chunks[name]]
        return tuple(max(box[dim][1] for box in boxes) for dim in range(len(boxes[0])))


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
            f"{folder} has no .metadata: only --ckpt-format torch_dist can be read; "
            "docs/hugging_face.md says how to get there"
        )
    return folder


def _chunks(metadata: Any, folder: Path) -> dict[str, list[_Chunk]]:
    """Return every stored box of every tensor, as torch.distributed.checkpoint's metadata says."""
    # The plain reader gives objects without types: an attribute that is not there, or is no
    # sequence of numbers, shows as one of the errors below.
    path = folder / ".metadata"
    try:
        sizes = _sizes_of_boxes(metadata)
        found: dict[str, list[_Chunk]] = defaultdict(list)
        for index, info in metadata.storage_data.items():
            if index.offset is None:  # bytes of an object rather than a box of a tensor
                continue
            offsets = tuple(index.offset)
            size = sizes.get((index.fqn, offsets))
            if size is not None:
                found[index.fqn].append(_chunk(index.fqn, offsets, size, info, path))
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not that of torch.distributed.checkpoint: {error}"
        ) from None
    return found


def _sizes_of_boxes(metadata: Any) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
    """Return the size of each stored box by its tensor's name and its offsets."""
    return {
        (name, tuple(chunk.offsets)): tuple(chunk.sizes)
        for name, entry in metadata.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    }


def _chunk(
    name: str, offsets: tuple[int, ...], size: tuple[int, ...], info: Any, path: Path
) -> _Chunk:
    # A name with a slash or dots could lead out of the folder.
    if not is_plain_name(info.relative_path):
        raise CheckpointError(
            f"{path} names the file {info.relative_path!r}, which is no plain name"
        )
    box = tuple((start, start + length) for start, length in zip(offsets, size, strict=True))
    numbers = [*(number for bounds in box for number in bounds), info.offset, info.length]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path} has a box or a place of {name} that is no whole numbers")
    return _Chunk(box, info.relative_path, info.offset, info.length)


def _arguments(folder: Path) -> dict[str, Any]:
    path = folder / "common.pt"
    common = read_plain(path)
    stored = common.get("args") if isinstance(common, dict) else None
    arguments = getattr(stored, "__dict__", None)
    if not arguments:
        raise CheckpointError(f"{path} holds no args of Megatron-LM's")
    return arguments


def _config(arguments: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of the model that Megatron's arguments describe."""
    for name, readable in _ONLY.items():
        if arguments.get(name) not in readable:
            raise CheckpointError(
                f"Megatron's argument {name} is {arguments[name]!r}: "
                f"only {', '.join(map(str, readable))} can be read"
            )
    values = _values(arguments)
    # argparse gives 1 for --rotary-base 1; our fields are floats.
    for name in _FLOATS.intersection(values):
        if type(values[name]) is int:
            values[name] = float(values[name])
    config = ModelConfig(**values)
    if config.kv_channels is None and config.hidden_size and config.num_attention_heads:
        config = replace(config, kv_channels=config.hidden_size // config.num_attention_heads)
    if problems := wrong_types(config) or model_problems(config):
        raise CheckpointError(
            f"the args of Megatron-LM's are those of no model here: {'; '.join(problems)}"
        )
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    missing = [name for name in needed if getattr(config, name) is None]
    if missing:
        raise CheckpointError(f"the args of Megatron-LM's lack {', '.join(missing)}")
    return config


def _values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig that Megatron's arguments say."""
    said = arguments.get
    values = {name: arguments[name] for name in _SAME if said(name) is not None}
    values["norm_epsilon"] = said("norm_epsilon", said("layernorm_epsilon", 1e-5))
    values["disable_bias_linear"] = not said("add_bias_linear", True)
    groups = said("num_query_groups") if said("group_query_attention") else None
    values["num_query_groups"] = groups or 1
    # Megatron's fused GELU is the approximation, its plain one is exact.
    has_gelu = not said("swiglu") and not said("squared_relu")
    values["exact_gelu"] = has_gelu and not said("bias_gelu_fusion", True)
    window, frequency = said("window_size"), said("window_attn_skip_freq")
    if window is not None:
        values["window_size"] = ",".join(map(str, window))
        if frequency is not None:
            values["window_attn_skip_freq"] = str(frequency).replace(" ", "")
    return values


def _within(box: Box, frame: Box) -> tuple[slice, ...]:
    """Return a box counted from the first element of the frame around it."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, frame, strict=True)
    )
