"""The mesh: which ranks stand along which axis. `plan` is arithmetic, `connect` makes the process groups."""

from dataclasses import dataclass, fields, replace
from datetime import timedelta
from math import prod

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One line of processes. `group` is None at size 1, and until the mesh is connected."""

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """The axes that meet in one process. Passed in, never looked up: two meshes can live in one process.

    Ranks are laid out in Megatron's order tp-cp-ep-dp-pp, tensor parallel innermost. Experts regroup the cp x dp block into
    ep x expert_dp, so `ep` and `expert_dp` share ranks with `cp` and `dp`.
    """

    rank: int
    world_size: int
    world: Axis
    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    ep: Axis
    expert_dp: Axis
    dp_cp: Axis  # every copy of a dense parameter: gradients are summed over it
    shards: Axis  # the block of dp_cp over which optimizer state is cut
    copies: Axis  # the ranks of dp_cp, one in each block, that hold the same shard
    model: Axis  # tp x pp: the ranks that together hold one model
    embedding: Axis  # first and last pipeline rank, where a tied embedding lives; size 1 in between
    kv: Axis  # the ranks of tp that hold the same key-value heads, where there are fewer heads than ranks

    @staticmethod
    def plan(
        world_size: int,
        rank: int,
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        shards: int = 1,
        kv_copies: int = 1,
    ) -> "Mesh":
        """Place `rank` in a world of `world_size`; no process is asked.

        shards: over how many of the dp x cp copies of a parameter its optimizer state is cut. kv_copies: how many ranks of tp hold
        each key-value head. Raises ValueError where the sizes do not divide the world.
        """
        per_model = tp * pp * cp
        if world_size % per_model:
            raise ValueError(
                f"{world_size} processes are not a multiple of tensor {tp} x pipeline {pp} x context {cp} = {per_model}"
            )
        dp = world_size // per_model
        if (dp * cp) % ep:
            raise ValueError(
                f"expert parallel {ep} does not divide data {dp} x context {cp} = {dp * cp} ranks"
            )
        if (dp * cp) % shards:
            raise ValueError(
                f"{shards} optimizer shards do not divide data {dp} x context {cp} = {dp * cp} ranks"
            )
        if tp % kv_copies:
            raise ValueError(
                f"{kv_copies} copies of a key-value head do not divide tensor parallel {tp}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        dense = _Grid({"tp": tp, "cp": cp, "dp": dp, "pp": pp}, rank)
        expert = _Grid({"tp": tp, "ep": ep, "expert_dp": dp * cp // ep, "pp": pp}, rank)
        tp_axis, dp_cp = dense.axis("tp", "tp"), dense.axis("dp_cp", "cp", "dp")
        return Mesh(
            rank=rank,
            world_size=world_size,
            world=Axis("world", world_size, rank, tuple(range(world_size))),
            tp=tp_axis,
            cp=dense.axis("cp", "cp"),
            dp=dense.axis("dp", "dp"),
            pp=dense.axis("pp", "pp"),
            ep=expert.axis("ep", "ep"),
            expert_dp=expert.axis("expert_dp", "expert_dp"),
            dp_cp=dp_cp,
            shards=_block("shards", dp_cp, shards),
            copies=_across("copies", dp_cp, shards),
            model=dense.axis("model", "tp", "pp"),
            embedding=_ends(dense.axis("pp", "pp"), rank),
            kv=_block("kv", tp_axis, kv_copies),
        )

    def axes(self) -> tuple[Axis, ...]:
        """Every axis, in one order for all ranks."""
        return tuple(
            value
            for value in (getattr(self, field.name) for field in fields(self))
            if isinstance(value, Axis)
        )

    def connect(
        self, backend: str, timeout_minutes: float, init_method: str | None = None
    ) -> "Mesh":
        """The same mesh with its process groups, made in one order on every rank. A world of one makes none.

        Axes with the same ranks share a group. `init_method` None: the launcher's environment (MASTER_ADDR, MASTER_PORT).
        """
        if self.world_size == 1:
            return self
        timeout = timedelta(minutes=timeout_minutes)
        if not dist.is_initialized():
            # No device_id: with it all messages of a rank would share one NCCL queue, and pipeline plans need one per pair of ranks.
            dist.init_process_group(
                backend,
                init_method=init_method,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )
        groups = {self.world.ranks: dist.group.WORLD}
        connected = {}
        for axis in self.axes():
            if axis.size == 1:
                continue
            if axis.ranks not in groups:
                # Only members make a group: at 4,096 ranks the alternative is thousands of calls on each.
                # Its name is for NCCL's own messages.
                groups[axis.ranks] = dist.new_group(
                    list(axis.ranks),
                    timeout=timeout,
                    backend=backend,
                    use_local_synchronization=True,
                    group_desc=axis.name,
                )
            connected[self._field_of(axis)] = replace(axis, group=groups[axis.ranks])
        return replace(self, **connected)

    def close(self) -> None:
        """Take the process groups down, if there are any."""
        if self.world.group is not None:
            dist.destroy_process_group()

    def _field_of(self, axis: Axis) -> str:
        return next(field.name for field in fields(self) if getattr(self, field.name) is axis)


class _Grid:
    """A rank's place in a grid of named dimensions, the first one innermost."""

    def __init__(self, sizes: dict[str, int], rank: int):
        self.sizes = sizes
        self.rank = rank
        self.strides, self.coordinates = {}, {}
        stride = 1
        for name, size in sizes.items():
            self.strides[name] = stride
            self.coordinates[name] = rank // stride % size
            stride *= size

    def axis(self, name: str, *dimensions: str) -> Axis:
        """The line (or plane) of ranks that differ from this one only along `dimensions`, in rank order."""
        corner = self.rank - sum(self.coordinates[d] * self.strides[d] for d in dimensions)
        ranks = [corner]
        for d in dimensions:
            ranks = [r + i * self.strides[d] for i in range(self.sizes[d]) for r in ranks]
        return Axis(
            name, prod(self.sizes[d] for d in dimensions), ranks.index(self.rank), tuple(ranks)
        )


def _block(name: str, axis: Axis, size: int) -> Axis:
    """The block of `size` neighbours on `axis` that this rank belongs to."""
    first = axis.rank // size * size
    return Axis(name, size, axis.rank - first, axis.ranks[first : first + size])


def _across(name: str, axis: Axis, size: int) -> Axis:
    """The ranks with this rank's place in each block of `size` neighbours on `axis`."""
    return Axis(name, axis.size // size, axis.rank // size, axis.ranks[axis.rank % size :: size])


def _ends(pp: Axis, rank: int) -> Axis:
    ends = tuple(dict.fromkeys((pp.ranks[0], pp.ranks[-1])))
    if rank not in ends:
        return Axis("embedding", ranks=(rank,))
    return Axis("embedding", len(ends), ends.index(rank), ends)
