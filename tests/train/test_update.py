"""The optimizer gets the gradient of the masked mean, clipped once.

So it is for any mask, scale and layout. The losses alone would not show it: Adam hides any wrong
factor.
"""

import pytest
import torch
from runs import LLAMA, NO_DROPOUT, SMALL, write_data

import pretrain_gpt
from trivium import ops
from trivium.config import flags, resolve
from trivium.data.splits import build_datasets
from trivium.launch import Process
from trivium.mesh import Mesh
from trivium.model.gpt import GPT
from trivium.optim.optimizer import Optimizer
from trivium.testing import run_ranks

RUN = (
    SMALL + LLAMA + NO_DROPOUT + " --eod-mask-loss --split 100,0,0 --eval-iters 0 --exit-interval 1"
)


def captured(mesh: Mesh, arguments: str) -> dict[str, torch.Tensor]:
    """The first update's gradients times the factor that they are applied with, by name."""
    found, honest = {}, Optimizer.update

    def update(self, lr, grad_scale, skip):
        for bucket in self.buckets:
            found.update(
                (piece.name, piece.tensor * grad_scale) for piece in bucket.pieces(bucket.gradients)
            )
        honest(self, lr, grad_scale, skip)

    Optimizer.update = update
    try:
        pretrain_gpt.main(arguments.split(), Process(mesh.rank, mesh.world_size, mesh.rank))
    finally:
        Optimizer.update = honest
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("clip", [0, 0.3, 1e6])
@pytest.mark.parametrize("precision", ["", " --fp16 --initial-loss-scale 4096"])
def test_the_update_uses_the_gradient_of_the_masked_mean_clipped_once(
    tmp_path, ranks, clip, precision
):
    data = write_data(tmp_path / "d")
    arguments = f"{RUN} --clip-grad {clip} --data-path {data}{precision}"
    found = (
        captured(Mesh.plan(1, 0), arguments)
        if ranks == 1
        else run_ranks(ranks, captured, arguments)[1]
    )
    config = resolve(flags.parse(arguments.split()).config, 1)
    samples = build_datasets([str(data)], "100,0,0", 32, 1234, (160, 0, 0)).train
    ids = torch.stack([torch.from_numpy(samples.sample(k).ids) for k in range(8)])
    model = GPT(config.model, 97, ops=ops.Ops(), seed=1234)
    mask = (ids[:, :-1] != 96).float()
    model(ids[:, :-1], targets=(ids[:, 1:], mask / mask.sum()))[0].backward()
    truth = {
        piece.name: piece.tensor
        for p in model.parameters()
        for piece in p.param_layout.pieces(p.grad)
    }
    norm = torch.stack([g.norm() for g in truth.values()]).norm()
    factor = min(1.0, clip / norm) if clip else 1.0
    assert found.keys() == truth.keys()
    total = sum((found[n] - truth[n] * factor).norm() ** 2 for n in truth) ** 0.5
    assert total <= (2e-2 if precision else 1e-5) * norm * factor
