"""The data of a run: how many samples it needs, and the micro-batches of this rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..config import Config
from ..data.loader import MicroBatches, Replica
from ..data.splits import Datasets, build_datasets
from ..data.tokenizer import Tokenizer
from ..mesh import Mesh
from .schedule import BatchSchedule, Progress


@dataclass(frozen=True)
class Data:
    """The splits of a run, each as a call that begins to read this rank's micro-batches.

    train: called with the number of samples consumed before.
    valid, test: the same batches for every evaluation; None without such a split.
    fingerprint: of the order of the training samples.
    num_samples: that this order was made for.
    """

    train: Callable[[int], MicroBatches]
    valid: Callable[[], MicroBatches] | None
    test: Callable[[], MicroBatches] | None
    fingerprint: str
    num_samples: int


def samples_needed(
    config: Config, schedule: BatchSchedule, progress: Progress, ordered: int
) -> int:
    """Return the number of samples to make the order of the training data for.

    It is what the run needs, and not less than the order was made for before (`ordered`): an
    order of fewer epochs is another order. A run that is resumed with smaller batches has
    consumed more samples than its iterations now say.
    """
    planned = config.batch.train_samples or schedule.samples_from(Progress())
    return max(planned, ordered, schedule.samples_from(progress))


def build_data(
    config: Config,
    schedule: BatchSchedule,
    tokenizer: Tokenizer,
    mesh: Mesh,
    device: torch.device,
    num_samples: int,
) -> Data:
    """Open the datasets and cut them into micro-batches.

    num_samples: of the training data; validation and test are one evaluation long.
    """
    evaluated = config.logging.eval_iters * schedule.evaluation.samples
    datasets = _open_datasets(config, tokenizer, num_samples, evaluated)
    batches = partial(
        MicroBatches,
        micro_batch_size=config.batch.micro_batch_size,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        replica=Replica(mesh.dp.rank, mesh.dp.size),
        eod_mask_loss=config.data.eod_mask_loss,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",  # a copy from other memory would wait
    )

    training = datasets.train
    assert training is not None  # build_datasets sees to it

    def train(start: int) -> MicroBatches:
        return batches(training, start=start)

    valid = partial(batches, datasets.valid, end=evaluated) if datasets.valid else None
    test = partial(batches, datasets.test, end=evaluated) if datasets.test else None
    return Data(train, valid, test, datasets.fingerprint, num_samples)


def _open_datasets(
    config: Config, tokenizer: Tokenizer, num_samples: int, evaluated: int
) -> Datasets:
    data, batch = config.data, config.batch
    return build_datasets(
        data.data_path,
        data.split,
        batch.seq_length,
        batch.seed,
        (num_samples, evaluated, evaluated),
        own_paths=(data.train_data_path, data.valid_data_path, data.test_data_path),
        cache_path=data.data_cache_path,
        mock=data.mock_data,
        vocab_size=tokenizer.vocab_size,
    )
