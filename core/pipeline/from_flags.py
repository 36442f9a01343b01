"""From the flags of a run to its placement of stages and its split of layers."""

from ..config import FlagError, ParallelConfig
from .placement import Placement
from .split import StageSpec, parse_layout, split_layers


def placement_of(parallel: ParallelConfig, num_layers: int) -> Placement:
    """Return how many chunks each rank has and which stages they are.

    Without --pipeline-schedule: 1f1b for one chunk, interleaved for several.
    Raises FlagError in the flags' own words.
    """
    schedule = parallel.pipeline_schedule
    chunks = _chunks(parallel, num_layers)
    if schedule is None:
        schedule = "1f1b" if chunks in (None, 1) else "interleaved"
    if chunks is None:
        chunks = 2 if schedule == "zb-v" else 1
    if schedule == "zb-v" and chunks != 2:
        raise FlagError(
            f"--pipeline-schedule zb-v has 2 model chunks on each process, not {chunks}; "
            "leave the number of virtual stages out"
        )
    if schedule == "interleaved" and chunks < 2:
        raise FlagError(
            "--pipeline-schedule interleaved needs several model chunks: "
            "give --num-virtual-stages-per-pipeline-rank 2 or more"
        )
    if schedule not in ("interleaved", "zb-v") and chunks > 1:
        raise FlagError(
            f"--pipeline-schedule {schedule} has one model chunk on each process, not {chunks}; "
            "use interleaved"
        )
    return Placement(schedule, parallel.pipeline_model_parallel_size, chunks)


def stage_specs(parallel: ParallelConfig, num_layers: int) -> tuple[StageSpec, ...]:
    """Return what each stage holds, in their order. Raises FlagError in the flags' own words."""
    return split_layers(
        num_layers,
        placement_of(parallel, num_layers),
        first=parallel.decoder_first_pipeline_num_layers,
        last=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss=parallel.account_for_loss_in_pipeline_split,
        layout=parallel.pipeline_model_parallel_layout,
    )


def _chunks(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Return the model chunks of each rank as the flags say; None where none does."""
    pp = parallel.pipeline_model_parallel_size
    given = parallel.num_virtual_stages_per_pipeline_rank
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        stages = len(parse_layout(layout))
        if stages % pp:
            raise FlagError(
                f"--pipeline-model-parallel-layout {layout} has {stages} stages, no multiple of "
                f"--pipeline-model-parallel-size {pp}; add or join stages"
            )
        given = stages // pp if given is None else given
        if given * pp != stages:
            raise FlagError(
                f"--pipeline-model-parallel-layout has {stages} stages, "
                f"--num-virtual-stages-per-pipeline-rank {given} x {pp} processes not"
            )
    if per_chunk is None:
        return given
    if given is not None:
        raise FlagError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank "
            "say the same; give one"
        )
    unit = pp * per_chunk
    if num_layers % unit:
        raise FlagError(
            f"--num-layers {num_layers} is not a multiple of --pipeline-model-parallel-size {pp} "
            f"x --num-layers-per-virtual-pipeline-stage {per_chunk} = {unit}; change one of them"
        )
    return num_layers // unit
