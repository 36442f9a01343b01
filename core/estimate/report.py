"""What tools/plan.py prints: tables for people, one object for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..pipeline.plan import Costs, Plan
from ..pipeline.simulate import Timeline
from .run_plan import Layout, RankMemory
from .costs import Times
from .flops import total_parameters

GB = 1e9
ROWS = 12  # of a table of ranks; of more, the ends and the fullest
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022)
LETTERS = "b micro-batch, t = T/cp, s = t/tp with sequence parallel else t, h hidden, k = K D/tp, e bytes of a number, m micro-batches, P parameters here"


def report(layout: Layout) -> str:
    """Everything about one layout."""
    return "\n\n".join(
        [summary(layout), memory(layout), pipeline(layout), communication(layout), seconds(layout)]
    )


def summary(layout: Layout) -> str:
    batch, model = layout.config.batch, layout.model
    parameters = total_parameters(model, layout.vocab_size)
    tokens = batch.global_batch_size * batch.seq_length
    words = [
        f"{parameters:,} parameters with a vocabulary of {layout.vocab_size:,}",
        f"{layout.num_devices} devices: {' '.join(flags_of(layout))}",
    ]
    updates = -(-CHINCHILLA * parameters // tokens)
    budget = (
        f"{tokens:,} tokens an update; {CHINCHILLA} tokens a parameter after {updates:,} updates"
    )
    if batch.train_iters > 1:
        budget += f", {tokens * batch.train_iters / parameters:.1f} after {batch.train_iters:,}"
    return "\n".join([*words, budget])


def flags_of(layout: Layout) -> list[str]:
    """The command line of the layout."""
    parallel, batch, precision = (
        layout.config.parallel,
        layout.config.batch,
        layout.config.precision,
    )
    words = [f"--{name}" for name in ("bf16", "fp16") if getattr(precision, name)]
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
    ):
        words += (
            [f"--{name.replace('_', '-')} {getattr(parallel, name)}"]
            if getattr(parallel, name) > 1
            else []
        )
    words += ["--sequence-parallel"] if layout.cut.sequence_parallel else []
    words += [f"--cp-comm-type {parallel.cp_comm_type}"] if layout.cp > 1 else []
    words += [f"--pipeline-schedule {layout.placement.schedule}"] if layout.pp > 1 else []
    if (
        layout.placement.schedule == "interleaved"
        and parallel.pipeline_model_parallel_layout is None
    ):
        words.append(f"--num-virtual-stages-per-pipeline-rank {layout.placement.num_chunks}")
    for name in (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
    ):
        words += (
            [f"--{name.replace('_', '-')} {getattr(parallel, name)}"]
            if getattr(parallel, name) is not None
            else []
        )
    for name in (
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "overlap_grad_reduce",
        "overlap_param_gather",
    ):
        words += [f"--{name.replace('_', '-')}"] if getattr(parallel, name) else []
    words.append(f"--data-parallel-sharding-strategy {layout.strategy}")
    if parallel.recompute_granularity:
        words.append(f"--recompute-granularity {parallel.recompute_granularity}")
    return [
        *words,
        f"--micro-batch-size {batch.micro_batch_size}",
        f"--global-batch-size {batch.global_batch_size}",
        f"--seq-length {batch.seq_length}",
    ]


def memory(layout: Layout) -> str:
    """One row for each pipeline rank: the devices that share it are alike."""
    columns = [
        "rank",
        "layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "transient",
        "activations",
        "in flight",
        "working",
        "total",
    ]
    rows = [_memory_row(layout, rank) for rank in _chosen(layout)]
    fullest, device = layout.fullest, layout.hardware
    limit = f"{device.memory / GB:g} GB less {device.reserve / GB:g} of reserve"
    said = f"fullest: pipeline rank {fullest.rank} with {fullest.total / GB:.1f} GB; {limit}: {'fits' if layout.fits else 'DOES NOT FIT'}"
    return "\n".join(["memory of a device by pipeline rank, GB", _table(columns, rows), said])


def _memory_row(layout: Layout, rank: RankMemory) -> list[str]:
    state = rank.state
    layers = sum(chunk.layers for chunk in layout.chunks(rank.rank))
    bytes_of = (state.weights, state.gradients, state.optimizer, state.transient, rank.activations)
    numbers = [f"{size / GB:.2f}" for size in bytes_of]
    return [
        f"{rank.rank}",
        f"{layers}",
        f"{state.parameters:,}",
        *numbers,
        f"{rank.in_flight:g}",
        f"{rank.working / GB:.2f}",
        f"{rank.total / GB:.2f}",
    ]


def _chosen(layout: Layout) -> list[RankMemory]:
    ranks = layout.memory
    if len(ranks) <= ROWS:
        return ranks
    half = ROWS // 2
    return [
        rank
        for rank in ranks
        if rank.rank < half or rank.rank >= len(ranks) - half or rank is layout.fullest
    ]


def pipeline(layout: Layout) -> str:
    placement, m = layout.placement, layout.num_microbatches
    times = sum((layout.rank_times(rank) for rank in range(layout.pp)), Times()) * (1 / layout.pp)
    shape = f"pipeline: {placement.schedule}, {layout.pp} ranks x {placement.num_chunks} chunks, {m} micro-batches"
    costs = f"F {times.forward * 1e3:.1f}, B {times.backward_input * 1e3:.1f}, W {times.backward_weight * 1e3:.1f} ms of a rank and micro-batch"
    result = f"makespan {layout.makespan:.3f} s, of which the busiest rank waits {layout.bubble:.2%}; largest bubble {layout.timeline.bubble:.3f} s"
    return "\n".join([shape, costs, result])


def communication(layout: Layout) -> str:
    """Bytes, and what they are made of."""
    columns = ["rank", "tp", "cp", "pp", "dp"]
    sent = {rank.rank: layout.sent(rank.rank) for rank in _chosen(layout)}
    rows = [
        [f"{rank}", *(f"{size / GB:.2f}" for size in axes.values())] for rank, axes in sent.items()
    ]
    link, device = layout.hardware.link, layout.hardware
    extents = {
        "tp": layout.tp,
        "cp": layout.tp * layout.cp,
        "pp": layout.num_devices,
        "dp": layout.tp * layout.copies,
    }
    speeds = ", ".join(f"{axis} {link(extent) / GB:g}" for axis, extent in extents.items())
    head = f"communication: GB that each device of a pipeline rank sends in an update; GB/s by {device.devices_per_node} devices a node: {speeds}"
    return "\n".join([head, _table(columns, rows), *formulas(layout), f"  ({LETTERS})"])


def formulas(layout: Layout) -> list[str]:
    """Where the bytes come from, for the axes there are."""
    said, cut, n = [], layout.cut, layout.cp
    full = cut.granularity == "full"
    if layout.tp > 1:
        ways = "gathers and scatters" if cut.sequence_parallel else "halves of all-reduces"
        said.append(
            f"  tp: {(10 if cut.sequence_parallel else 8) + 4 * full} {ways} of e b t h (tp-1)/tp a layer and micro-batch; embedding, head and loss"
        )
    if n > 1:
        ways = {
            "p2p": "2 b t k (2 e (cp-1) + 4 cp) a layer and micro-batch: k and v round the ring twice, their fp32 gradient once",
            "allgather": "2 b t k (cp-1) (e + 4) a layer and micro-batch: k and v gathered, their fp32 gradient scattered",
            "a2a": "2 e b (cp-1)/cp (q, k, v and o) a layer and micro-batch",
        }
        said.append(
            f"  cp: {ways[cut.cp_comm_type]}"
            + (", and what is computed again" if cut.granularity else "")
        )
    if layout.pp > 1:
        said.append(
            "  pp: e b s h for each activation and each gradient that goes to another rank, m times"
        )
    if layout.copies > 1:
        ways = {
            "no_shard": "8 P (d-1)/d",
            "optim": "(4 + e) P (d-1)/d",
            "optim_grads": "(4 m + e) P (d-1)/d",
            "optim_grads_params": "m (4 + 2 e) P (d-1)/d",
        }
        copies = (
            ", and 8 P/d between the copies of a shard" if 1 < layout.shards < layout.copies else ""
        )
        said.append(
            f"  dp: {ways[layout.strategy]}, d = {layout.shards if layout.shards > 1 else layout.copies} of dp x cp{copies}"
        )
    return said


def seconds(layout: Layout) -> str:
    device, batch = layout.hardware, layout.config.batch
    step = layout.step_seconds
    tokens = batch.global_batch_size * batch.seq_length / step
    model = f"{device.peak / 1e12:g} TFLOP/s x {device.efficiency:g}"
    split = f"pipeline {layout.makespan:.3f} s, data parallel that nothing hides {step - layout.makespan:.3f} s"
    mfu = f"MFU {layout.utilization(causal=False):.1%} (full attention), {layout.utilization(causal=True):.1%} (causal)"
    return f"time of an update (estimate at {model}): {step:.3f} s: {split}\n{tokens:,.0f} tokens/s, {tokens / layout.num_devices:,.0f} a device; {mfu}"


def comparison(layouts: Sequence[Layout]) -> str:
    """The runners-up of a search."""
    rows = []
    for layout in layouts:
        sizes = f"{layout.tp}{'+SP' if layout.cut.sequence_parallel else ''} {layout.pp} {layout.cp} {layout.dp}".split()
        schedule = layout.placement.schedule if layout.pp > 1 else "-"
        chunks = f"{layout.placement.num_chunks}"
        numbers = [
            f"{layout.bubble:.1%}",
            f"{layout.fullest.total / GB:.1f}",
            f"{layout.step_seconds:.3f}",
        ]
        rows.append(
            [
                *sizes,
                schedule,
                chunks,
                f"{layout.cut.micro_batch}",
                layout.strategy,
                layout.cut.granularity or "none",
                *numbers,
            ]
        )
    columns = [
        "tp",
        "pp",
        "cp",
        "dp",
        "schedule",
        "chunks",
        "micro",
        "sharding",
        "recompute",
        "bubble",
        "GB",
        "s",
    ]
    return f"\n\nthe best layouts found\n{_table(columns, rows)}"


def schedule_report(plan: Plan, timeline: Timeline, costs: Costs) -> str:
    """A schedule without a model."""
    columns = ["rank", "busy", "bubble", "activations"]
    rows = [
        [f"{rank}", f"{busy:g}", f"{bubble:g}", f"{peak:g}"]
        for rank, (busy, bubble, peak) in enumerate(
            zip(timeline.busy, timeline.bubbles, timeline.peak_activations, strict=True)
        )
    ]
    share = 1 - max(timeline.busy) / timeline.makespan
    return "\n".join(
        [
            f"{plan.schedule}: {plan.num_ranks} ranks x {plan.num_chunks} chunks, {plan.num_microbatches} micro-batches",
            f"F {costs.forward:g}, B {costs.backward_input:g}, W {costs.backward_weight:g} of a rank and micro-batch; transfer {costs.transfer:g}",
            _table(columns, rows),
            "bubble: last end - first start - busy; activations: the most micro-batches held at a time, a chunk's counting 1/chunks",
            f"makespan {timeline.makespan:g}, of which the busiest rank waits {share:.2%}; largest bubble {timeline.bubble:g}",
        ]
    )


def timeline_json(timeline: Timeline) -> dict[str, Any]:
    return {
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "busy": timeline.busy,
        "bubbles": timeline.bubbles,
        "peak_activations": timeline.peak_activations,
    }


def as_json(layout: Layout) -> dict[str, Any]:
    """Bytes and seconds, nothing rounded."""
    ranks = [
        asdict(rank) | {"total": rank.total, "sent": layout.sent(rank.rank)}
        for rank in layout.memory
    ]
    return {
        "parameters": total_parameters(layout.model, layout.vocab_size),
        "flags": " ".join(flags_of(layout)),
        "num_devices": layout.num_devices,
        "num_microbatches": layout.num_microbatches,
        "ranks": ranks,
        "fullest_rank": layout.fullest.rank,
        "fits": layout.fits,
        "makespan_seconds": layout.makespan,
        "bubble": layout.bubble,
        "step_seconds": layout.step_seconds,
        "mfu": layout.utilization(causal=False),
        "mfu_causal": layout.utilization(causal=True),
    }


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (columns, *rows)
    )
