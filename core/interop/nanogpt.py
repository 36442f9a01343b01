"""A nanoGPT checkpoint (ckpt.pt) as a source of our tensors. It is a pickle: only PyTorch's unpickler of plain values and tensors reads it."""

from pathlib import Path
from pickle import UnpicklingError

import torch

from ..checkpoint.manifest import CheckpointError
from ..config import ModelConfig, wrong_types
from ..config.validate import model_problems
from .hf_names import nanogpt_places, part_shapes

FILE_NAME = "ckpt.pt"
_COMPILED = "_orig_mod."  # torch.compile's prefix
_HEAD, _MASK = (
    "lm_head.weight",
    ".attn.bias",
)  # the head is the embedding; old versions kept the causal mask


class NanoGPT:
    """The weights of ckpt.pt, `config` and `vocab_size` in our terms; the optimizer's state is left out.

    Norms without bias get one of zero. Raises CheckpointError for a file that holds other objects than numbers, text, containers and
    tensors, which are code, and for one that is no nanoGPT checkpoint.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / FILE_NAME
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} is missing") from None
        except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = (
                "it holds other objects, which are code"
                if isinstance(error, UnpicklingError)
                else "it is no file of torch.save's"
            )
            raise CheckpointError(
                f"{self.path} cannot be read as plain values and tensors: {reason}"
            ) from None
        try:
            self.config, self.vocab_size = _config(held["model_args"])
            self._tensors = {
                name.removeprefix(_COMPILED): tensor for name, tensor in held["model"].items()
            }
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.path} is no nanoGPT checkpoint: {error} is missing or of the wrong kind"
            ) from None
        if problems := wrong_types(self.config) or model_problems(self.config):
            raise CheckpointError(f"{self.path}: {'; '.join(problems)}")
        if type(self.vocab_size) is not int or self.vocab_size < 1:
            raise CheckpointError(f"{self.path}: vocab_size is {self.vocab_size!r}")
        self._places, self._shapes = (
            nanogpt_places(self.config, self.vocab_size),
            part_shapes(self.config, self.vocab_size),
        )
        self._check()

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors["transformer.wte.weight"].dtype

    def read(self, name: str) -> torch.Tensor:
        place = self._places[name]
        if place.name not in self._tensors:  # the bias of a norm that has none
            return torch.zeros(self._shapes[name], dtype=self.dtype(name))
        (run,) = place.runs
        return self._tensors[place.name][run.theirs : run.theirs + run.count]

    def _check(self) -> None:
        wanted = {place.name: place.shape for place in self._places.values()}
        optional = (
            {place.name for part, place in self._places.items() if part.endswith("norm.bias")}
            if self.config.disable_bias_linear
            else set()
        )
        for name, shape in wanted.items():
            tensor = self._tensors.get(name)
            if tensor is not None and not (
                isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            ):
                raise CheckpointError(f"{self.path}: {name} is no tensor of floating-point numbers")
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape and not (found is None and name in optional):
                raise CheckpointError(
                    f"{self.path}: {name} is {found and list(found)}, its model_args make it {list(shape)}"
                )
        head = self._tensors.get(_HEAD)
        if head is not None and not torch.equal(head, self._tensors["transformer.wte.weight"]):
            raise CheckpointError(
                f"{self.path}: {_HEAD} is not the embedding that nanoGPT ties it to"
            )
        unknown = sorted(
            name
            for name in self._tensors
            if name not in wanted and name != _HEAD and not name.endswith(_MASK)
        )
        if unknown:
            raise CheckpointError(
                f"{self.path} holds {unknown[0]}, which nanoGPT's model does not have"
            )


def _config(args: dict) -> tuple[ModelConfig, int]:
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
