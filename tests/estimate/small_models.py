"""Small models of every family, as command lines, and their configurations."""

import runs
import torch

from trivium.config import Config, flags, resolve
from trivium.config.presets import PRESETS
from trivium.config.validate import validate

CPU = torch.device("cpu")
VOCAB = 100
RUN = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --micro-batch-size 2 "
    "--global-batch-size 32 --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer "
    "--vocab-size 99 --mock-data --device cpu --make-vocab-size-divisible-by 16 "
    "--attention-dropout 0 --hidden-dropout 0 "
)
GPT2 = ""  # learned positions, LayerNorm, GELU, every bias, tied
LLAMA = f"--ffn-hidden-size 160{runs.LLAMA} "
TIED = LLAMA.replace("--untie-embeddings-and-output-weights", "")
TIED_GEGLU = TIED.replace("--swiglu", "--geglu")
QK = f"{TIED} --qk-layernorm --add-qkv-bias --rotary-percent 0.5 "
SOME_WINDOWS = "--window-size 15,0 --window-attn-skip-freq 2 --rotary-base-local 100 "
CAPPED = "--attn-logit-softcapping 50 --final-logit-softcapping 30 --scale-embeddings "
FAMILIES = {
    "gemma": f"{TIED_GEGLU} --apply-layernorm-1p --norm-placement both {CAPPED}{SOME_WINDOWS}",
    "mistral": f"{LLAMA}--window-size 15,0 ",
    "olmo": f"{LLAMA}--norm-placement post --qk-layernorm --qk-layernorm-width projection ",
    "gemma3": (
        f"{TIED_GEGLU} --apply-layernorm-1p --norm-placement both --qk-layernorm {SOME_WINDOWS}"
    ),
    "neox": (
        "--parallel-residual --exact-gelu --position-embedding-type rope --rotary-percent 0.5 "
        "--untie-embeddings-and-output-weights "
    ),
}


def config_of(line: str, world_size: int) -> Config:
    """Return the configuration of RUN and `line` on so many ranks."""
    config = resolve(flags.parse((RUN + line).split()).config, world_size)
    assert not validate(config, world_size)
    return config


def preset(name: str, world_size: int = 1, **values) -> Config:
    """Return the configuration of a preset."""
    return resolve(Config.of(PRESETS[name] | values), world_size)


def size_of(tensors) -> int:
    """Return the bytes of the storages behind the tensors, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
