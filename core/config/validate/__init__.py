"""Check a configuration and report every problem at once.

Each problem is one line with the flag, the numbers that do not fit, and a remedy. A check is a
generator of such lines; checks of one subject are a module. A check skips what another check has
found: a layout of 0 processes is reported once, and not again by everything that divides by it.
"""

from collections.abc import Iterator

from ..fields import Config, ModelConfig, flag_of
from .data import check_data
from .files import check_checkpoint, check_logging
from .model import check_model
from .parallel import check_parallel
from .training import check_batch, check_optimizer, check_precision

_CHECKS = (
    check_model,
    check_parallel,
    check_batch,
    check_optimizer,
    check_precision,
    check_data,
    check_checkpoint,
    check_logging,
)


def validate(config: Config, world_size: int) -> list[str]:
    """Return all problems of a resolved configuration on `world_size` processes."""
    problems = list(_missing(config))
    for check in _CHECKS:
        problems += check(config, world_size)
    return problems


def model_problems(config: ModelConfig) -> list[str]:
    """Return the problems of a model by itself, whatever it is trained on and how it is cut."""
    return list(check_model(Config(model=config), 1))


def _missing(config: Config) -> Iterator[str]:
    needed = {
        "num_layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "num_attention_heads": config.model.num_attention_heads,
        "seq_length": config.batch.seq_length,
        "micro_batch_size": config.batch.micro_batch_size,
        "lr": config.optimizer.lr,
    }
    for name, value in needed.items():
        if value is None:
            preset = ", or a model by --preset" if hasattr(config.model, name) else ""
            flag = flag_of(name)
            yield f"{flag} is missing; give it on the command line, in a --config file{preset}"
    if config.batch.train_iters is None and config.batch.train_samples is None:
        yield "--train-iters is missing; give it, or --train-samples"
