"""What the checkpoint tests share: a small model's tensors under any tensor-parallel cut, saved and
read back on ranks."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from trivium.checkpoint.load import Checkpoint, open_checkpoint
from trivium.checkpoint.save import save
from trivium.layout import Layout, Piece
from trivium.logs import get_logger
from trivium.mesh import Axis, Mesh

CPU = torch.device("cpu")
ALONE = Axis("world")
DTYPES = {
    "q": torch.float32,
    "k": torch.bfloat16,
    "o": torch.float16,
    "words": torch.float32,
    "norm": torch.float32,
    "steps": torch.int64,
}
SHAPES = {"q": (16, 12), "k": (8, 12), "o": (12, 16), "words": (13, 12), "norm": (12,), "steps": ()}


def whole(name: str, seed: int = 0) -> torch.Tensor:
    """The global tensor: any bits do, as long as no two tensors or seeds agree."""
    generator = torch.Generator().manual_seed(1000 * seed + list(SHAPES).index(name))
    return (torch.randn(SHAPES[name], generator=generator) * 100).to(DTYPES[name])


def local_pieces(tp: Axis, seed: int | None) -> list[Piece]:
    """This rank's pieces, in fused local tensors as a model has them: filled from `seed`, or with a
    sign that they were not (None)."""
    layouts = [
        ("q", Layout.rows_cut({"q": 16}, (12,), tp)),
        ("k", Layout.rows_cut({"k": 8}, (12,), tp)),
        ("o", Layout.columns_cut("o", 12, 16, tp)),
        ("words", Layout.vocabulary_cut("words", 13, 16, 12, tp)),
        ("norm", Layout.whole("norm", (12,), tp)),
        ("steps", Layout.whole("steps", (), tp)),
    ]
    found = []
    for name, layout in layouts:
        for piece in layout.pieces(torch.full(layout.shape, -77, dtype=DTYPES[name])):
            if seed is not None:
                piece.tensor.copy_(whole(name, seed)[boxed(piece)])
            found.append(piece)
    return found


def boxed(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in piece.box)


def write(
    save_dir: Path,
    iteration: int,
    seed: int,
    mesh: Mesh | None = None,
    max_shard_bytes: int = 1 << 30,
) -> None:
    mesh = mesh or Mesh.plan(1, 0)
    pieces = [piece for piece in local_pieces(mesh.tp, seed) if piece.primary]
    told = {"state": state(iteration, seed), "config_yaml": f"seed: {seed}\n"}
    save(
        save_dir,
        iteration,
        pieces,
        **told,
        world=mesh.world,
        device=CPU,
        max_shard_bytes=max_shard_bytes,
    )


def state(iteration: int, seed: int, **changes) -> dict:
    """state.json as a run writes it, and the seed that the tensors are made from."""
    counts = dict.fromkeys(
        ("iteration", "consumed_samples", "consumed_tokens", "data_samples", "optimizer_steps"),
        iteration,
    )
    rest = {
        "loss_scale": {"dynamic": False, "scale": 1.0, "good_updates": 0, "bad_updates_left": 2},
        "random": {"seed": 1234},
        "vocab_size": 13,
        "fingerprints": {"tokenizer": "t", "data": "d"},
        "validation_loss": None,
        "persistent": True,
        "seed": seed,
    }
    return counts | rest | changes


def read(load_dir: Path, ckpt_step: int | None = None) -> Checkpoint:
    return open_checkpoint(load_dir, ckpt_step=ckpt_step, world=ALONE, device=CPU)


def differences(checkpoint: Checkpoint, seed: int, tp: Axis = ALONE) -> list[str]:
    """The pieces that do not come back with the bits that were saved."""
    pieces = local_pieces(tp, None)
    checkpoint.read_into(pieces)
    return [
        piece.name
        for piece in pieces
        if not torch.equal(piece.tensor, whole(piece.name, seed)[boxed(piece)])
    ]


@contextmanager
def warnings() -> Iterator[list[str]]:
    """The lines warned of meanwhile, whatever the logger's other handlers are."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(handler)
    try:
        yield lines
    finally:
        get_logger().removeHandler(handler)


class _Killed(BaseException):
    """Stands for the end of the process: nothing in the code under test catches it."""


def killed_at(step: int, calls: Iterable[tuple[object, str]], action: Callable[[], object]) -> bool:
    """Run `action` until it makes its call number `step` of the functions (owner, name); whether it
    got that far."""
    count = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                raise _Killed
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in calls:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            action()
        except _Killed:
            return True
    return False
