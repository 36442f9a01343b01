"""A nanoGPT checkpoint (ckpt.pt) as a source of our tensors.

It is a pickle, so only PyTorch's reader of plain values and tensors (weights_only) opens it.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..checkpoint.manifest import CheckpointError
from ..config import ModelConfig, wrong_types
from ..config.validate import model_problems
from .hf_names import nanogpt_correspondences, part_shapes
from .name_map import their_shapes

FILE_NAME = "ckpt.pt"
_COMPILED = "_orig_mod."  # torch.compile's prefix
_HEAD = "lm_head.weight"  # it is the embedding
_WORDS = "transformer.wte.weight"
_MASK = ".attn.bias"  # old versions kept the causal mask


class NanoGPT:
    """The weights of ckpt.pt, without the optimizer's state.

    config: our configuration of its model
    vocab_size: rows of its embedding

    Norms without bias get one of zero. Raises CheckpointError for a file that holds objects other
    than numbers, text, containers and tensors, and for one that is no nanoGPT checkpoint.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / FILE_NAME
        held = _load(self.path)
        try:
            self.config, self.vocab_size = _config(held["model_args"])
            named = held["model"].items()
            self._tensors = {name.removeprefix(_COMPILED): tensor for name, tensor in named}
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.path} is no nanoGPT checkpoint: {error} is missing or of the wrong kind"
            ) from None
        if problems := wrong_types(self.config) or model_problems(self.config):
            raise CheckpointError(f"{self.path}: {'; '.join(problems)}")
        if type(self.vocab_size) is not int or self.vocab_size < 1:
            raise CheckpointError(f"{self.path}: vocab_size is {self.vocab_size!r}")
        self._correspondences = nanogpt_correspondences(self.config, self.vocab_size)
        self._shapes = part_shapes(self.config, self.vocab_size)
        self._check()

    def names(self) -> list[str]:
        """Return our names, in the order of the model."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of our tensor `name`."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the checkpoint, which has one for all its weights."""
        return self._tensors[_WORDS].dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor of ours on the CPU."""
        found = self._correspondences[name]
        if found.name not in self._tensors:  # the bias of a norm that has none
            return torch.zeros(self._shapes[name], dtype=self.dtype(name))
        # Query, key and value are neighbouring rows of one tensor: a view of them, no copy.
        (run,) = found.runs
        return self._tensors[found.name][run.theirs : run.theirs + run.num_rows]

    def _check(self) -> None:
        """Raise CheckpointError unless the tensors are those of the model, and no others."""
        wanted = their_shapes(self._correspondences)
        # Without --bias nanoGPT's norms have none either; ours are LayerNorms with a bias.
        optional = set()
        if self.config.disable_bias_linear:
            biases = (part for part in self._shapes if part.endswith("norm.bias"))
            optional = {self._correspondences[part].name for part in biases}
        for name, shape in wanted.items():
            self._check_tensor(name, shape, name in optional)
        head = self._tensors.get(_HEAD)
        if head is not None and not torch.equal(head, self._tensors[_WORDS]):
            raise CheckpointError(
                f"{self.path}: {_HEAD} is not the embedding that nanoGPT ties it to"
            )
        others = sorted(set(self._tensors) - set(wanted) - {_HEAD})
        unknown = [name for name in others if not name.endswith(_MASK)]
        if unknown:
            raise CheckpointError(
                f"{self.path} holds {unknown[0]}, which nanoGPT's model does not have"
            )

    def _check_tensor(self, name: str, shape: tuple[int, ...], is_optional: bool) -> None:
        """Raise CheckpointError unless a tensor is there, or optional, in its shape, as floats."""
        tensor = self._tensors.get(name)
        if tensor is None:
            if not is_optional:
                raise CheckpointError(
                    f"{self.path}: {name} is None, its model_args make it {list(shape)}"
                )
            return
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{self.path}: {name} is no tensor of floating-point numbers")
        found = tuple(tensor.shape)
        if found != shape:
            raise CheckpointError(
                f"{self.path}: {name} is {list(found)}, its model_args make it {list(shape)}"
            )


def _load(path: Path) -> Any:
    """Return what a file of torch.save's holds. Tensors stay in the file until they are read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except UnpicklingError:
        reason = "it holds other objects, which are code"
    except (RuntimeError, EOFError, OSError):
        reason = "it is no file of torch.save's"
    raise CheckpointError(f"{path} cannot be read as plain values and tensors: {reason}")


def _config(args: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Return our configuration, and the vocabulary, of a checkpoint's model_args."""
    hidden, heads = args["n_embd"], args["n_head"]
    config = ModelConfig(
        num_layers=args["n_layer"],
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        max_position_embeddings=args["block_size"],
        exact_gelu=True,
        disable_bias_linear=not args["bias"],
        attention_dropout=args.get("dropout", 0.0),
        hidden_dropout=args.get("dropout", 0.0),
    )
    return config, args["vocab_size"]
