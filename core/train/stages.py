"""This rank's part of the model: the chunks it holds of the pipeline, and how their passes run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..gradients import Deferral
from ..mesh import Mesh
from ..model.gpt import GPT
from ..parallel.sharding import Sharding
from ..pipeline import runtime
from ..pipeline.plan import Plan


@dataclass(frozen=True)
class Stages:
    """The chunks of this rank, in the order of their stages, with the plan that trains them and the one that evaluates them."""

    chunks: Sequence[GPT]
    mesh: Mesh
    message: runtime.MessageSpec
    training: Plan
    evaluation: Plan
    deferral: Deferral = field(default_factory=Deferral)

    @property
    def sharding(self) -> Sharding:
        return self.chunks[0].sharding

    def parameters(self) -> list[torch.nn.Parameter]:
        """Each once, in the order in which a forward pass uses them: a weight that two chunks share is one parameter."""
        return list(
            dict.fromkeys(parameter for chunk in self.chunks for parameter in chunk.parameters())
        )

    def train(self, stage: runtime.Stage) -> None:
        """Forward and backward of the micro-batches of one update."""
        for chunk in self.chunks:
            chunk.train()
        runtime.run(self.training, self.mesh.pp, self.message, stage, self.deferral)

    def evaluate(self, stage: runtime.Stage) -> None:
        """Forward alone, of as many micro-batches."""
        for chunk in self.chunks:
            chunk.eval()
        runtime.run(self.evaluation, self.mesh.pp, self.message, stage, self.deferral)
