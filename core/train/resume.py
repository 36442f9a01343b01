"""Save a run's whole state into a checkpoint, and restore it.

What a run must know beside its tensors is a list of named items. Each is contributed by the
object that owns it: the progress here, the count of updates by the optimizer, the loss scale by
its scaler. One loop saves them all into state.json, and one restores those that the load mode
asks for. A new kind of state is an item of its owner; nothing else changes.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import logs
from ..checkpoint import publish
from ..checkpoint.background import Background
from ..checkpoint.load import Checkpoint, NothingPublished, open_checkpoint
from ..checkpoint.retention import Retention
from ..checkpoint.save import save
from ..config.flags import write_config
from ..interop.hf_model import HFModel, is_hf_folder
from ..layout import Piece
from ..state import StateItem
from .load_modes import MODES, Restored, load_mode, restored_by, table, to_go_on_with
from .load_problems import check_checkpoint
from .schedule import Progress
from .step import Trainer

# What another fingerprint than the checkpoint's means for the run.
CONSEQUENCES = {
    "tokenizer": "another tokenizer: ids may mean other text",
    "data": "another order of the data: samples may repeat or be left out",
}


class RunState:
    """Save and restore one run, and compare its tokenizer and data order with the checkpoint's.

    Call `restore` first, which tells how much data the run still needs; then `read_from`, with
    the order that was built for it. With --async-save, `save` returns when it has begun: `watch`
    it at every step, and `finish` it at the end.

    progress: as of the last `restore` or `save`.
    data_samples: the number of samples that the order of the data was made for. The order for
        fewer samples may be another one.
    """

    def __init__(self, trainer: Trainer, tokenizer_fingerprint: str):
        self.trainer = trainer
        self.progress = Progress()
        self.data_samples = 0
        self.fingerprints = {"tokenizer": tokenizer_fingerprint}
        # By the part of `Restored` that they are restored with, in the order of state.json.
        self._items: dict[str, list[StateItem]] = {
            "schedule": self._schedule_items(),
            "data": self._data_items(),
            "moments": [*trainer.optimizer.state_items(), *trainer.scaler.state_items()],
        }
        self._saved_fingerprints: dict[str, str] = {}
        self._background: Background | None = None
        if trainer.config.checkpoint.async_save:
            self._background = Background(trainer.mesh.world, trainer.device)
        self._told: int | str | None = None  # the last publication or failure that was logged

    # Saving.

    def save(
        self, progress: Progress, validation_loss: float | None = None, *, persistent: bool = True
    ) -> None:
        """Save a checkpoint of this moment under --save, and retire old ones as asked.

        A save that is still in flight is finished first.

        validation_loss: measured at this iteration; None if there was no evaluation.
        persistent: False for a checkpoint that the next one replaces.
        """
        self.finish()  # at most one save is in flight
        self.progress = progress
        config = self.trainer.config.checkpoint
        assert config.save is not None
        start = self._background.start if self._background else self._save_now
        start(
            Path(config.save),
            progress.iteration,
            self._owned(),
            state=self._state(validation_loss, persistent),
            config_yaml=write_config(to_go_on_with(self.trainer.config)),
            retention=Retention(
                config.save_keep_last, config.save_retain_interval, config.save_keep_best
            ),
        )
        if not self._background:
            self._tell_published(progress.iteration)

    def watch(self) -> bool:
        """Look at the save in flight, and log what is new.

        Returns whether it has failed on this rank, so that the run should stop.
        """
        if self._background is None:
            return False
        self._tell_published(self._background.published())
        problem = self._background.problem()
        if problem not in (None, self._told):
            self._told = problem
            logs.get_logger().error(f"{problem}; the run ends after the next step")
        return problem is not None

    def finish(self) -> None:
        """Wait for the save in flight.

        Raises the same CheckpointError on every rank if it failed on one.
        """
        if self._background:
            self._tell_published(self._background.finish())

    def _save_now(self, *args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs, world=self.trainer.mesh.world, device=self.trainer.device)

    def _tell_published(self, iteration: int | None) -> None:
        if iteration not in (None, self._told):
            self._told = iteration
            folder = self.trainer.config.checkpoint.save
            logs.get_logger().info(f" saved checkpoint at iteration {iteration} to {folder}")

    def _state(self, validation_loss: float | None, persistent: bool) -> dict[str, Any]:
        """Return the contents of state.json: the items, then what describes the checkpoint."""
        state = {}
        for items in self._items.values():
            for item in items:
                state[item.name] = item.save()
        measured = validation_loss is not None and math.isfinite(validation_loss)
        return state | {
            # The seed is all there is: every draw is a function of it, iteration and sample.
            "random": {"seed": self.trainer.config.batch.seed},
            "vocab_size": self.trainer.passes.vocab_size,
            "fingerprints": self.fingerprints,
            "validation_loss": validation_loss if measured else None,
            "persistent": persistent,
        }

    def _owned(self) -> Iterator[Piece]:
        """Yield what this rank writes: weights, then moments."""
        optimizer = self.trainer.optimizer
        yield from optimizer.weight_pieces(owned=True)
        yield from optimizer.moment_pieces(owned=True)

    # The items of the state that belong to nobody else.

    def _schedule_items(self) -> list[StateItem]:
        return [self._progress_item("iteration")]

    def _data_items(self) -> list[StateItem]:
        consumed = [self._progress_item(f"consumed_{unit}") for unit in ("samples", "tokens")]
        return [*consumed, StateItem("data_samples", lambda: self.data_samples, self._order_of)]

    def _progress_item(self, name: str) -> StateItem:
        """Return the item of one field of the progress, under its own name."""

        def load(value: int) -> None:
            self.progress = replace(self.progress, **{name: value})

        return StateItem(name, lambda: getattr(self.progress, name), load)

    def _order_of(self, data_samples: int | None) -> None:
        self.data_samples = data_samples or 0

    # Restoring.

    def restore(self) -> Progress:
        """Load what --load and --load-mode ask for; return the progress to go on from.

        Where nothing is to be loaded, that is the progress of a run that has not begun.
        """
        config = self.trainer.config.checkpoint
        if not config.load:
            self._warn_of_another_run()
            return self.progress
        folder = Path(config.load)
        if is_hf_folder(folder):
            self._restore_from_hf(folder)
            return self.progress
        world, device = self.trainer.mesh.world, self.trainer.device
        try:
            checkpoint = open_checkpoint(
                folder, ckpt_step=config.ckpt_step, world=world, device=device
            )
        except NothingPublished:
            logs.get_logger().info(f" no checkpoint in {config.load} yet: starting from scratch")
            return self.progress
        restored = restored_by(config)
        check_checkpoint(checkpoint, self.trainer.config, restored)
        checkpoint.read_into(self._wanted(restored))
        if restored.weights:
            # What was read are the fp32 masters: the model computes with rounded copies.
            self.trainer.optimizer.masters_loaded()
        self._load_state(checkpoint.state, restored)
        self._tell_loaded(checkpoint, restored)
        return self.progress

    def read_from(self, data_fingerprint: str, data_samples: int) -> None:
        """Go on with this order of the data, which was made for `data_samples` samples.

        Logs a note where it, or the tokenizer, is not that of the checkpoint.
        """
        self.fingerprints["data"] = data_fingerprint
        self.data_samples = data_samples
        for key, consequence in CONSEQUENCES.items():
            saved = self._saved_fingerprints.get(key, self.fingerprints[key])
            if saved != self.fingerprints[key]:
                logs.get_logger().info(f" note: the checkpoint was written with {consequence}")

    def _load_state(self, state: dict[str, Any], restored: Restored) -> None:
        """Take up the items that are to be restored.

        An item that an earlier version did not save stays as it starts.
        """
        for part, items in self._items.items():
            if getattr(restored, part):
                for item in items:
                    if item.name in state:
                        item.load(state[item.name])
        self._saved_fingerprints = dict(state["fingerprints"])
        if not restored.data:
            # Another order of the data is then what was asked for.
            self._saved_fingerprints.pop("data", None)

    def _restore_from_hf(self, folder: Path) -> None:
        """Read the weights, each rank its slices; such a folder holds nothing else."""
        source, restored = HFModel(folder), MODES["model_only"]
        source.read_into(self._wanted(restored))
        self.trainer.optimizer.masters_loaded()
        family = source.config.hf_model_type
        logs.get_logger().info(f" loaded {family} from {folder}:")
        self._tell_table(restored)

    def _wanted(self, restored: Restored) -> Iterator[Piece]:
        """Yield the pieces of this rank that are to be filled."""
        if restored.weights:
            yield from self.trainer.optimizer.weight_pieces()
        if restored.moments:
            yield from self.trainer.optimizer.moment_pieces()

    def _warn_of_another_run(self) -> None:
        folder = self.trainer.config.checkpoint.save
        used = publish.published_iterations(Path(folder)) if folder else []
        if used:
            held = f"iterations of another run ({used[0]} to {used[-1]})"
            logs.get_logger().warning(f"--save {folder} holds {held}; --load would resume it")

    def _tell_loaded(self, checkpoint: Checkpoint, restored: Restored) -> None:
        config = self.trainer.config
        logger, mode = logs.get_logger(), load_mode(config.checkpoint)
        loaded = f"checkpoint at iteration {checkpoint.iteration} from {checkpoint.folder}"
        logger.info(f" loaded {loaded}, --load-mode {mode}:")
        self._tell_table(restored)
        if mode == "cooldown":
            schedule, length = config.optimizer, config.checkpoint.cooldown_iters
            begin = f"{schedule.lr:.6E}"
            end = f"{schedule.min_lr:.6E} over {length} iterations"
            logger.info(
                f" cooldown ({schedule.lr_wsd_decay_style}) from learning rate {begin} down to "
                f"{end}, until iteration {config.batch.train_iters}"
            )
        seed, saved = config.batch.seed, checkpoint.state["random"]["seed"]
        if seed != saved:
            logger.info(
                f" note: the checkpoint was written with --seed {saved}, this run has {seed}: "
                "dropout and the order of the data are others"
            )

    def _tell_table(self, restored: Restored) -> None:
        for line in table(restored, scaled=self.trainer.scaler.dynamic):
            logs.get_logger().info(line)
