"""This rank's part of the model: the chunks it holds of the pipeline, and how their passes run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..mesh import Mesh
from ..model.gpt import GPT
from ..parallel.sharding import Sharding
from ..pipeline.runtime import Runner, Stage


@dataclass(frozen=True)
class Stages:
    """The chunks of this rank, in the order of their stages, and what trains and evaluates them."""

    chunks: Sequence[GPT]
    mesh: Mesh
    training: Runner
    evaluation: Runner

    @property
    def sharding(self) -> Sharding:
        return self.chunks[0].sharding

    def parameters(self) -> list[torch.nn.Parameter]:
        """Each once, in the order in which a forward pass uses them: a weight that two chunks share is one parameter."""
        return list(
            dict.fromkeys(parameter for chunk in self.chunks for parameter in chunk.parameters())
        )

    def train(self, stage: Stage) -> None:
        """Forward and backward of the micro-batches of one update."""
        for chunk in self.chunks:
            chunk.train()
        self.training.run(stage)

    def evaluate(self, stage: Stage) -> None:
        """Forward alone, of as many micro-batches."""
        for chunk in self.chunks:
            chunk.eval()
        self.evaluation.run(stage)
