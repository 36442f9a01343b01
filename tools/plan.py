"""Plan a run without devices: memory of every rank, pipeline bubble, communication and time of a layout; --search finds the best one.

Takes every flag of pretrain_gpt.py. A --search keeps those given and chooses the rest of the layout, with --bf16 unless another number
format is given. With --num-microbatches and no model: the schedule alone. GB are 10^9 bytes. Times come from a simple model, described in
core/estimate/costs.py: they are for comparing layouts.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

from _cli import BadArgument, Parser, positive, run

from trivium.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    data_parallel_size,
    flags,
    resolve,
)
from trivium.config.megatron_flags import ALIASES
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.config.validate import validate
from trivium.data.tokenizer import build_tokenizer
from trivium.estimate.run_plan import Layout
from trivium.estimate.costs import Hardware
from trivium.estimate.draw import check_picture, draw
from trivium.estimate.report import as_json, comparison, report, schedule_report, timeline_json
from trivium.estimate.search import Search
from trivium.interop.families import read_flags
from trivium.pipeline.from_flags import placement_of
from trivium.pipeline.plan import Costs, make_plan
from trivium.pipeline.simulate import simulate

EXAMPLE = """python tools/plan.py --preset llama3-8b --num-devices 8 --device-memory-gb 80 --seq-length 8192 --global-batch-size 512 --search
  python tools/plan.py --pipeline-schedule zb-v --pipeline-model-parallel-size 4 --num-microbatches 8 --draw zb-v.png"""
FIXED_ELSEWHERE = {  # what a search cannot keep, and why
    "decoder_first_pipeline_num_layers": "tries even cuts",
    "decoder_last_pipeline_num_layers": "tries even cuts",
    "pipeline_model_parallel_layout": "tries even cuts",
    "num_layers_per_virtual_pipeline_stage": "takes --num-virtual-stages-per-pipeline-rank",
    "num_distributed_optimizer_instances": "tries one copy of the sharded state",
}


def main(argv: list[str]) -> None:
    options, rest = parse(argv)
    if options.draw:
        check_picture(options.draw)
    try:
        request = flags.parse(rest, read_flags)
    except ConfigError as error:
        raise BadArgument("; ".join(error.problems)) from None
    if request.list_presets:
        print("\n".join(f"{name:15} vocabulary {published_vocabulary(name):,}" for name in PRESETS))
        return
    config = request.config
    alone = config.model.num_layers is None
    if options.search and options.num_microbatches:
        raise BadArgument(
            "--num-microbatches cannot be had with --search; give --global-batch-size"
        )
    if options.costs and not alone:
        raise BadArgument("--costs are of a schedule alone; a model's times follow from its shape")
    if alone and (options.search or not options.num_microbatches):
        raise BadArgument(
            "--num-layers is missing; give a model by flags or --preset, or --num-microbatches for a schedule alone"
        )
    if alone:
        plan_schedule(config, options)
    else:
        plan_model(config, options, named(rest, config))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own flags, and the words that are pretrain_gpt.py's."""
    parser = Parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--preset", help="a named model shape, with the vocabulary it was published with"
    )
    parser.add_argument(
        "--num-devices", type=positive, help="tensor x pipeline x context parallel if not given"
    )
    parser.add_argument(
        "--search", action="store_true", help="choose the layout: the fastest that fits"
    )
    parser.add_argument(
        "--num-microbatches",
        type=positive,
        help="in place of --global-batch-size, and for a schedule without a model",
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="the pipeline's timeline as .png or .svg"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--costs", type=costs, help="F,B,W or F,B,W,transfer: times of the schedule alone (1,1,1)"
    )
    device = parser.add_argument_group(
        "device", "by default an H100 SXM, its links at 80 percent of their datasheets' speed"
    )
    h100 = Hardware()
    device.add_argument("--device-memory-gb", type=above_zero, default=h100.memory / 1e9)
    device.add_argument(
        "--reserve-gb",
        type=zero_or_more,
        default=h100.reserve / 1e9,
        help="for context, communicators and fragmentation",
    )
    device.add_argument("--peak-tflops", type=above_zero, help="989 if not given, 67 in fp32")
    device.add_argument(
        "--efficiency",
        type=above_zero,
        default=h100.efficiency,
        help="share of the peak that products and attention reach",
    )
    device.add_argument(
        "--intra-node-gbs",
        type=above_zero,
        default=h100.intra_node / 1e9,
        help="GB/s a device sends inside its node",
    )
    device.add_argument(
        "--inter-node-gbs",
        type=above_zero,
        default=h100.inter_node / 1e9,
        help="GB/s a device sends to another node",
    )
    device.add_argument("--devices-per-node", type=positive, default=h100.devices_per_node)
    dashed = [
        word.partition("=")[0].replace("_", "-") + "".join(word.partition("=")[1:])
        if word.startswith("--")
        else word
        for word in argv
    ]
    options, rest = parser.parse_known_args(dashed)
    if options.preset:
        options.preset = options.preset.replace("_", "-")
        rest += ["--preset", options.preset]
    return options, rest


def plan_schedule(config: Config, options: argparse.Namespace) -> None:
    """Without a model: all stages alike, times in units of one."""
    if config.parallel.num_layers_per_virtual_pipeline_stage:
        raise BadArgument(
            "--num-layers-per-virtual-pipeline-stage needs --num-layers; give --num-virtual-stages-per-pipeline-rank"
        )
    placement, times = placement_of(config.parallel, num_layers=0), options.costs or Costs()
    plan = make_plan(
        placement.schedule, placement.num_ranks, options.num_microbatches, placement.num_chunks
    )
    timeline = simulate(plan, times)
    print(
        json.dumps(timeline_json(timeline))
        if options.json
        else schedule_report(plan, timeline, times)
    )
    if options.draw:
        title = f"{plan.schedule}: {plan.num_ranks} ranks, {plan.num_microbatches} micro-batches, bubble {timeline.bubble:g}"
        draw(timeline, title, "units", options.draw)


def plan_model(config: Config, options: argparse.Namespace, given: set[str]) -> None:
    """With a model: one layout, or the best."""
    vocab_size = vocabulary(config, options.preset)
    parallel = config.parallel
    devices = options.num_devices or (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    config = settled(config, vocab_size)
    if options.search and not given & {"bf16", "fp16"}:
        config = replace(config, precision=replace(config.precision, bf16=True))
    if options.num_microbatches and not options.search and config.batch.micro_batch_size:
        total = (
            options.num_microbatches
            * config.batch.micro_batch_size
            * data_parallel_size(parallel, devices)
        )
        if config.batch.global_batch_size not in (None, total):
            raise BadArgument(
                f"--num-microbatches {options.num_microbatches} makes a global batch of {total}, not {config.batch.global_batch_size}"
            )
        config = replace(config, batch=replace(config.batch, global_batch_size=total))
    hardware = hardware_of(config, options)
    if options.search:
        layouts = searched(config, vocab_size, devices, hardware, given)
    else:
        layouts = [Layout(checked(config, devices), vocab_size, devices, hardware)]
    best = layouts[0]
    print(
        json.dumps(as_json(best))
        if options.json
        else report(best) + (comparison(layouts) if options.search else "")
    )
    if options.draw:
        timeline, shown = best.picture()
        draw(
            timeline,
            f"{best.placement.schedule}: {best.pp} ranks, {shown} of {best.num_microbatches} micro-batches",
            "s",
            options.draw,
        )


def searched(
    config: Config, vocab_size: int, devices: int, hardware: Hardware, given: set[str]
) -> list[Layout]:
    """The best layouts, fastest first."""
    for name in FIXED_ELSEWHERE.keys() & given:
        raise BadArgument(
            f"--{name.replace('_', '-')}: a --search {FIXED_ELSEWHERE[name]}; leave it out"
        )
    if config.batch.global_batch_size is None:
        raise BadArgument("--global-batch-size is missing; a --search needs it")
    # What does not depend on the layout is checked once, on a layout that is always there.
    plain = replace(
        config, parallel=replace(Config().parallel, cp_comm_type=config.parallel.cp_comm_type)
    )
    config = replace(
        checked(replace(plain, batch=replace(config.batch, micro_batch_size=1)), 1),
        parallel=resolve(config, devices).parallel,
    )
    search = Search(config, vocab_size, devices, hardware, given)
    layouts = search.best()
    if not layouts:
        limit = f"--device-memory-gb {hardware.memory / 1e9:g}"
        if search.least is None:
            raise BadArgument(
                f"--num-devices {devices}: none of the layouts divides devices, layers, heads and batch evenly; change one of them"
            )
        raise BadArgument(
            f"{limit}: nothing fits on {devices} devices; the smallest need found is {search.least[0] / 1e9:.1f} GB and the reserve"
        )
    return layouts


def settled(config: Config, vocab_size: int) -> Config:
    """Without all that a plan does not depend on, so that it need not be given."""
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
    optimizer = OptimizerConfig(optimizer=config.optimizer.optimizer, lr=1e-4)
    return replace(
        config,
        batch=batch,
        optimizer=optimizer,
        data=data,
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )


def checked(config: Config, devices: int) -> Config:
    """Resolved; every problem in one line."""
    config = resolve(config, devices)
    if problems := validate(config, devices):
        raise BadArgument("; ".join(problems))
    return config


def vocabulary(config: Config, preset: str | None) -> int:
    """The tokenizer's, else --vocab-size, else the preset's, also where a --config file names one."""
    data, model = config.data, config.model
    if data.tokenizer_type == "NullTokenizer" or data.tokenizer_model or data.vocab_file:
        return build_tokenizer(**resolve(config, 1).data.tokenizer).vocab_size
    if data.vocab_size is not None:
        return data.vocab_size
    shaped = [
        name
        for name, shape in PRESETS.items()
        if all(getattr(model, field) == value for field, value in shape.items())
    ]
    if preset is None and not shaped:
        raise BadArgument("--vocab-size is missing; give it, a tokenizer, or --preset")
    return published_vocabulary(preset or shaped[0])


def named(words: list[str], config: Config) -> set[str]:
    """The fields that the command line names, or a --config file sets to something else than their default."""
    found = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    found = {ALIASES.get(name, (name,))[0].removeprefix("no-").replace("-", "_") for name in found}
    for section in (config.parallel, config.batch, config.precision):
        found |= {
            field.name for field in fields(section) if getattr(section, field.name) != field.default
        }
    return found


def hardware_of(config: Config, options: argparse.Namespace) -> Hardware:
    peak = options.peak_tflops or (
        989.0 if config.precision.bf16 or config.precision.fp16 else 67.0
    )
    return Hardware(
        peak=peak * 1e12,
        efficiency=options.efficiency,
        intra_node=options.intra_node_gbs * 1e9,
        inter_node=options.inter_node_gbs * 1e9,
        devices_per_node=options.devices_per_node,
        memory=options.device_memory_gb * 1e9,
        reserve=options.reserve_gb * 1e9,
    )


def costs(text: str) -> Costs:
    """F,B,W or F,B,W,transfer as an argparse type."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not (
        len(numbers) in (3, 4)
        and min(numbers[:3]) > 0
        and min(numbers) >= 0
        and max(numbers) < float("inf")
    ):
        raise argparse.ArgumentTypeError(f"{text} is not F,B,W or F,B,W,transfer: times above 0")
    return Costs(*numbers)


def above_zero(text: str) -> float:
    """A finite number above 0, as an argparse type."""
    if zero_or_more(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return float(text)


def zero_or_more(text: str) -> float:
    """A finite number of 0 or more, as an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number, 0 or more")
    return number


if __name__ == "__main__":
    run(main)
