"""A run's whole state into a checkpoint and out of it again."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from .. import logs
from ..checkpoint import publish
from ..checkpoint.load import Checkpoint, NothingPublished, open_checkpoint
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.save import save
from ..config import CheckpointConfig, ModelConfig
from ..flags import read_config, write_config
from ..layout import Piece
from .progress import Progress
from .step import Trainer

# What a run may change about its model without making another one of it. Learned positions are a tensor: their shape is checked.
MAY_CHANGE = {"attention_dropout", "hidden_dropout", "init_method_std", "make_vocab_size_divisible_by", "max_position_embeddings"}
MAY_CHANGE_TO_FINETUNE = {"rotary_base", "use_rope_scaling", "rope_scaling_factor"}  # how contexts are made longer


class RunState:
    """Saves and restores one run, and knows by their fingerprints whether tokenizer and data order are those of before.

    First `restore`, which tells how much data is still needed, then `read_from` with the order that was built for it.
    """

    def __init__(self, trainer: Trainer, tokenizer_fingerprint: str):
        self.trainer = trainer
        self.fingerprints = {"tokenizer": tokenizer_fingerprint}
        self._saved_fingerprints: dict[str, str] = {}

    def save(self, progress: Progress) -> None:
        """Publish a checkpoint of this moment under --save, then retire old ones as asked."""
        trainer, config = self.trainer, self.trainer.config.checkpoint
        state = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "optimizer_steps": trainer.optimizer.steps.item(),
            "loss_scale": trainer.scaler.state(),
            "random": {"seed": trainer.config.batch.seed},  # all there is: every draw is a function of the seed, the iteration and the sample
            "vocab_size": trainer.stages.chunks[0].vocab_size,
            "fingerprints": self.fingerprints,
        }
        save(
            Path(config.save),
            progress.iteration,
            self._owned(),
            state=state,
            config_yaml=write_config(trainer.config),
            world=trainer.mesh.world,
            device=trainer.device,
        )
        if trainer.mesh.rank == 0:
            publish.retain(Path(config.save), config.save_keep_last, config.save_retain_interval)
            logs.get_logger().info(f" saved checkpoint at iteration {progress.iteration} to {config.save}")

    def restore(self) -> Progress:
        """Load what --load asks for; where nothing is to be loaded, a run that has not begun."""
        trainer, config = self.trainer, self.trainer.config.checkpoint
        if not config.load:
            if config.save and (used := publish.published_iterations(Path(config.save))):
                logs.get_logger().warning(f"--save {config.save} holds iterations of another run ({used[0]} to {used[-1]}); --load would resume it")
            return Progress()
        try:
            checkpoint = open_checkpoint(Path(config.load), ckpt_step=config.ckpt_step, world=trainer.mesh.world, device=trainer.device)
        except NothingPublished:
            logs.get_logger().info(f" no checkpoint in {config.load} yet: starting from scratch")
            return Progress()
        self._check_model(checkpoint)
        pieces = [*trainer.optimizer.weight_pieces()]
        with_moments = not (config.finetune or config.no_load_optim)
        if with_moments:
            pieces += trainer.optimizer.moment_pieces()
        checkpoint.read_into(pieces)
        trainer.optimizer.masters_loaded()
        state = checkpoint.state
        if with_moments:
            trainer.optimizer.steps.fill_(state["optimizer_steps"])
            trainer.scaler.load(state["loss_scale"])
        self._saved_fingerprints = {"tokenizer": state["fingerprints"]["tokenizer"]} if config.finetune else state["fingerprints"]
        restored = "weights" + (", moments, loss scale" if with_moments else "") + ("" if config.finetune else ", iteration, data position")
        logs.get_logger().info(f" loaded checkpoint at iteration {checkpoint.iteration} from {checkpoint.folder}: {restored}")
        if config.finetune:
            return Progress()
        return Progress(state["iteration"], state["consumed_samples"], state["consumed_tokens"])

    def _owned(self) -> Iterator[Piece]:
        """What this rank writes: of the copies of a shard the first writes, of replicated parts the primary."""
        optimizer = self.trainer.optimizer
        if self.trainer.mesh.copies.rank == 0:
            for pieces in (optimizer.weight_pieces(), optimizer.moment_pieces()):
                yield from (piece for piece in pieces if piece.primary)

    def _check_model(self, checkpoint: Checkpoint) -> None:
        """Weights of the same shapes can still be those of another model: raises CheckpointError naming every flag that differs."""
        saved, now = read_config(checkpoint.config_yaml).model, self.trainer.config.model
        free = MAY_CHANGE | (MAY_CHANGE_TO_FINETUNE if self.trainer.config.checkpoint.finetune else set())
        differ = [f.name for f in fields(ModelConfig) if f.name not in free and getattr(saved, f.name) != getattr(now, f.name)]
        if differ:
            named = "; ".join(f"--{name.replace('_', '-')} was {getattr(saved, name)}, is {getattr(now, name)}" for name in differ)
            raise CheckpointError(f"{checkpoint.folder} is of another model: {named}; give the flags it was trained with")

    def read_from(self, data_fingerprint: str) -> None:
        """Go on with this order of the data; a note where it, or the tokenizer, is not that of the checkpoint."""
        self.fingerprints["data"] = data_fingerprint
        meaning = {"tokenizer": "another tokenizer: ids may mean other text", "data": "another order of the data: samples may repeat or be left out"}
        for key, consequence in meaning.items():
            if self._saved_fingerprints.get(key, self.fingerprints[key]) != self.fingerprints[key]:
                logs.get_logger().info(f" note: the checkpoint was written with {consequence}")


def load_problems(config: CheckpointConfig) -> list[str]:
    """Why --load cannot work, found out before anything is started. A first launch that loads from its own --save folder is fine."""
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
    return [f"--load {config.load} holds no published checkpoint; correct the path, or leave --load out to start from scratch"]
