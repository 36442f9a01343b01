"""Say what a plan found: tables for people, one object for programs.

Every section of the report is a function from a RunPlan to text. Bytes are printed in GB of 10^9.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..pipeline.plan import Costs, Plan
from ..pipeline.simulate import Timeline
from .costs import PassTimes
from .parameters import total_parameters
from .run_plan import RankMemory, RunPlan

GB = 1e9
ROWS = 12  # of a table of pipeline ranks; of more ranks, the ends and the fullest are shown
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022)
LETTERS = (
    "b micro-batch, t = T/cp, s = t/tp with sequence parallel else t, h hidden, k = K D/tp, "
    "e bytes of a number, m micro-batches, P parameters here"
)


def report(plan: RunPlan) -> str:
    """Say everything about one layout."""
    sections = [summary, memory, pipeline, communication, seconds]
    return "\n\n".join(section(plan) for section in sections)


# The run and its flags.


def summary(plan: RunPlan) -> str:
    """Say the size of the model, the layout, and how far an update gets."""
    batch = plan.config.batch
    parameters = total_parameters(plan.model, plan.vocab_size)
    tokens = batch.global_batch_size * batch.seq_length
    updates = -(-CHINCHILLA * parameters // tokens)
    budget = (
        f"{tokens:,} tokens an update; {CHINCHILLA} tokens a parameter after {updates:,} updates"
    )
    if batch.train_iters > 1:
        per_parameter = tokens * batch.train_iters / parameters
        budget += f", {per_parameter:.1f} after {batch.train_iters:,}"
    lines = [
        f"{parameters:,} parameters with a vocabulary of {plan.vocab_size:,}",
        f"{plan.num_devices} devices: {' '.join(flags_of(plan))}",
        budget,
    ]
    return "\n".join(lines)


def flags_of(plan: RunPlan) -> list[str]:
    """Return the command line of a layout."""
    batch, precision = plan.config.batch, plan.config.precision
    flags = [f"--{name}" for name in ("bf16", "fp16") if getattr(precision, name)]
    flags += _layout_flags(plan)
    flags.append(f"--data-parallel-sharding-strategy {plan.strategy}")
    if plan.config.parallel.recompute_granularity:
        flags.append(f"--recompute-granularity {plan.config.parallel.recompute_granularity}")
    flags.append(f"--micro-batch-size {batch.micro_batch_size}")
    flags.append(f"--global-batch-size {batch.global_batch_size}")
    flags.append(f"--seq-length {batch.seq_length}")
    return flags


def _layout_flags(plan: RunPlan) -> list[str]:
    """Return the flags of the axes and of the pipeline; those at their default are left out."""
    parallel = plan.config.parallel
    sizes = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
    )
    stages = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
    )
    switches = (
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "overlap_grad_reduce",
        "overlap_param_gather",
    )
    flags = [_flag(parallel, name) for name in sizes if getattr(parallel, name) > 1]
    if plan.pass_spec.sequence_parallel:
        flags.append("--sequence-parallel")
    if plan.cp > 1:
        flags.append(f"--cp-comm-type {parallel.cp_comm_type}")
    if plan.pp > 1:
        flags.append(f"--pipeline-schedule {plan.schedule}")
    by_hand = parallel.pipeline_model_parallel_layout is not None
    if plan.schedule == "interleaved" and not by_hand:
        flags.append(f"--num-virtual-stages-per-pipeline-rank {plan.num_chunks}")
    flags += [_flag(parallel, name) for name in stages if getattr(parallel, name) is not None]
    flags += [_dashed(name) for name in switches if getattr(parallel, name)]
    return flags


def _flag(section: Any, name: str) -> str:
    return f"{_dashed(name)} {getattr(section, name)}"


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# Memory.


def memory(plan: RunPlan) -> str:
    """Say the memory of each pipeline rank in a row: the devices that share it are alike."""
    columns = "rank|layers|parameters|weights|gradients|optimizer|transient|activations"
    columns += "|in flight|working|total"
    rows = [_memory_row(plan, rank) for rank in _ranks_shown(plan)]
    fullest, device = plan.fullest, plan.hardware
    need = f"pipeline rank {fullest.rank} with {fullest.total / GB:.1f} GB"
    limit = f"{device.memory / GB:g} GB less {device.reserve / GB:g} of reserve"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        "memory of a device by pipeline rank, GB",
        _table(columns.split("|"), rows),
        f"fullest: {need}; {limit}: {verdict}",
    ]
    return "\n".join(lines)


def _memory_row(plan: RunPlan, rank: RankMemory) -> list[str]:
    state = rank.state
    sizes = [state.weights, state.gradients, state.optimizer, state.transient, rank.activations]
    return [
        f"{rank.rank}",
        f"{plan.num_layers(rank.rank)}",
        f"{state.parameters:,}",
        *(f"{size / GB:.2f}" for size in sizes),
        f"{rank.in_flight:g}",
        f"{rank.working / GB:.2f}",
        f"{rank.total / GB:.2f}",
    ]


def _ranks_shown(plan: RunPlan) -> list[RankMemory]:
    """Return all ranks, or of many those at the ends and the fullest."""
    ranks = plan.memory
    if len(ranks) <= ROWS:
        return ranks
    half = ROWS // 2
    first, last = ranks[:half], ranks[-half:]
    middle = [rank for rank in ranks[half:-half] if rank is plan.fullest]
    return [*first, *middle, *last]


# The pipeline.


def pipeline(plan: RunPlan) -> str:
    """Say the schedule, the times of a rank, and the bubble."""
    total = sum((plan.rank_times(rank) for rank in range(plan.pp)), PassTimes())
    times = total * (1 / plan.pp)
    forward, backward = times.forward * 1e3, times.backward_input * 1e3
    weights = times.backward_weight * 1e3
    lines = [
        f"pipeline: {plan.schedule}, {plan.pp} ranks x {plan.num_chunks} chunks, "
        f"{plan.num_microbatches} micro-batches",
        f"F {forward:.1f}, B {backward:.1f}, W {weights:.1f} ms of a rank and micro-batch",
        f"makespan {plan.makespan:.3f} s, of which the busiest rank waits {plan.bubble:.2%}; "
        f"largest bubble {plan.timeline.bubble:.3f} s",
    ]
    return "\n".join(lines)


# Communication.


def communication(plan: RunPlan) -> str:
    """Say the bytes that are sent over each axis, and what they are made of."""
    rows = []
    for rank in _ranks_shown(plan):
        sizes = plan.sent(rank.rank).values()
        rows.append([f"{rank.rank}", *(f"{size / GB:.2f}" for size in sizes)])
    extents = {
        "tp": plan.tp,
        "cp": plan.tp * plan.cp,
        "pp": plan.num_devices,
        "dp": plan.tp * plan.copies,
    }
    link = plan.hardware.link
    speeds = ", ".join(f"{axis} {link(extent) / GB:g}" for axis, extent in extents.items())
    head = (
        "communication: GB that each device of a pipeline rank sends in an update; "
        f"GB/s by {plan.hardware.devices_per_node} devices a node: {speeds}"
    )
    table = _table(["rank", "tp", "cp", "pp", "dp"], rows)
    return "\n".join([head, table, *formulas(plan), f"  ({LETTERS})"])


def formulas(plan: RunPlan) -> list[str]:
    """Say where the bytes come from, a line for each axis there is."""
    lines = []
    if plan.tp > 1:
        lines.append(f"  tp: {_tensor_formula(plan)}")
    if plan.cp > 1:
        lines.append(f"  cp: {_context_formula(plan)}")
    if plan.pp > 1:
        lines.append(
            "  pp: e b s h for each activation and each gradient that goes to another rank, m times"
        )
    if plan.copies > 1:
        lines.append(f"  dp: {_data_formula(plan)}")
    return lines


def _tensor_formula(plan: RunPlan) -> str:
    spec = plan.pass_spec
    times = 10 if spec.sequence_parallel else 8
    if spec.recompute == "full":
        times += 4
    ways = "gathers and scatters" if spec.sequence_parallel else "halves of all-reduces"
    return f"{times} {ways} of e b t h (tp-1)/tp a layer and micro-batch; embedding, head and loss"


def _context_formula(plan: RunPlan) -> str:
    ways = {
        "p2p": (
            "2 b t k (2 e (cp-1) + 4 cp) a layer and micro-batch: "
            "k and v round the ring twice, their fp32 gradient once"
        ),
        "allgather": (
            "2 b t k (cp-1) (e + 4) a layer and micro-batch: "
            "k and v gathered, their fp32 gradient scattered"
        ),
        "a2a": "2 e b (cp-1)/cp (q, k, v and o) a layer and micro-batch",
    }
    again = ", and what is computed again" if plan.pass_spec.recompute else ""
    return ways[plan.pass_spec.cp_comm_type] + again


def _data_formula(plan: RunPlan) -> str:
    ways = {
        "no_shard": "8 P (d-1)/d",
        "optim": "(4 + e) P (d-1)/d",
        "optim_grads": "(4 m + e) P (d-1)/d",
        "optim_grads_params": "m (4 + 2 e) P (d-1)/d",
    }
    ranks = plan.shards if plan.shards > 1 else plan.copies
    repeated = ""
    if 1 < plan.shards < plan.copies:
        repeated = ", and 8 P/d between the copies of a shard"
    return f"{ways[plan.strategy]}, d = {ranks} of dp x cp{repeated}"


# Time.


def seconds(plan: RunPlan) -> str:
    """Say the time of an update, tokens a second and MFU."""
    device, batch = plan.hardware, plan.config.batch
    step = plan.step_seconds
    tokens = batch.global_batch_size * batch.seq_length / step
    rate = f"{device.peak / 1e12:g} TFLOP/s x {device.efficiency:g}"
    parts = (
        f"pipeline {plan.makespan:.3f} s, "
        f"data parallel that nothing hides {step - plan.makespan:.3f} s"
    )
    full, causal = plan.utilization(causal=False), plan.utilization(causal=True)
    lines = [
        f"time of an update (estimate at {rate}): {step:.3f} s: {parts}",
        f"{tokens:,.0f} tokens/s, {tokens / plan.num_devices:,.0f} a device; "
        f"MFU {full:.1%} (full attention), {causal:.1%} (causal)",
    ]
    return "\n".join(lines)


# A search, and a schedule alone.


def comparison(plans: Sequence[RunPlan]) -> str:
    """Say the best layouts of a search, a row each."""
    columns = "tp|pp|cp|dp|schedule|chunks|micro|sharding|recompute|bubble|GB|s"
    table = _table(columns.split("|"), [_comparison_row(plan) for plan in plans])
    return f"\n\nthe best layouts found\n{table}"


def _comparison_row(plan: RunPlan) -> list[str]:
    spec = plan.pass_spec
    return [
        f"{plan.tp}+SP" if spec.sequence_parallel else f"{plan.tp}",
        f"{plan.pp}",
        f"{plan.cp}",
        f"{plan.dp}",
        plan.schedule if plan.pp > 1 else "-",
        f"{plan.num_chunks}",
        f"{spec.micro_batch}",
        plan.strategy,
        spec.recompute or "none",
        f"{plan.bubble:.1%}",
        f"{plan.fullest.total / GB:.1f}",
        f"{plan.step_seconds:.3f}",
    ]


def schedule_report(plan: Plan, timeline: Timeline, costs: Costs) -> str:
    """Say what a schedule is like without a model."""
    ranks = zip(timeline.busy, timeline.bubbles, timeline.peak_activations, strict=True)
    rows = [
        [f"{rank}", f"{busy:g}", f"{bubble:g}", f"{peak:g}"]
        for rank, (busy, bubble, peak) in enumerate(ranks)
    ]
    waits = 1 - max(timeline.busy) / timeline.makespan
    lines = [
        f"{plan.schedule}: {plan.num_ranks} ranks x {plan.num_chunks} chunks, "
        f"{plan.num_microbatches} micro-batches",
        f"F {costs.forward:g}, B {costs.backward_input:g}, W {costs.backward_weight:g} "
        f"of a rank and micro-batch; transfer {costs.transfer:g}",
        _table(["rank", "busy", "bubble", "activations"], rows),
        "bubble: last end - first start - busy; "
        "activations: the most micro-batches held at a time, a chunk's counting 1/chunks",
        f"makespan {timeline.makespan:g}, of which the busiest rank waits {waits:.2%}; "
        f"largest bubble {timeline.bubble:g}",
    ]
    return "\n".join(lines)


# For programs.


def timeline_json(timeline: Timeline) -> dict[str, Any]:
    """Return what `schedule_report` says, nothing rounded, in the unit of the costs."""
    return {
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "busy": timeline.busy,
        "bubbles": timeline.bubbles,
        "peak_activations": timeline.peak_activations,
    }


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Return what `report` says in bytes and seconds, nothing rounded."""
    ranks = []
    for rank in plan.memory:
        ranks.append(asdict(rank) | {"total": rank.total, "sent": plan.sent(rank.rank)})
    return {
        "parameters": total_parameters(plan.model, plan.vocab_size),
        "flags": " ".join(flags_of(plan)),
        "num_devices": plan.num_devices,
        "num_microbatches": plan.num_microbatches,
        "ranks": ranks,
        "fullest_rank": plan.fullest.rank,
        "fits": plan.fits,
        "makespan_seconds": plan.makespan,
        "bubble": plan.bubble,
        "step_seconds": plan.step_seconds,
        "mfu": plan.utilization(causal=False),
        "mfu_causal": plan.utilization(causal=True),
    }


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = []
    for row in (columns, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)
