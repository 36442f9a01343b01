"""Hold the axes that layers are cut over: the part of the mesh that a model knows."""

from dataclasses import dataclass

from torch import Tensor

from ..config import ParallelConfig
from ..mesh import Axis, Mesh

_TP, _KV, _CP, _EMBEDDING = (Axis(name) for name in ("tp", "kv", "cp", "embedding"))


@dataclass(frozen=True)
class Sharding:
    """The axes that a layer is cut over; `Sharding()` is a whole model in one process.

    tp: heads, features and vocabulary; with sequence_parallel also the tokens of norms and dropout.
    kv: the ranks of tp with the same key-value heads.
    cp: tokens everywhere; keys and values are exchanged as cp_comm_type says.
    embedding: the pipeline ranks that hold a tied embedding.
    """

    tp: Axis = _TP
    kv: Axis = _KV
    cp: Axis = _CP
    embedding: Axis = _EMBEDDING
    sequence_parallel: bool = False
    cp_comm_type: str = "p2p"

    @staticmethod
    def of(mesh: Mesh, parallel: ParallelConfig) -> "Sharding":
        """Return what `mesh` and the flags make of it. Sequence parallel over one rank is none."""
        # zb-v turns round at the last rank: embedding and head are stages of the first one.
        turns_round = parallel.pipeline_schedule == "zb-v"
        return Sharding(
            tp=mesh.tp,
            kv=mesh.kv,
            cp=mesh.cp,
            embedding=Axis("embedding") if turns_round else mesh.embedding,
            sequence_parallel=parallel.sequence_parallel and mesh.tp.size > 1,
            cp_comm_type=parallel.cp_comm_type,
        )

    def own_tokens(self, positions: Tensor) -> Tensor:
        """Return the positions whose norms and dropout this rank computes.

        positions: [..., T/cp], those of this rank of cp; with sequence parallel each rank of tp has
            its own [..., T/cp/tp] of them.
        """
        if not self.sequence_parallel:
            return positions
        return positions.tensor_split(self.tp.size, dim=-1)[self.tp.rank]
