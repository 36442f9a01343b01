"""The run on a GPU against the run on the CPU: the same code, so the same losses."""

import pytest
import torch
from runs import LLAMA, NO_DROPOUT, SMALL, exact, rows_of, train, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
ON_GPU = (
    SMALL.replace("--device cpu", "--device cuda")
    + NO_DROPOUT
    + " --split 80,20,0 --eval-interval 10 --eval-iters 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small")


@pytest.mark.parametrize("model", ["", LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("dropout", ["", " --hidden-dropout 0.1"])
def test_losses_equal_the_cpus(data, tmp_path, model, dropout):
    """fp32 without TF32, 20 updates of a small model: 1e-4 relative.

    The dropout masks are the same on every device.
    """
    arguments = f"{ON_GPU}{model}{dropout} --data-path {data}"
    train(f"{arguments} --metrics-jsonl {tmp_path}/gpu.jsonl")
    train(f"{arguments} --device cpu --metrics-jsonl {tmp_path}/cpu.jsonl")
    gpu, cpu = (
        [row["lm_loss"] for row in rows_of(tmp_path / f"{name}.jsonl")] for name in ("gpu", "cpu")
    )
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["", "--bf16", "--fp16 --initial-loss-scale 65536"])
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path, precision):
    arguments = (
        f"{ON_GPU}{LLAMA} {precision} --deterministic-mode --data-path {data} --save-interval 100"
    )
    train(f"{arguments} --save {tmp_path}/whole")
    train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts --exit-interval 7")
    train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts")
    assert exact(rows_of(tmp_path / "parts/metrics.jsonl")) == exact(
        rows_of(tmp_path / "whole/metrics.jsonl")
    )


def test_every_kernel_gives_the_same_losses(data, tmp_path):
    for kernels in ("torch", "triton"):
        train(
            f"{ON_GPU}{LLAMA} --kernels {kernels} --data-path {data} "
            f"--metrics-jsonl {tmp_path}/{kernels}.jsonl"
        )
    torch_losses, triton_losses = (
        [row["lm_loss"] for row in rows_of(tmp_path / f"{name}.jsonl")]
        for name in ("torch", "triton")
    )
    assert triton_losses == pytest.approx(torch_losses, rel=1e-5)
