"""Checks of the batch, the optimizer and the number formats."""

from collections.abc import Iterator

from ..defaults import data_parallel_size
from ..fields import BatchConfig, Config, OptimizerConfig
from .words import nearest_multiples, not_negative, positive, share


def check_batch(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of batch sizes and of the length of the run."""
    sizes = config.batch
    yield from positive(
        sizes,
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "train_samples",
        "exit_interval",
        "exit_duration_in_mins",
    )
    iters, samples = sizes.train_iters, sizes.train_samples
    if iters is not None and iters <= 0:
        given = f"--train-iters {iters}"
        if samples:
            given = f"--train-samples {samples} is less than one batch"
        yield f"{given}: there must be at least 1 iteration"
    yield from _global_batch(sizes, data_parallel_size(config.parallel, world_size))
    # `resolve` makes iterations of samples: another number of them was given beside.
    total = sizes.global_batch_size
    if samples and iters and total and iters != samples // total:
        yield f"--train-samples {samples} and --train-iters {iters} are both given; give one"
    if not 0 <= sizes.seed < 2**32:
        yield f"--seed {sizes.seed} is not in [0, 2^32)"


def _global_batch(sizes: BatchConfig, dp: int) -> Iterator[str]:
    """Yield a problem where a global batch is no whole number of micro-batches on each replica."""
    micro, total = sizes.micro_batch_size, sizes.global_batch_size
    if not micro or not total or micro < 0 or total < 0:
        return
    # Each replica runs whole micro-batches, and all run as many.
    unit = micro * dp
    if total % unit:
        yield (
            f"--global-batch-size {total} is not a multiple of "
            f"--micro-batch-size {micro} x data parallel {dp} = {unit}; "
            f"nearest that work: {nearest_multiples(total, unit)}"
        )


def check_optimizer(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of the optimizer and of its learning rates."""
    rule = config.optimizer
    yield from _rates(rule)
    yield from _schedule(rule)
    yield from share(rule, "adam_beta1", "adam_beta2", "sgd_momentum")
    yield from not_negative(rule, "weight_decay", "clip_grad", "adam_eps")


def _rates(rule: OptimizerConfig) -> Iterator[str]:
    """Yield the problems of the rates that the schedule moves between."""
    lr = rule.lr
    if lr is None:
        return
    if lr <= 0:
        yield f"--lr {lr} must be above 0"
    if not 0 <= rule.min_lr <= lr:
        yield f"--min-lr {rule.min_lr} is not between 0 and --lr {lr}"
    if not 0 <= rule.lr_warmup_init <= lr:
        yield f"--lr-warmup-init {rule.lr_warmup_init} is not between 0 and --lr {lr}"


def _schedule(rule: OptimizerConfig) -> Iterator[str]:
    """Yield the problems of the phases: warm-up, decay, and the last phase of WSD."""
    yield from positive(rule, "lr_decay_iters", "lr_wsd_decay_iters")
    fraction, warmup = rule.lr_warmup_fraction, rule.lr_warmup_iters
    decay, last_phase = rule.lr_decay_iters, rule.lr_wsd_decay_iters
    if fraction is not None and not 0 <= fraction < 1:
        yield f"--lr-warmup-fraction {fraction} is not in [0, 1)"
    if fraction is not None and warmup:
        given = f"--lr-warmup-fraction {fraction} and --lr-warmup-iters {warmup}"
        yield f"{given} are both given; give one"
    if decay and fraction is None and not 0 <= warmup < decay:
        yield (
            f"--lr-warmup-iters {warmup} is not below --lr-decay-iters {decay}; "
            f"warm up for at most {decay - 1}"
        )
    if rule.lr_decay_style == "WSD" and last_phase is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters"
    if last_phase and decay and last_phase > decay:
        yield f"--lr-wsd-decay-iters {last_phase} is more than --lr-decay-iters {decay}"


def check_precision(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of number formats and loss scaling."""
    formats = config.precision
    if formats.bf16 and formats.fp16:
        yield "--bf16 and --fp16 exclude each other; give one"
    if formats.loss_scale is not None and not formats.fp16:
        yield f"--loss-scale {formats.loss_scale} needs --fp16"
    yield from positive(
        formats,
        "loss_scale",
        "initial_loss_scale",
        "min_loss_scale",
        "loss_scale_window",
        "hysteresis",
    )
