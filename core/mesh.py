"""The mesh: which ranks stand along which axis.

`Mesh.plan` is arithmetic and asks no other process; `connect` makes the process groups.

Words. A *rank* is one process. An *axis* is a line of ranks that work together in one way, such as
the ranks of tensor parallelism. The *mesh* is all the axes on which one rank stands.

Ranks are counted through a grid, tensor parallel innermost, in Megatron's order tp-cp-dp-pp. With
8 processes, tp = 2 and pp = 2:

    stage 0                 stage 1
    dp 0   rank 0  rank 1   dp 0   rank 4  rank 5
    dp 1   rank 2  rank 3   dp 1   rank 6  rank 7
           tp 0    tp 1            tp 0    tp 1

Rank 3 stands on tp (2, 3), dp (1, 3) and pp (3, 7).

Experts regroup the ranks of one stage: the tp x cp x dp block becomes etp x ep x expert_dp, again
the first one innermost. `ep` ranks hold different experts, `etp` ranks one slice each of the same
experts, and `expert_dp` ranks the same slices: over those, gradients of experts are summed.
"""

from dataclasses import dataclass, fields, replace
from datetime import timedelta
from math import prod
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """A line of ranks that work together in one way.

    rank: this process's place on the line, from 0.
    ranks: all of the line, as ranks of the world.
    group: the process group; None at size 1, and until the mesh is connected.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """All the axes on which one process stands. Passed in, never looked up."""

    rank: int
    world_size: int
    world: Axis
    tp: Axis  # tensor parallel: slices of each layer
    cp: Axis  # context parallel: slices of each sequence
    dp: Axis  # data parallel: other samples
    pp: Axis  # pipeline parallel: other layers
    etp: Axis  # slices of each expert
    ep: Axis  # other experts
    expert_dp: Axis  # every copy of an expert's parameter: its gradients are summed over it
    dp_cp: Axis  # every copy of a dense parameter: its gradients are summed over it
    shards: Axis  # the block of dp_cp over which the optimizer's state is cut
    copies: Axis  # the ranks of dp_cp, one in each block, that hold the same shard
    expert_shards: Axis  # as shards, a block of expert_dp
    expert_copies: Axis  # as copies, of expert_dp
    model: Axis  # tp x pp: the ranks that together hold one model
    embedding: Axis  # first and last stage, where a tied embedding lives; size 1 in between
    kv: Axis  # the ranks of tp that hold the same key-value heads, if there are fewer than ranks

    @staticmethod
    def plan(
        world_size: int,
        rank: int,
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        shards: int = 1,
        kv_copies: int = 1,
    ) -> "Mesh":
        """Place `rank` in a world of `world_size`, without asking any other process.

        etp: into how many slices each expert is cut; as many as tp if None.
        shards: over how many of the dp x cp copies of a parameter its optimizer state is cut.
        kv_copies: how many ranks of tp hold each key-value head.

        Raises ValueError if the sizes do not divide the world.
        """
        etp = tp if etp is None else etp
        sizes = _Sizes(world_size, rank, tp, pp, cp, ep, etp, shards, kv_copies)
        sizes.check()
        dense = _Grid({"tp": tp, "cp": cp, "dp": sizes.dp, "pp": pp}, rank)
        expert = _Grid({"etp": etp, "ep": ep, "expert_dp": sizes.expert_dp, "pp": pp}, rank)
        tp_axis = dense.axis("tp", "tp")
        dp_cp = dense.axis("dp_cp", "cp", "dp")
        expert_dp = expert.axis("expert_dp", "expert_dp")
        return Mesh(
            rank=rank,
            world_size=world_size,
            world=Axis("world", world_size, rank, tuple(range(world_size))),
            tp=tp_axis,
            cp=dense.axis("cp", "cp"),
            dp=dense.axis("dp", "dp"),
            pp=dense.axis("pp", "pp"),
            etp=expert.axis("etp", "etp"),
            ep=expert.axis("ep", "ep"),
            expert_dp=expert_dp,
            dp_cp=dp_cp,
            shards=_block("shards", dp_cp, shards),
            copies=_across("copies", dp_cp, shards),
            expert_shards=_block("expert_shards", expert_dp, sizes.expert_shards),
            expert_copies=_across("expert_copies", expert_dp, sizes.expert_shards),
            model=dense.axis("model", "tp", "pp"),
            embedding=_ends(dense.axis("pp", "pp"), rank),
            kv=_block("kv", tp_axis, kv_copies),
        )

    def axes(self) -> tuple[Axis, ...]:
        """Return every axis, in one order on all ranks."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Axis))

    def connect(
        self, backend: str, timeout_minutes: float, init_method: str | None = None
    ) -> "Mesh":
        """Return the same mesh with process groups, made in one order on every rank.

        Axes with the same ranks share a group. A world of one process makes none.
        init_method: where the processes meet; the launcher's MASTER_ADDR and MASTER_PORT if None.
        """
        if self.world_size == 1:
            return self
        timeout = timedelta(minutes=timeout_minutes)
        if not dist.is_initialized():
            # No device_id: with it all messages of a rank would share one NCCL queue, and pipeline
            # plans need one per pair of ranks.
            dist.init_process_group(
                backend,
                init_method=init_method,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )
        groups = {self.world.ranks: dist.group.WORLD}
        connected: dict[str, Any] = {}
        for axis in self.axes():
            if axis.size == 1:
                continue
            if axis.ranks not in groups:
                # Only members make a group: at 4,096 ranks the alternative is thousands of calls on
                # each. The description is for NCCL's own messages.
                groups[axis.ranks] = dist.new_group(
                    list(axis.ranks),
                    timeout=timeout,
                    backend=backend,
                    use_local_synchronization=True,
                    group_desc=axis.name,
                )
            connected[axis.name] = replace(axis, group=groups[axis.ranks])
        return replace(self, **connected)

    def close(self) -> None:
        """Take the process groups down, if there are any."""
        if self.world.group is not None:
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Sizes:
    """The sizes that a mesh is planned from, and those that follow from them."""

    world_size: int
    rank: int
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int
    shards: int
    kv_copies: int

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    @property
    def instances(self) -> int:
        """Return how many whole optimizer states there are of each dense parameter."""
        return self.dp * self.cp // self.shards

    @property
    def expert_shards(self) -> int:
        """Return over how many copies of an expert its optimizer state is cut.

        As many instances as of dense parameters; none is cut where theirs is not.
        """
        return 1 if self.shards == 1 else self.expert_dp // self.instances

    def check(self) -> None:
        """Raise ValueError, with all numbers, for the first size that does not divide."""
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)

    def _problems(self):
        tp, pp = self.tp, self.pp
        cp, dp = self.cp, self.dp
        per_model = tp * pp * cp
        if self.world_size % per_model:
            product = f"tensor {tp} x pipeline {pp} x context {cp} = {per_model}"
            yield f"{self.world_size} processes are not a multiple of {product}"
        stage, experts = tp * cp * dp, self.etp * self.ep
        if stage % experts:
            product = f"expert tensor {self.etp} x expert parallel {self.ep} = {experts}"
            ranks = f"tensor {tp} x context {cp} x data {dp} = {stage} ranks of a stage"
            yield f"{product} does not divide {ranks}"
        if (dp * cp) % self.shards:
            ranks = f"data {dp} x context {cp} = {dp * cp} ranks"
            yield f"{self.shards} optimizer shards do not divide {ranks}"
        if self.shards > 1 and self.expert_dp % self.instances:
            copies = f"expert data parallel {self.expert_dp}"
            yield f"{self.instances} instances of the optimizer's state do not divide {copies}"
        if tp % self.kv_copies:
            yield f"{self.kv_copies} copies of a key-value head do not divide tensor parallel {tp}"
        if not 0 <= self.rank < self.world_size:
            yield f"rank {self.rank} is not in a world of {self.world_size}"


class _Grid:
    """A rank's place in a grid of named dimensions, the first one innermost."""

    def __init__(self, sizes: dict[str, int], rank: int):
        self.sizes = sizes
        self.rank = rank
        self.strides: dict[str, int] = {}
        self.coordinates: dict[str, int] = {}
        stride = 1
        for name, size in sizes.items():
            self.strides[name] = stride
            self.coordinates[name] = rank // stride % size
            stride *= size

    def axis(self, name: str, *dimensions: str) -> Axis:
        """Return the ranks that differ from this one only along `dimensions`, in rank order."""
        corner = self.rank - sum(self.coordinates[d] * self.strides[d] for d in dimensions)
        ranks = [corner]
        for dimension in dimensions:
            steps = [i * self.strides[dimension] for i in range(self.sizes[dimension])]
            ranks = [rank + step for step in steps for rank in ranks]
        size = prod(self.sizes[dimension] for dimension in dimensions)
        return Axis(name, size, ranks.index(self.rank), tuple(ranks))


def _block(name: str, axis: Axis, size: int) -> Axis:
    """Return the block of `size` neighbours on `axis` that this rank belongs to."""
    first = axis.rank // size * size
    return Axis(name, size, axis.rank - first, axis.ranks[first : first + size])


def _across(name: str, axis: Axis, size: int) -> Axis:
    """Return the ranks that have this rank's place in each block of `size` neighbours on `axis`."""
    ranks = axis.ranks[axis.rank % size :: size]
    return Axis(name, axis.size // size, axis.rank // size, ranks)


def _ends(pp: Axis, rank: int) -> Axis:
    """Return the axis of the first and the last stage; on a stage in between, one of size 1."""
    ends = tuple(dict.fromkeys((pp.ranks[0], pp.ranks[-1])))
    if rank not in ends:
        return Axis("embedding", ranks=(rank,))
    return Axis("embedding", len(ends), ends.index(rank), ends)
