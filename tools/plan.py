"""Plan a run without devices: memory, pipeline bubble, communication and time of a layout.

Takes every flag of pretrain_gpt.py, and --search to find the best layout. A --search keeps what is
given and chooses the rest of the layout, with --bf16 unless another number format is given. With
--num-microbatches and no model it plans the schedule alone. GB are 10^9 bytes. Times come from a
simple model, described in core/estimate/costs.py: they are for comparing layouts.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from _cli import BadArgument, Parser, positive, run

from trivium.config import Config, ConfigError, flags, resolve
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.data.tokenizer import build_tokenizer
from trivium.estimate.costs import Hardware
from trivium.estimate.draw import check_picture, draw
from trivium.estimate.flops import h100_peak
from trivium.estimate.planning import (
    devices_of,
    given_fields,
    plan_run,
    plan_schedule,
    search_layouts,
    with_num_microbatches,
)
from trivium.estimate.report import as_json, comparison, report, schedule_report, timeline_json
from trivium.estimate.run_plan import RunPlan
from trivium.interop.families import read_flags
from trivium.pipeline.plan import UNIT_COSTS, Costs

EXAMPLE = (
    "python tools/plan.py --preset llama3-8b --num-devices 8 --device-memory-gb 80 "
    "--seq-length 8192 --global-batch-size 512 --search\n"
    "  python tools/plan.py --pipeline-schedule zb-v --pipeline-model-parallel-size 4 "
    "--num-microbatches 8 --draw zb-v.png"
)
GB = 1e9


def main(argv: list[str]) -> None:
    """Plan what the command line asks for, and print it."""
    options, rest = parse(argv)
    if options.draw:
        check_picture(options.draw)
    try:
        request = flags.parse(rest, read_flags)
        if request.list_presets:
            print_presets()
            return
        config = request.config
        check(options, config)
        if config.model.num_layers is None:
            print_schedule(config, options)
        else:
            print_plans(config, options, given_fields(rest, config))
    except ConfigError as error:
        raise BadArgument("; ".join(error.problems)) from None


def print_presets() -> None:
    """Print every preset with its vocabulary."""
    for name in PRESETS:
        print(f"{name:15} vocabulary {published_vocabulary(name):,}")


def check(options: argparse.Namespace, config: Config) -> None:
    """Raise BadArgument if flags of this tool contradict each other."""
    without_model = config.model.num_layers is None
    if options.search and options.num_microbatches:
        raise BadArgument(
            "--num-microbatches cannot be had with --search; give --global-batch-size"
        )
    if options.costs and not without_model:
        raise BadArgument("--costs are of a schedule alone; a model's times follow from its shape")
    if without_model and (options.search or not options.num_microbatches):
        raise BadArgument(
            "--num-layers is missing; give a model by flags or --preset, "
            "or --num-microbatches for a schedule alone"
        )


def print_schedule(config: Config, options: argparse.Namespace) -> None:
    """Plan a schedule without a model, all stages alike, in units of time."""
    costs = options.costs or UNIT_COSTS
    found = plan_schedule(config.parallel, options.num_microbatches, costs)
    plan, timeline = found.plan, found.timeline
    if options.json:
        print(json.dumps(timeline_json(timeline)))
    else:
        print(schedule_report(plan, timeline, found.costs))
    if options.draw:
        ranks = f"{plan.num_ranks} ranks, {plan.num_microbatches} micro-batches"
        title = f"{plan.schedule}: {ranks}, bubble {timeline.bubble:g}"
        draw(timeline, title, "units", options.draw)


def print_plans(config: Config, options: argparse.Namespace, given: set[str]) -> None:
    """Plan a model in the given layout, or search for the best one."""
    plans = plans_of(config, options, given)
    best = plans[0]
    if options.json:
        print(json.dumps(as_json(best)))
    else:
        print(report(best) + (comparison(plans) if options.search else ""))
    if options.draw:
        timeline, shown = best.picture()
        micro_batches = f"{shown} of {best.num_microbatches} micro-batches"
        title = f"{best.schedule}: {best.pp} ranks, {micro_batches}"
        draw(timeline, title, "s", options.draw)


def plans_of(config: Config, options: argparse.Namespace, given: set[str]) -> list[RunPlan]:
    """Return the plan of the given layout, or those of a search, fastest first."""
    vocab_size = vocabulary(config, options.preset)
    devices = options.num_devices or devices_of(config.parallel)
    if options.search:
        if not given & {"bf16", "fp16"}:
            config = replace(config, precision=replace(config.precision, bf16=True))
        return search_layouts(config, vocab_size, devices, hardware_of(config, options), given)
    if options.num_microbatches:
        config = with_num_microbatches(config, options.num_microbatches, devices)
    return [plan_run(config, vocab_size, devices, hardware_of(config, options))]


def vocabulary(config: Config, preset: str | None) -> int:
    """Return the size of the vocabulary: the tokenizer's, else --vocab-size, else the preset's.

    A model shaped like a preset, as from a --config file that names it, has the preset's too.
    """
    data, model = config.data, config.model
    if data.tokenizer_type == "NullTokenizer" or data.tokenizer_model or data.vocab_file:
        return build_tokenizer(**resolve(config, 1).data.tokenizer).vocab_size
    if data.vocab_size is not None:
        return data.vocab_size
    if preset is not None:
        return published_vocabulary(preset)
    for name, shape in PRESETS.items():
        if all(getattr(model, field) == value for field, value in shape.items()):
            return published_vocabulary(name)
    raise BadArgument("--vocab-size is missing; give it, a tokenizer, or --preset")


def hardware_of(config: Config, options: argparse.Namespace) -> Hardware:
    """Return the devices that the command line describes."""
    peak = h100_peak(config.precision)
    if options.peak_tflops:
        peak = options.peak_tflops * 1e12
    return Hardware(
        peak=peak,
        efficiency=options.efficiency,
        intra_node=options.intra_node_gbs * GB,
        inter_node=options.inter_node_gbs * GB,
        devices_per_node=options.devices_per_node,
        memory=options.device_memory_gb * GB,
        reserve=options.reserve_gb * GB,
    )


# The command line.


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this tool's own flags, and the words that are pretrain_gpt.py's."""
    parser = Parser(__doc__, EXAMPLE)
    add_flags(parser)
    add_device_flags(parser)
    options, rest = parser.parse_known_args([dashed(word) for word in argv])
    if options.preset:
        options.preset = options.preset.replace("_", "-")
        rest += ["--preset", options.preset]
    return options, rest


def dashed(word: str) -> str:
    """Write a flag with dashes, whatever its value is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def add_flags(parser: Parser) -> None:
    """Add the flags that say what to plan and how to show it."""
    add = parser.add_argument
    add("--preset", help="a named model shape, with the vocabulary it was published with")
    add(
        "--num-devices",
        type=positive,
        help="tensor x pipeline x context parallel if not given",
    )
    add("--search", action="store_true", help="choose the layout: the fastest that fits")
    add(
        "--num-microbatches",
        type=positive,
        help="in place of --global-batch-size, and for a schedule without a model",
    )
    add("--draw", type=Path, metavar="FILE", help="the pipeline's timeline as .png or .svg")
    add("--json", action="store_true", help="print one object")
    add(
        "--costs",
        type=costs,
        help="F,B,W or F,B,W,transfer: times of the schedule alone (1,1,1)",
    )


def add_device_flags(parser: Parser) -> None:
    """Add the flags that describe a device and its links."""
    group = parser.add_argument_group(
        "device", "by default an H100 SXM, its links at 80 percent of their datasheets' speed"
    )
    add, h100 = group.add_argument, Hardware()
    add("--device-memory-gb", type=above_zero, default=h100.memory / GB)
    add(
        "--reserve-gb",
        type=zero_or_more,
        default=h100.reserve / GB,
        help="for context, communicators and fragmentation",
    )
    add("--peak-tflops", type=above_zero, help="989 if not given, 67 in fp32")
    add(
        "--efficiency",
        type=above_zero,
        default=h100.efficiency,
        help="share of the peak that products and attention reach",
    )
    add(
        "--intra-node-gbs",
        type=above_zero,
        default=h100.intra_node / GB,
        help="GB/s a device sends inside its node",
    )
    add(
        "--inter-node-gbs",
        type=above_zero,
        default=h100.inter_node / GB,
        help="GB/s a device sends to another node",
    )
    add("--devices-per-node", type=positive, default=h100.devices_per_node)


def costs(text: str) -> Costs:
    """Read F,B,W or F,B,W,transfer, as an argparse type."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    counted = len(numbers) in (3, 4)
    finite = counted and max(numbers) < float("inf")
    positive_times = counted and min(numbers[:3]) > 0 and min(numbers) >= 0
    if not (finite and positive_times):
        raise argparse.ArgumentTypeError(f"{text} is not F,B,W or F,B,W,transfer: times above 0")
    return Costs(*numbers)


def above_zero(text: str) -> float:
    """Read a finite number above 0, as an argparse type."""
    if zero_or_more(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return float(text)


def zero_or_more(text: str) -> float:
    """Read a finite number of 0 or more, as an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number, 0 or more")
    return number


if __name__ == "__main__":
    run(main)
