"""What --load takes over from a checkpoint, mode by mode, and the schedule of a cooldown."""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ..checkpoint import publish
from ..checkpoint.manifest import CheckpointError, read_text
from ..checkpoint.part import CONFIG_FILE
from ..config import CheckpointConfig, Config, ConfigError
from ..config.flags import read_config
from ..optim.schedule import learning_rate


@dataclass(frozen=True)
class Restored:
    """What is restored; the rest is as in a run that begins. `moments`: with the optimizer's step count and the loss scale.

    `place`: the iteration, and so the place in the learning-rate schedule.
    """

    weights: bool
    moments: bool
    place: bool
    data: bool


MODES = {
    "continue": Restored(weights=True, moments=True, place=True, data=True),
    "model_only": Restored(weights=True, moments=False, place=False, data=False),
    "model_data": Restored(weights=True, moments=False, place=False, data=True),
    "model_opt_data": Restored(weights=True, moments=True, place=False, data=True),
    "optimizer_only": Restored(weights=False, moments=True, place=False, data=False),
    "transfer": Restored(weights=True, moments=True, place=False, data=False),
    "transfer_with_lr": Restored(weights=True, moments=True, place=True, data=False),
    "cooldown": Restored(weights=True, moments=True, place=True, data=True),
}


def load_mode(config: CheckpointConfig) -> str:
    """The mode asked for; --finetune is Megatron's word for model_only."""
    return config.load_mode or ("model_only" if config.finetune else "continue")


def restored_by(config: CheckpointConfig) -> Restored:
    """What the flags ask for."""
    restored = MODES[load_mode(config)]
    return replace(restored, moments=restored.moments and not config.no_load_optim)


def table(restored: Restored, *, scaled: bool) -> list[str]:
    """A line for each thing that makes up a run: restored or fresh. scaled: whether the run has a dynamic loss scale."""
    word = {True: "restored", False: "fresh"}
    rows = {
        "weights": word[restored.weights],
        "moments and their step count": word[restored.moments],
        "loss scale": word[restored.moments] if scaled else "constant",
        "iteration and schedule": word[restored.place],
        "data position": word[restored.data],
        "random state": "a function of seed, iteration and sample: nothing is stored, and --no-load-rng changes nothing",
    }
    return [f"   {name:30}{said}" for name, said in rows.items()]


def with_cooldown(config: Config) -> tuple[Config, list[str]]:
    """A resolved configuration whose schedule is the cooldown that --load-mode cooldown asks for, and the problems in making it.

    From the rate r that the schedule of the checkpoint has after its S iterations, down to --min-lr over N = --cooldown-iters, in the
    shape of --lr-wsd-decay-style, until iteration S + N. That is a WSD schedule whose stable phase ends at S. Any other mode, and a
    checkpoint that is not there (load_problems says so), leaves the configuration as it is.
    """
    asked, length = config.checkpoint, config.checkpoint.cooldown_iters
    if load_mode(asked) != "cooldown" or not asked.load or not length or length <= 0:
        return config, []
    try:
        tries = publish.candidates(Path(asked.load), asked.ckpt_step)
        if not tries:
            return config, []
        start, folder = tries[0], publish.locate(Path(asked.load), tries[0])
        rate = _rate_after(start, folder)
    except CheckpointError as error:
        return config, [f"--load {asked.load}: {error}"]
    if rate <= 0 or config.optimizer.min_lr > rate:
        least = f"below --min-lr {config.optimizer.min_lr}" if rate > 0 else "at its end"
        return config, [
            f"--load-mode cooldown: the rate of {folder} is {rate}, {least}; choose an earlier one by --ckpt-step"
        ]
    schedule = replace(
        config.optimizer,
        lr=rate,
        lr_decay_style="WSD",
        lr_decay_iters=start + length,
        lr_wsd_decay_iters=length,
        lr_warmup_iters=0,
        lr_warmup_fraction=None,
        lr_warmup_init=0.0,
    )
    return replace(
        config,
        optimizer=schedule,
        batch=replace(config.batch, train_iters=start + length, train_samples=None),
    ), []


def _rate_after(iteration: int, folder: Path) -> float:
    """The rate at which the run that wrote `folder` would have gone on."""
    schedule = saved_config(folder).optimizer
    if schedule.lr is None or schedule.lr_decay_iters is None:
        raise CheckpointError(f"{folder / CONFIG_FILE} has no schedule")
    return learning_rate(schedule, iteration)


def to_go_on_with(config: Config) -> Config:
    """The configuration to save beside a checkpoint, with which --load resumes it: without what was about this run's own beginning."""
    begun = replace(
        config.checkpoint,
        ckpt_step=None,
        load_mode=None,
        cooldown_iters=None,
        finetune=False,
        no_load_optim=False,
    )
    return replace(config, checkpoint=begun)


def saved_config(folder: Path) -> Config:
    """The configuration beside a checkpoint. Raises CheckpointError where there is none that can be read."""
    return parse_config(read_text(folder / CONFIG_FILE), folder)


def parse_config(text: str, folder: Path) -> Config:
    """The configuration that was saved in `folder`, from its text. Raises CheckpointError where it is none."""
    try:
        return read_config(text)
    except (yaml.YAMLError, ConfigError, ValueError, RecursionError) as error:
        reason = (
            "; ".join(error.problems)
            if isinstance(error, ConfigError)
            else " ".join(str(error).split())
        )
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is no configuration: {reason.replace('config.yaml', '', 1)}"
        ) from error
