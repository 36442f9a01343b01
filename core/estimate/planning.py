"""Go from the flags of a run to its plan, to the best plans of a search, or to a schedule alone.

    plan_run          one layout, as it is given
    search_layouts    the best layouts, fastest first
    plan_schedule     a schedule without a model

A plan needs neither data nor a learning rate nor a folder: `without_run_details` stands in for
those. tools/plan.py is the command over these functions, report.py says what they found.
"""

from collections.abc import Sequence, Set
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ..config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FlagError,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    data_parallel_size,
    resolve,
)
from ..config.megatron_flags import ALIASES
from ..config.validate import validate
from ..pipeline.from_flags import placement_of
from ..pipeline.plan import UNIT_COSTS, Costs, Plan, make_plan
from ..pipeline.simulate import Timeline, simulate
from .costs import Hardware
from .flops import h100_peak
from .run_plan import RunPlan
from .search import Search

# What a search cannot keep, and what it does in its place.
NOT_SEARCHED = {
    "decoder_first_pipeline_num_layers": "tries even cuts",
    "decoder_last_pipeline_num_layers": "tries even cuts",
    "pipeline_model_parallel_layout": "tries even cuts",
    "num_layers_per_virtual_pipeline_stage": "takes --num-virtual-stages-per-pipeline-rank",
    "num_distributed_optimizer_instances": "tries one copy of the sharded state",
}


# One layout.


def plan_run(
    config: Config, vocab_size: int, num_devices: int, hardware: Hardware | None = None
) -> RunPlan:
    """Plan a run as its flags say.

    vocab_size: without padding. hardware: H100s if None.

    Raises ConfigError if the configuration cannot run on so many devices.
    """
    config = _checked(without_run_details(config, vocab_size), num_devices)
    hardware = hardware or Hardware(peak=h100_peak(config.precision))
    return RunPlan(config, vocab_size, num_devices, hardware)


def devices_of(parallel: ParallelConfig) -> int:
    """Return the least number of devices of a layout: one copy of the model."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def with_num_microbatches(config: Config, num_microbatches: int, num_devices: int) -> Config:
    """Set the global batch to so many micro-batches. Raises FlagError if another one is given."""
    batch = config.batch
    if not batch.micro_batch_size:
        return config  # which `plan_run` finds to be missing
    samples = batch.micro_batch_size * data_parallel_size(config.parallel, num_devices)
    total = num_microbatches * samples
    if batch.global_batch_size not in (None, total):
        raise FlagError(
            f"--num-microbatches {num_microbatches} makes a global batch of {total}, "
            f"not {batch.global_batch_size}"
        )
    return replace(config, batch=replace(batch, global_batch_size=total))


def without_run_details(config: Config, vocab_size: int) -> Config:
    """Fill in what a plan does not depend on, so that it need not be given."""
    data = DataConfig(
        mock_data=True,
        tokenizer_type="NullTokenizer",
        vocab_size=max(1, vocab_size - 1),
        reset_attention_mask=config.data.reset_attention_mask,
        reset_position_ids=config.data.reset_position_ids,
    )
    batch = config.batch
    if batch.train_iters is None and batch.train_samples is None:
        batch = replace(batch, train_iters=1)
    return replace(
        config,
        batch=batch,
        optimizer=OptimizerConfig(optimizer=config.optimizer.optimizer, lr=1e-4),
        data=data,
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )


def _checked(config: Config, num_devices: int) -> Config:
    """Resolve a configuration. Raises ConfigError with every problem."""
    config = resolve(config, num_devices)
    if problems := validate(config, num_devices):
        raise ConfigError(problems)
    return config


# A search.


def search_layouts(
    config: Config,
    vocab_size: int,
    num_devices: int,
    hardware: Hardware | None = None,
    given: Set[str] = frozenset(),
) -> list[RunPlan]:
    """Return the best layouts, fastest first.

    given: names of the fields of the layout that stay as they are. hardware: H100s if None.

    Raises FlagError if nothing fits or no layout divides devices, layers, heads and batch, and
    ConfigError for what is wrong with every layout.
    """
    for name in NOT_SEARCHED.keys() & given:
        flag = f"--{name.replace('_', '-')}"
        raise FlagError(f"{flag}: a --search {NOT_SEARCHED[name]}; leave it out")
    if config.batch.global_batch_size is None:
        raise FlagError("--global-batch-size is missing; a --search needs it")
    hardware = hardware or Hardware(peak=h100_peak(config.precision))
    config = _plain(without_run_details(config, vocab_size), num_devices)
    search = Search(config, vocab_size, num_devices, hardware, given)
    plans = search.best()
    if plans:
        return plans
    if search.least is None:
        raise FlagError(
            f"--num-devices {num_devices}: none of the layouts divides devices, layers, heads and "
            "batch evenly; change one of them"
        )
    raise FlagError(
        f"--device-memory-gb {hardware.memory / 1e9:g}: nothing fits on {num_devices} devices; "
        f"the smallest need found is {search.least / 1e9:.1f} GB and the reserve"
    )


def _plain(config: Config, num_devices: int) -> Config:
    """Resolve a configuration for a search, and check what does not depend on the layout.

    That is checked once, on a layout that is always there: one device, one sample at a time.
    """
    one_device = replace(ParallelConfig(), cp_comm_type=config.parallel.cp_comm_type)
    one_sample = replace(config.batch, micro_batch_size=1)
    checked = _checked(replace(config, parallel=one_device, batch=one_sample), 1)
    return replace(checked, parallel=resolve(config, num_devices).parallel)


def given_fields(words: Sequence[str], config: Config) -> set[str]:
    """Return the fields that a command line gives, of those that a search would choose.

    words: of the command line. config: what it was parsed to; a field that a --config file sets to
    something else than its default counts as given too.
    """
    found = set()
    for word in words:
        # A flag counts as given even with the value of its default: the user has decided it.
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            name = ALIASES.get(name, (name,))[0]
            found.add(name.removeprefix("no-").replace("-", "_"))
    for section in (config.parallel, config.batch, config.precision):
        found |= _changed_fields(section)
    return found


def _changed_fields(section: Any) -> set[str]:
    return {item.name for item in fields(section) if getattr(section, item.name) != item.default}


# A schedule alone.


class SchedulePlan(NamedTuple):
    """A schedule without a model: all stages are alike, times are in units of one."""

    plan: Plan
    timeline: Timeline
    costs: Costs


def plan_schedule(
    parallel: ParallelConfig, num_microbatches: int, costs: Costs = UNIT_COSTS
) -> SchedulePlan:
    """Plan and simulate the schedule of a layout. costs: of a rank and micro-batch.

    Raises FlagError if the flags do not fit each other, or need a model.
    """
    if parallel.num_layers_per_virtual_pipeline_stage:
        raise FlagError(
            "--num-layers-per-virtual-pipeline-stage needs --num-layers; "
            "give --num-virtual-stages-per-pipeline-rank"
        )
    placement = placement_of(parallel, num_layers=0)
    plan = make_plan(
        placement.schedule, placement.num_ranks, num_microbatches, placement.num_chunks
    )
    return SchedulePlan(plan, simulate(plan, costs), costs)
