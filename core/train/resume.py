"""A run's whole state into a checkpoint and out of it again."""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from .. import logs
from ..checkpoint import publish
from ..checkpoint.background import Background
from ..checkpoint.load import Checkpoint, NothingPublished, open_checkpoint
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.retention import Retention
from ..checkpoint.save import save
from ..config import CheckpointConfig, ModelConfig
from ..config.flags import write_config
from ..interop.families import differences
from ..interop.hf_model import HFModel, is_hf_folder
from ..layout import Piece
from .load_modes import MODES, Restored, load_mode, parse_config, restored_by, table, to_go_on_with
from .schedule import Progress
from .step import Trainer

# What a run may change about its model without making another one of it. Learned positions are a tensor: their shape is checked.
MAY_CHANGE = {
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
}
MAY_CHANGE_TO_FINETUNE = {
    "rotary_base",
    "use_rope_scaling",
    "rope_scaling_factor",
}  # how contexts are made longer


class RunState:
    """Saves and restores one run, and knows by their fingerprints whether tokenizer and data order are those of before.

    First `restore`, which tells how much data is still needed, then `read_from` with the order that was built for it. With --async-save
    a `save` returns when it has begun: `watch` it at every step, `finish` it at the end.
    """

    def __init__(self, trainer: Trainer, tokenizer_fingerprint: str):
        self.trainer = trainer
        self.fingerprints = {"tokenizer": tokenizer_fingerprint}
        self.data_samples = 0  # for how many samples the order was made that --load goes on with: a shorter one may be another
        self._saved_fingerprints: dict[str, str] = {}
        self._background = (
            Background(trainer.mesh.world, trainer.device)
            if trainer.config.checkpoint.async_save
            else None
        )
        self._told: int | str | None = None  # the last publication or failure that the log knows of

    def save(
        self, progress: Progress, validation_loss: float | None = None, *, persistent: bool = True
    ) -> None:
        """A checkpoint of this moment under --save; old ones are retired as asked. One that is still in flight is finished first.

        validation_loss: measured at this iteration. persistent: False for one that the next one replaces.
        """
        self.finish()
        config = self.trainer.config.checkpoint
        start = self._background.start if self._background else self._save_now
        start(
            Path(config.save),
            progress.iteration,
            self._owned(),
            state=self._state(progress, validation_loss, persistent),
            config_yaml=write_config(to_go_on_with(self.trainer.config)),
            retention=Retention(
                config.save_keep_last, config.save_retain_interval, config.save_keep_best
            ),
        )
        if not self._background:
            self._tell_published(progress.iteration)

    def watch(self) -> bool:
        """A look at the save in flight: True if it has failed on this rank, so that the run should stop. What is new goes to the log."""
        if self._background is None:
            return False
        self._tell_published(self._background.published())
        problem = self._background.problem()
        if problem not in (None, self._told):
            self._told = problem
            logs.get_logger().error(f"{problem}; the run ends after the next step")
        return problem is not None

    def finish(self) -> None:
        """Wait for the save in flight. Raises the same CheckpointError on every rank if it failed on one."""
        if self._background:
            self._tell_published(self._background.finish())

    def _save_now(self, *args, **kwargs) -> None:
        save(*args, **kwargs, world=self.trainer.mesh.world, device=self.trainer.device)

    def _tell_published(self, iteration: int | None) -> None:
        if iteration not in (None, self._told):
            self._told = iteration
            logs.get_logger().info(
                f" saved checkpoint at iteration {iteration} to {self.trainer.config.checkpoint.save}"
            )

    def _state(self, progress: Progress, validation_loss: float | None, persistent: bool) -> dict:
        trainer = self.trainer
        return {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "data_samples": self.data_samples,
            "optimizer_steps": trainer.optimizer.steps.item(),
            "loss_scale": trainer.scaler.state(),
            "random": {
                "seed": trainer.config.batch.seed
            },  # all there is: every draw is a function of the seed, the iteration and the sample
            "vocab_size": trainer.passes.vocab_size,
            "fingerprints": self.fingerprints,
            "validation_loss": validation_loss
            if validation_loss is not None and math.isfinite(validation_loss)
            else None,
            "persistent": persistent,
        }

    def restore(self) -> Progress:
        """Load what --load and --load-mode ask for; where nothing is to be loaded, a run that has not begun."""
        trainer, config = self.trainer, self.trainer.config.checkpoint
        if not config.load:
            if config.save and (used := publish.published_iterations(Path(config.save))):
                logs.get_logger().warning(
                    f"--save {config.save} holds iterations of another run ({used[0]} to {used[-1]}); --load would resume it"
                )
            return Progress()
        if is_hf_folder(Path(config.load)):
            return self._restore_from_hf(Path(config.load))
        try:
            checkpoint = open_checkpoint(
                Path(config.load),
                ckpt_step=config.ckpt_step,
                world=trainer.mesh.world,
                device=trainer.device,
            )
        except NothingPublished:
            logs.get_logger().info(f" no checkpoint in {config.load} yet: starting from scratch")
            return Progress()
        restored, state = restored_by(config), checkpoint.state
        if restored.moments and not any(name.startswith("optim.") for name in checkpoint.names()):
            raise CheckpointError(
                f"{checkpoint.folder} holds no optimizer state; give --load-mode model_only, or --no-load-optim"
            )
        self._check_schedule(checkpoint)
        self._check_model(checkpoint)
        checkpoint.read_into(self._wanted(restored))
        if restored.weights:
            trainer.optimizer.masters_loaded()
        if restored.moments:
            trainer.optimizer.steps.fill_(state["optimizer_steps"])
            trainer.scaler.load(state["loss_scale"])
        if restored.data:
            self.data_samples = state.get("data_samples") or 0
        self._saved_fingerprints = (
            state["fingerprints"]
            if restored.data
            else {"tokenizer": state["fingerprints"]["tokenizer"]}
        )
        self._tell_loaded(checkpoint, restored)
        iteration = state["iteration"] if restored.place else 0
        return Progress(
            iteration,
            *((state["consumed_samples"], state["consumed_tokens"]) if restored.data else (0, 0)),
        )

    def _restore_from_hf(self, folder: Path) -> Progress:
        """Weights, each rank its slices; there is nothing else in such a folder."""
        source, restored = HFModel(folder), MODES["model_only"]
        source.read_into(self._wanted(restored))
        self.trainer.optimizer.masters_loaded()
        logs.get_logger().info(f" loaded {source.config.hf_model_type} from {folder}:")
        for line in table(restored, scaled=self.trainer.scaler.dynamic):
            logs.get_logger().info(line)
        return Progress()

    def _wanted(self, restored: Restored) -> Iterator[Piece]:
        """The pieces of this rank that are to be filled."""
        if restored.weights:
            yield from self.trainer.optimizer.weight_pieces()
        if restored.moments:
            yield from self.trainer.optimizer.moment_pieces()

    def _tell_loaded(self, checkpoint: Checkpoint, restored: Restored) -> None:
        trainer = self.trainer
        logger, mode = logs.get_logger(), load_mode(trainer.config.checkpoint)
        logger.info(
            f" loaded checkpoint at iteration {checkpoint.iteration} from {checkpoint.folder}, --load-mode {mode}:"
        )
        for line in table(restored, scaled=trainer.scaler.dynamic):
            logger.info(line)
        if mode == "cooldown":
            schedule, length = trainer.config.optimizer, trainer.config.checkpoint.cooldown_iters
            end = f"{schedule.min_lr:.6E} over {length} iterations, until iteration {trainer.config.batch.train_iters}"
            logger.info(
                f" cooldown ({schedule.lr_wsd_decay_style}) from learning rate {schedule.lr:.6E} down to {end}"
            )
        seed, saved = trainer.config.batch.seed, checkpoint.state["random"]["seed"]
        if seed != saved:
            logger.info(
                f" note: the checkpoint was written with --seed {saved}, this run has {seed}: dropout and the order of the data are others"
            )

    def _owned(self) -> Iterator[Piece]:
        """What this rank writes: of the copies of a shard the first writes, of replicated parts the primary."""
        optimizer = self.trainer.optimizer
        if self.trainer.mesh.copies.rank == 0:
            for pieces in (optimizer.weight_pieces(), optimizer.moment_pieces()):
                yield from (piece for piece in pieces if piece.primary)

    def _check_schedule(self, checkpoint: Checkpoint) -> None:
        """The schedule of a cooldown was made before the checkpoint was verified: raises CheckpointError if another one is loaded."""
        config = self.trainer.config
        if (
            load_mode(config.checkpoint) == "cooldown"
            and checkpoint.iteration + config.checkpoint.cooldown_iters != config.batch.train_iters
        ):
            planned = config.batch.train_iters - config.checkpoint.cooldown_iters
            raise CheckpointError(
                f"the cooldown was planned from iteration {planned} of {config.checkpoint.load}, which does not verify; "
                f"--ckpt-step {checkpoint.iteration} cools down from the newest that does"
            )

    def _check_model(self, checkpoint: Checkpoint) -> None:
        """Weights of the same shapes can still be those of another model: raises CheckpointError naming every flag that differs."""
        saved, now = (
            parse_config(checkpoint.config_yaml, checkpoint.folder).model,
            self.trainer.config.model,
        )
        lengthens = load_mode(self.trainer.config.checkpoint) == "model_only"
        free = MAY_CHANGE | (MAY_CHANGE_TO_FINETUNE if lengthens else set())
        differ = [
            f.name
            for f in fields(ModelConfig)
            if f.name not in free and getattr(saved, f.name) != getattr(now, f.name)
        ]
        if differ:
            named = "; ".join(
                f"--{name.replace('_', '-')} was {getattr(saved, name)}, is {getattr(now, name)}"
                for name in differ
            )
            raise CheckpointError(
                f"{checkpoint.folder} is of another model: {named}; give the flags it was trained with"
            )

    def read_from(self, data_fingerprint: str, data_samples: int) -> None:
        """Go on with this order of the data, made for so many samples; a note where it, or the tokenizer, is not that of the checkpoint."""
        self.fingerprints["data"], self.data_samples = data_fingerprint, data_samples
        meaning = {
            "tokenizer": "another tokenizer: ids may mean other text",
            "data": "another order of the data: samples may repeat or be left out",
        }
        for key, consequence in meaning.items():
            if self._saved_fingerprints.get(key, self.fingerprints[key]) != self.fingerprints[key]:
                logs.get_logger().info(f" note: the checkpoint was written with {consequence}")


def load_problems(model: ModelConfig, config: CheckpointConfig) -> list[str]:
    """Why --load cannot work, found out before anything is started. A first launch that loads from its own --save folder is fine."""
    if config.load and is_hf_folder(Path(config.load)):
        return _hf_load_problems(model, config)
    if not config.load or not config.exit_on_missing_checkpoint:
        return []
    folder = Path(config.load)
    try:
        found = publish.candidates(folder, config.ckpt_step)
    except CheckpointError as error:
        return [f"--load {config.load}: {error}"]
    first_launch = config.save is not None and folder.resolve() == Path(config.save).resolve()
    if found or first_launch:
        return []
    return [
        f"--load {config.load} holds no published checkpoint; correct the path, or leave --load out to start from scratch"
    ]


def _hf_load_problems(model: ModelConfig, config: CheckpointConfig) -> list[str]:
    """Of --load with a Hugging Face folder."""
    if model.num_layers is None or model.hidden_size is None or model.num_attention_heads is None:
        return [
            f"--load {config.load} is a Hugging Face folder: its shape is given by --hf-config {config.load}"
        ]
    if config.save_hf and Path(config.save_hf).resolve() == Path(config.load).resolve():
        return [f"--save-hf {config.save_hf} would replace what --load reads; name another folder"]
    if config.load_mode not in (None, "model_only"):
        return [
            f"--load-mode {config.load_mode}: {config.load} is a Hugging Face folder, which holds weights alone; use model_only"
        ]
    if config.ckpt_step is not None:
        return [
            f"--ckpt-step {config.ckpt_step}: {config.load} is a Hugging Face folder, which holds no iterations; leave it out"
        ]
    try:
        differ = differences(HFModel(Path(config.load)).config, model)
    except CheckpointError as error:
        return [f"--load: {error}"]
    except ValueError:
        return []  # a flag that cannot be read, which validation has told of
    return (
        [
            f"--load {config.load} is another model: {'; '.join(differ)}; give --hf-config {config.load}"
        ]
        if differ
        else []
    )
