"""Build Trivium's trainer for a suite, and the made-up tokens that it is measured on."""

from collections.abc import Iterator
from itertools import repeat

import torch

from trivium import ops
from trivium.config import Config
from trivium.data.loader import Batch
from trivium.mesh import Mesh
from trivium.precision import working_dtype
from trivium.train.build import build_trainer
from trivium.train.schedule import Progress


def vocabulary(config: Config) -> int:
    """Return the number of words of a NullTokenizer: its end of document comes on top."""
    return config.data.vocab_size + 1


def random_batches(config: Config, rank: int = 0, size: int = 1) -> Iterator[Batch]:
    """Yield the micro-batches of one of `size` data-parallel ranks, without end.

    A sample depends on its number alone: together the ranks have the same samples in any layout.
    """
    micro = config.batch.micro_batch_size
    first = rank * micro
    while True:
        samples = torch.arange(first, first + micro)
        ids = torch.stack([random_sample(config, int(sample)) for sample in samples])
        inputs = ids[:, :-1].contiguous()
        labels = ids[:, 1:].contiguous()
        yield Batch(inputs, labels, torch.ones(inputs.shape), samples)
        first += micro * size


def random_sample(config: Config, sample: int) -> torch.Tensor:
    """Return the T + 1 token ids of one sample."""
    generator = torch.Generator().manual_seed(sample)
    length = config.batch.seq_length + 1
    return torch.randint(config.data.vocab_size, (length,), generator=generator)


def fixed_batch(config: Config) -> Batch:
    """Return the sequences of every update of the train suite.

    They are the same in each update, so that what an engine computes soon shows in its loss.
    """
    return next(random_batches(config))


class Updates:
    """Updates of Trivium, one after the other.

    config, mesh: the run, and the processes that take part in it
    batches: micro-batches of this rank; fixed_batch over and over if not given
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        batches: Iterator[Batch] | None = None,
    ):
        kernels = ops.select_ops("auto", device, working_dtype(config.precision))
        end_of_document = config.data.vocab_size
        self.trainer = build_trainer(
            config, mesh, device, kernels, vocabulary(config), end_of_document
        )
        self.batches = batches or repeat(fixed_batch(config))
        self.progress = Progress()

    def step(self) -> float:
        """Do one update, wait for it, and return its loss."""
        result = self.trainer.step(self.progress, self.batches, stop=False)
        self.progress = result.progress
        return (result.loss_sum / result.num_predictions).item()
