"""How the tensors inside one model are cut on this rank: what layers need to know of the mesh."""

from dataclasses import dataclass

from torch import Tensor

from ..config import ParallelConfig
from ..mesh import Axis, Mesh

_TP, _KV, _CP, _EMBEDDING = (Axis(name) for name in ("tp", "kv", "cp", "embedding"))


@dataclass(frozen=True)
class Sharding:
    """The axes a layer is cut over; `Sharding()` is a whole model in one process.

    tp: heads, features and vocabulary; with `sequence_parallel` also the tokens of norms and dropout. kv: the ranks of tp with the
    same key-value heads. cp: tokens everywhere, its keys and values exchanged as `cp_comm_type` says. embedding: the pipeline
    ranks that hold a tied embedding.
    """

    tp: Axis = _TP
    kv: Axis = _KV
    cp: Axis = _CP
    embedding: Axis = _EMBEDDING
    sequence_parallel: bool = False
    cp_comm_type: str = "p2p"

    @staticmethod
    def of(mesh: Mesh, parallel: ParallelConfig) -> "Sharding":
        """What `mesh` and the flags make of it. Sequence parallel over one rank is none."""
        # zb-v turns round at the last rank: embedding and head are stages of the first one.
        embedding = Axis("embedding") if parallel.pipeline_schedule == "zb-v" else mesh.embedding
        return Sharding(
            mesh.tp,
            mesh.kv,
            mesh.cp,
            embedding,
            parallel.sequence_parallel and mesh.tp.size > 1,
            parallel.cp_comm_type,
        )

    def own_tokens(self, positions: Tensor) -> Tensor:
        """Of the positions [..., T/cp] of this rank, those [..., T/cp/tp] whose norms and dropout it computes."""
        return (
            positions.tensor_split(self.tp.size, dim=-1)[self.tp.rank]
            if self.sequence_parallel
            else positions
        )
