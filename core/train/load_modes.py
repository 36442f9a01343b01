"""Define the load modes: the state that --load takes over, and the schedule of a cooldown."""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ..checkpoint import publish
from ..checkpoint.manifest import CheckpointError, read_text
from ..checkpoint.rank_files import CONFIG_FILE
from ..config import CheckpointConfig, Config, ConfigError
from ..config.flags import read_config
from ..optim.schedule import learning_rate


@dataclass(frozen=True)
class Restored:
    """The parts of a run's state that are restored; the others are as in a run that begins.

    weights: the parameters.
    moments: the optimizer's moments, its count of updates and the loss scale.
    schedule: the iteration, and with it the place in the learning-rate schedule.
    data: the samples consumed, and the order that they come in.
    """

    weights: bool
    moments: bool
    schedule: bool
    data: bool


MODES = {
    "continue": Restored(weights=True, moments=True, schedule=True, data=True),
    "model_only": Restored(weights=True, moments=False, schedule=False, data=False),
    "model_data": Restored(weights=True, moments=False, schedule=False, data=True),
    "model_opt_data": Restored(weights=True, moments=True, schedule=False, data=True),
    "optimizer_only": Restored(weights=False, moments=True, schedule=False, data=False),
    "transfer": Restored(weights=True, moments=True, schedule=False, data=False),
    "transfer_with_lr": Restored(weights=True, moments=True, schedule=True, data=False),
    "cooldown": Restored(weights=True, moments=True, schedule=True, data=True),
}


def load_mode(config: CheckpointConfig) -> str:
    """Return the mode asked for; --finetune is Megatron's word for model_only."""
    return config.load_mode or ("model_only" if config.finetune else "continue")


def restored_by(config: CheckpointConfig) -> Restored:
    """Return what the flags ask to restore."""
    restored = MODES[load_mode(config)]
    return replace(restored, moments=restored.moments and not config.no_load_optim)


def table(restored: Restored, *, scaled: bool) -> list[str]:
    """Return a line for each thing that makes up a run: restored or fresh.

    scaled: the run has a dynamic loss scale.
    """
    word = {True: "restored", False: "fresh"}
    rows = {
        "weights": word[restored.weights],
        "moments and their step count": word[restored.moments],
        "loss scale": word[restored.moments] if scaled else "constant",
        "iteration and schedule": word[restored.schedule],
        "data position": word[restored.data],
        "random state": "a function of seed, iteration and sample: nothing is stored, "
        "and --no-load-rng changes nothing",
    }
    return [f"   {name:30}{said}" for name, said in rows.items()]


def with_cooldown(config: Config) -> tuple[Config, list[str]]:
    """Give a resolved configuration the schedule of --load-mode cooldown.

    The rate falls from r, which the schedule of the checkpoint has after its S iterations, to
    --min-lr over N = --cooldown-iters, in the shape of --lr-wsd-decay-style, until iteration
    S + N. That is a WSD schedule whose stable phase ends at S.

    Returns the configuration, and the problems in making it. In any other mode, and where the
    checkpoint does not exist (load_problems reports that), the configuration is as it was.
    """
    asked, length = config.checkpoint, config.checkpoint.cooldown_iters
    if load_mode(asked) != "cooldown" or not asked.load or not length or length <= 0:
        return config, []
    root = Path(asked.load)
    try:
        # The newest checkpoint; whether it verifies shows only when it is opened.
        tries = publish.candidates(root, asked.ckpt_step)
        if not tries:
            return config, []
        start = tries[0]
        folder = publish.locate(root, start)
        rate = _rate_after(start, folder)
    except CheckpointError as error:
        return config, [f"--load {asked.load}: {error}"]
    if rate <= 0 or config.optimizer.min_lr > rate:
        least = f"below --min-lr {config.optimizer.min_lr}" if rate > 0 else "at its end"
        problem = f"the rate of {folder} is {rate}, {least}"
        remedy = "choose an earlier one by --ckpt-step"
        return config, [f"--load-mode cooldown: {problem}; {remedy}"]
    # A cooldown is the last phase of WSD alone, begun at the rate where the loaded run stands.
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
    batch = replace(config.batch, train_iters=start + length, train_samples=None)
    return replace(config, optimizer=schedule, batch=batch), []


def _rate_after(iteration: int, folder: Path) -> float:
    """Return the rate at which the run that wrote `folder` would have gone on."""
    schedule = saved_config(folder).optimizer
    if schedule.lr is None or schedule.lr_decay_iters is None:
        raise CheckpointError(f"{folder / CONFIG_FILE} has no schedule")
    return learning_rate(schedule, iteration)


def to_go_on_with(config: Config) -> Config:
    """Return the configuration to save beside a checkpoint: what --load resumes it with.

    It leaves out how this run itself began.
    """
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
    """Return the configuration beside a checkpoint.

    Raises CheckpointError where there is none that can be read.
    """
    return parse_config(read_text(folder / CONFIG_FILE), folder)


def parse_config(text: str, folder: Path) -> Config:
    """Return the configuration that was saved in `folder`, from its text.

    Raises CheckpointError where the text is no configuration.
    """
    try:
        return read_config(text)
    except ConfigError as error:
        raise _no_configuration(folder, "; ".join(error.problems)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _no_configuration(folder, " ".join(str(error).split())) from error


def _no_configuration(folder: Path, reason: str) -> CheckpointError:
    # The reason names its file once more, as YAML's own messages do.
    reason = reason.replace("config.yaml", "", 1)
    return CheckpointError(f"{folder / CONFIG_FILE} is no configuration: {reason}")
