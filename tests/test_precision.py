"""The loss scale, move by move, against Megatron's rule."""

import torch

from trivium.config import PrecisionConfig
from trivium.precision import LossScaler, working_dtype

CPU = torch.device("cpu")


def scales(precision: PrecisionConfig, moves: str) -> list[float]:
    """The scale after each move: `.` good, `x` overflow, `-` an empty batch."""
    scaler, seen = LossScaler(precision, CPU), []
    for move in moves:
        scaler.update(torch.tensor(move == "x"), torch.tensor(move == "-"))
        seen.append(scaler.scale.item())
    return seen


def test_dynamic_scale_halves_after_hysteresis_and_doubles_after_a_window():
    precision = PrecisionConfig(
        fp16=True, initial_loss_scale=16.0, loss_scale_window=3, hysteresis=2, min_loss_scale=4.0
    )
    assert scales(precision, "xx") == [16, 8]
    assert scales(precision, "xxxx") == [16, 8, 4, 4]
    assert scales(precision, "......") == [16, 16, 32, 32, 32, 64]
    assert scales(precision, "x..x") == [16, 16, 16, 8]
    assert scales(precision, "x...x") == [16, 16, 16, 32, 32]  # growing refills the hysteresis
    assert scales(precision, "x--x") == [16, 16, 16, 8]
    assert scales(precision, ".--..") == [16, 16, 16, 16, 32]
    assert scales(precision, "..x...") == [16, 16, 16, 16, 16, 32]


def test_constant_scale_and_none_never_move():
    assert scales(PrecisionConfig(fp16=True, loss_scale=128.0), "xx..") == [128] * 4
    assert scales(PrecisionConfig(bf16=True), "xx..") == [1] * 4


def test_state_restores_the_next_moves():
    precision = PrecisionConfig(fp16=True, initial_loss_scale=16.0, loss_scale_window=3)
    first, second = LossScaler(precision, CPU), LossScaler(precision, CPU)
    for move in "..x.":
        first.update(torch.tensor(move == "x"), torch.tensor(False))
    second.load(first.state())
    for move in "..x.x":
        for scaler in (first, second):
            scaler.update(torch.tensor(move == "x"), torch.tensor(move == "-"))
        assert first.state() == second.state()


def test_working_dtype():
    assert [
        working_dtype(PrecisionConfig(bf16=b, fp16=f)) for b, f in ((0, 0), (1, 0), (0, 1))
    ] == [torch.float32, torch.bfloat16, torch.float16]


def test_state_of_another_precision_is_not_taken_up():
    """A bf16 run's scale of 1 would leave fp16 gradients to underflow."""
    fp16 = LossScaler(PrecisionConfig(fp16=True), CPU)
    fp16.load(LossScaler(PrecisionConfig(bf16=True), CPU).state())
    assert fp16.scale.item() == 2.0**32
