"""Find why a checkpoint cannot be loaded: before anything is started, or when it is opened."""

from dataclasses import fields
from pathlib import Path

from ..checkpoint import publish
from ..checkpoint.load import Checkpoint
from ..checkpoint.manifest import CheckpointError
from ..config import CheckpointConfig, Config, ModelConfig
from ..interop.families import differences
from ..interop.hf_model import HFModel, is_hf_folder
from .load_modes import Restored, load_mode, parse_config

# What a run may change about its model and still be the same run. Learned positions are a tensor:
# their shape is checked when it is read.
MAY_CHANGE = {
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
}
# How contexts are made longer.
MAY_CHANGE_TO_FINETUNE = {"rotary_base", "use_rope_scaling", "rope_scaling_factor"}


def load_problems(model: ModelConfig, config: CheckpointConfig) -> list[str]:
    """Return why --load cannot work, without opening a checkpoint.

    A first launch that loads from its own --save folder, which is empty yet, is fine.
    """
    if not config.load:
        return []
    folder = Path(config.load)
    if is_hf_folder(folder):
        return _hf_load_problems(model, config, folder)
    if not config.exit_on_missing_checkpoint:
        return []
    try:
        found = publish.candidates(folder, config.ckpt_step)
    except CheckpointError as error:
        return [f"--load {config.load}: {error}"]
    if found or _is_folder(folder, config.save):
        return []
    remedy = "correct the path, or leave --load out to start from scratch"
    return [f"--load {config.load} holds no published checkpoint; {remedy}"]


def _is_folder(folder: Path, other: str | None) -> bool:
    """Return whether `other` is a path of the same folder; False if there is none."""
    if other is None:
        return False
    return folder.resolve() == Path(other).resolve()


def _hf_load_problems(model: ModelConfig, config: CheckpointConfig, folder: Path) -> list[str]:
    """Return why --load cannot work with a Hugging Face folder."""
    load = config.load  # as the user wrote it
    its_kind = f"{load} is a Hugging Face folder"
    shape = (model.num_layers, model.hidden_size, model.num_attention_heads)
    if None in shape:
        return [f"--load {its_kind}: its shape is given by --hf-config {load}"]
    if config.save_hf and _is_folder(folder, config.save_hf):
        problem = "would replace what --load reads; name another folder"
        return [f"--save-hf {config.save_hf} {problem}"]
    if config.load_mode not in (None, "model_only"):
        problem = f"{its_kind}, which holds weights alone; use model_only"
        return [f"--load-mode {config.load_mode}: {problem}"]
    if config.ckpt_step is not None:
        problem = f"{its_kind}, which holds no iterations; leave it out"
        return [f"--ckpt-step {config.ckpt_step}: {problem}"]
    try:
        found = HFModel(folder).config
        differ = differences(found, model)
    except CheckpointError as error:
        return [f"--load: {error}"]
    except ValueError:
        return []  # a flag that cannot be read, which validation has told of
    if not differ:
        return []
    problem = f"--load {load} is another model"
    return [f"{problem}: {'; '.join(differ)}; give --hf-config {load}"]


def check_checkpoint(checkpoint: Checkpoint, config: Config, restored: Restored) -> None:
    """Check that a checkpoint that was opened is what this run can go on with.

    Raises CheckpointError if it holds no optimizer state to restore, is not the one that a
    cooldown was planned from, or is of another model.
    """
    has_moments = any(name.startswith("optim.") for name in checkpoint.names())
    if restored.moments and not has_moments:
        remedy = "give --load-mode model_only, or --no-load-optim"
        raise CheckpointError(f"{checkpoint.folder} holds no optimizer state; {remedy}")
    _check_schedule(checkpoint, config)
    _check_model(checkpoint, config)


def _check_schedule(checkpoint: Checkpoint, config: Config) -> None:
    """Check that a cooldown begins at this checkpoint.

    Its schedule was made before the checkpoint was verified, from the newest one there is.
    """
    length = config.checkpoint.cooldown_iters
    if load_mode(config.checkpoint) != "cooldown" or length is None:
        return
    planned = config.batch.train_iters - length
    if checkpoint.iteration != planned:
        raise CheckpointError(
            f"the cooldown was planned from iteration {planned} of {config.checkpoint.load}, "
            f"which does not verify; --ckpt-step {checkpoint.iteration} cools down from the "
            "newest that does"
        )


def _check_model(checkpoint: Checkpoint, config: Config) -> None:
    """Check the model by its flags: weights of the same shapes can be those of another one."""
    saved = parse_config(checkpoint.config_yaml, checkpoint.folder).model
    free = set(MAY_CHANGE)
    if load_mode(config.checkpoint) == "model_only":
        free |= MAY_CHANGE_TO_FINETUNE
    differ = []
    for field in fields(ModelConfig):
        name = field.name
        before = getattr(saved, name)
        after = getattr(config.model, name)
        if name not in free and before != after:
            flag = name.replace("_", "-")
            differ.append(f"--{flag} was {before}, is {after}")
    if differ:
        problem = f"{checkpoint.folder} is of another model"
        remedy = "give the flags it was trained with"
        raise CheckpointError(f"{problem}: {'; '.join(differ)}; {remedy}")
