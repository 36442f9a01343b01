"""Checks of what is saved, loaded and reported."""

import os
from collections.abc import Iterator

from ..fields import CheckpointConfig, Config, flag_of
from .data import has_validation
from .words import nearest_multiples, positive

# Fields that say how often, or how many, checkpoints are saved.
_SAVING = (
    "save_interval",
    "non_persistent_save_interval",
    "save_keep_last",
    "save_retain_interval",
    "save_keep_best",
)


def check_checkpoint(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of checkpoints."""
    asked = config.checkpoint
    for name in ("save", "load", "save_hf"):
        if getattr(asked, name) == "":
            yield f"{flag_of(name)} is empty; name a folder, or leave it out"
    for name in _SAVING:
        yield from positive(asked, name)
        if getattr(asked, name) and not asked.save:
            yield f"{flag_of(name)} {getattr(asked, name)} needs --save FOLDER"
    if asked.async_save and not asked.save:
        yield "--async-save needs --save FOLDER"
    if asked.save_hf and not asked.save:
        hf = f"--save-hf {asked.save_hf}"
        yield f"{hf} needs --save FOLDER: what is exported is the last checkpoint"
    yield from _best(config)
    yield from _loading(asked)
    if asked.save and os.path.isfile(os.path.join(asked.save, "config.json")):
        yield (
            f"--save {asked.save} holds a config.json: it is a Hugging Face folder, "
            "and --load would take it for one; name another folder"
        )
    yield from _writable("save", asked.save)
    yield from _writable("save_hf", asked.save_hf)


def _best(config: Config) -> Iterator[str]:
    """Yield why checkpoints cannot compete: each needs a loss measured at its iteration."""
    count = config.checkpoint.save_keep_best
    if not count:
        return
    given = f"--save-keep-best {count}"
    iters = config.logging.eval_iters
    saved, evaluated = config.checkpoint.save_interval, config.logging.eval_interval
    if iters <= 0:
        measures = f"--eval-iters {iters} measures none"
        yield f"{given} needs validation losses, and {measures}; raise it"
    elif not has_validation(config.data):
        yield (
            f"{given} needs validation losses, and there is no validation data; "
            "give it a share in --split, or --valid-data-path"
        )
    if saved is None:
        yield f"{given} needs --save-interval, a multiple of --eval-interval {evaluated}"
    elif evaluated > 0 and saved % evaluated:
        near = nearest_multiples(saved, evaluated)
        yield (
            f"{given}: --save-interval {saved} is not a multiple of "
            f"--eval-interval {evaluated}; save every {near}"
        )


def _loading(asked: CheckpointConfig) -> Iterator[str]:
    """Yield the problems of what --load takes over."""
    mode = asked.load_mode
    if asked.ckpt_step is not None and not asked.load:
        yield f"--ckpt-step {asked.ckpt_step} needs --load FOLDER"
    if mode and not asked.load:
        yield f"--load-mode {mode} needs --load FOLDER"
    for name in ("finetune", "no_load_optim"):
        if getattr(asked, name) and not asked.load:
            yield f"{flag_of(name)} needs --load FOLDER"
    if asked.finetune and mode not in (None, "model_only"):
        yield f"--finetune is --load-mode model_only, not {mode}; give one of them"
    if asked.no_load_optim and mode == "optimizer_only":
        yield (
            "--no-load-optim leaves out all that --load-mode optimizer_only loads; give one of them"
        )
    yield from positive(asked, "cooldown_iters")
    if mode == "cooldown" and asked.cooldown_iters is None:
        yield "--load-mode cooldown needs --cooldown-iters N"
    if mode != "cooldown" and asked.cooldown_iters is not None:
        yield f"--cooldown-iters {asked.cooldown_iters} needs --load-mode cooldown"
    yield from _new_run(asked)


def _new_run(asked: CheckpointConfig) -> Iterator[str]:
    """Yield a problem where a run that begins anew saves where it loads from."""
    if asked.load_mode not in (None, "continue"):
        begins = f"--load-mode {asked.load_mode}"
    elif asked.finetune:
        begins = "--finetune"
    else:
        return
    if not asked.load or not asked.save:
        return
    if os.path.realpath(asked.load) == os.path.realpath(asked.save):
        yield (
            f"{begins}: --load and --save are both {asked.save}; "
            "given again, it would begin from its own checkpoints; give another --save"
        )


def check_logging(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of reports and evaluation."""
    reports = config.logging
    yield from _writable("tensorboard_dir", reports.tensorboard_dir)
    if reports.metrics_jsonl:
        folder = os.path.dirname(os.path.abspath(reports.metrics_jsonl))
        yield from _writable("metrics_jsonl", folder)
    yield from positive(reports, "log_interval", "eval_interval")
    if reports.eval_iters < 0:
        yield f"--eval-iters {reports.eval_iters} must not be negative"


def _writable(name: str, folder: str | None) -> Iterator[str]:
    """Yield a problem unless the folder, or the nearest one above it, takes files."""
    if not folder:
        return
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    given = f"{flag_of(name)} {folder}"
    if not os.path.isdir(existing):
        yield f"{given}: {existing} is no folder; name another"
    elif not os.access(existing, os.W_OK):
        yield f"{given}: no permission to write in {existing}; name another folder"
