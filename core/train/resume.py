"""A run's whole state into a checkpoint and out of it again."""

from collections.abc import Iterator
from pathlib import Path

from .. import logs
from ..checkpoint import publish
from ..checkpoint.load import NothingPublished, open_checkpoint
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.save import save
from ..config import CheckpointConfig
from ..flags import write_config
from ..layout import Piece
from .progress import Progress
from .step import Trainer


class RunState:
    """Saves and restores one run. `fingerprints` name the tokenizer and the data order, so that a resume with others says so."""

    def __init__(self, trainer: Trainer, fingerprints: dict[str, str]):
        self.trainer, self.fingerprints = trainer, fingerprints

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
            "vocab_size": trainer.model.vocab_size,
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
            return Progress()
        try:
            checkpoint = open_checkpoint(Path(config.load), ckpt_step=config.ckpt_step, world=trainer.mesh.world, device=trainer.device)
        except NothingPublished:
            logs.get_logger().info(f" no checkpoint in {config.load} yet: starting from scratch")
            return Progress()
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
        self._compare(state["fingerprints"], config)
        restored = "weights" + (", moments, loss scale" if with_moments else "") + ("" if config.finetune else ", iteration, data position")
        logs.get_logger().info(f" loaded checkpoint at iteration {checkpoint.iteration} from {checkpoint.folder}: {restored}")
        if config.finetune:
            return Progress()
        return Progress(state["iteration"], state["consumed_samples"], state["consumed_tokens"])

    def _owned(self) -> Iterator[Piece]:
        """What this rank writes: of data-parallel copies the first writes, of replicated parts the primary."""
        optimizer = self.trainer.optimizer
        if self.trainer.mesh.dp_cp.rank == 0:
            for pieces in (optimizer.weight_pieces(), optimizer.moment_pieces()):
                yield from (piece for piece in pieces if piece.primary)

    def _compare(self, saved: dict[str, str], config: CheckpointConfig) -> None:
        meaning = {"tokenizer": "another tokenizer: ids may mean other text", "data": "another order of the data: samples may repeat or be left out"}
        for key, consequence in meaning.items():
            if saved.get(key) != self.fingerprints[key] and not (config.finetune and key == "data"):
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
