"""Scalars for TensorBoard, under Megatron's tags."""

from ..report import EvaluationRow, Row

EVALUATION_TAGS = {"valid": "lm loss validation", "test": "lm loss test"}


class TensorBoard:
    """Scalars of every iteration and evaluation, in an event file in a folder."""

    def __init__(self, folder: str, iteration: int):
        # A second of imports that most runs can do without.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, row: Row) -> None:
        """Add the scalars of one iteration."""
        scalars = {
            "lm loss": row.lm_loss,
            "learning-rate": row.learning_rate,
            "grad-norm": row.grad_norm,
            "loss-scale": row.loss_scale,
            "batch-size": row.global_batch_size,
            "iteration-time": row.iteration_ms / 1000,
            "throughput": row.tflops_per_device,
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, row.iteration)

    def evaluation(self, row: EvaluationRow) -> None:
        """Add the loss and the perplexity of a split."""
        tag = EVALUATION_TAGS[row.split]
        self._writer.add_scalar(tag, row.lm_loss, row.iteration)
        self._writer.add_scalar(f"{tag} ppl", row.ppl, row.iteration)

    def flush(self) -> None:
        """Leave it to the writer, which writes from time to time: a restart purges what is late."""

    def close(self) -> None:
        """Write what is held and close the event file."""
        self._writer.close()
