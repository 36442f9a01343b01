"""A picture of a pipeline: one row for each rank, time to the right, every action a box, and what is left of a row its bubble."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import FlagError
from ..pipeline.plan import Backward, BackwardInput, BackwardWeight, Forward
from ..pipeline.simulate import Timeline

SUFFIXES = (".png", ".svg")
NAMES = {
    Forward: "F forward",
    Backward: "B backward",
    BackwardInput: "B inputs' gradient",
    BackwardWeight: "W weights' gradient",
}
COLORS = {
    Forward: "#5b93c9",
    Backward: "#5fae70",
    BackwardInput: "#5fae70",
    BackwardWeight: "#e79a52",
}
BUBBLE = {"facecolor": "#f4f4f4", "edgecolor": "#c8c8c8", "hatch": "////", "linewidth": 0}
ROW, DIGIT = 0.42, 4.0  # inches of a rank, points of a digit
NARROWEST, WIDEST = 8.0, 60.0  # inches


@dataclass(frozen=True)
class Box:
    """One action of one rank: when it starts and ends, what it is, of which chunk and micro-batch."""

    rank: int
    start: float
    end: float
    kind: type
    chunk: int
    microbatch: int


def boxes_of(timeline: Timeline) -> list[Box]:
    """All that is drawn."""
    return [
        Box(rank, start, end, type(action), action.chunk, action.microbatch)
        for rank, spans in enumerate(timeline.spans)
        for action, start, end in spans
    ]


def check_picture(path: Path) -> None:
    """Raises FlagError where no picture can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise FlagError(f"--draw {path}: a picture ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FlagError(f"--draw {path}: no folder {path.parent}")


def draw(timeline: Timeline, title: str, unit: str, path: Path) -> None:
    """Write the picture to `path`; its suffix says how."""
    figure_of(boxes_of(timeline), title, unit).savefig(path, dpi=150, bbox_inches="tight")


def figure_of(boxes: Sequence[Box], title: str, unit: str) -> Any:
    """A matplotlib figure: boxes in the colour of their kind, paler for later chunks, with their micro-batch where there is room for it."""
    from matplotlib.collections import (
        PolyCollection,
    )  # slow to import, and only needed for a picture
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    ranks, chunks, last = (
        max(numbers)
        for numbers in zip(*((box.rank + 1, box.chunk + 1, box.end) for box in boxes), strict=True)
    )
    width = min(WIDEST, max(NARROWEST, 0.2 * last / min(box.end - box.start for box in boxes)))
    figure = Figure(figsize=(width, ROW * ranks + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for rank in range(ranks):
        axes.add_patch(Rectangle((0, rank - 0.42), last, 0.84, **BUBBLE))
    drawn = defaultdict(list)
    for box in boxes:
        drawn[box.kind, box.chunk].append(box)
        if (box.end - box.start) / last * width * 72 > DIGIT * len(str(box.microbatch)):
            axes.text(
                (box.start + box.end) / 2,
                box.rank,
                box.microbatch,
                ha="center",
                va="center",
                fontsize=6,
            )
    legend = []
    for kind, chunk in sorted(drawn, key=lambda key: (list(NAMES).index(key[0]), key[1])):
        color = _color(kind, chunk, chunks)
        corners = [_corners(box) for box in drawn[kind, chunk]]
        axes.add_collection(
            PolyCollection(
                corners,
                facecolors=[color],
                edgecolors="white",
                linewidths=0.4,
                label=f"{kind.__name__} {chunk}",
            )
        )
        legend.append(Patch(color=color, label=NAMES[kind] + f", chunk {chunk}" * (chunks > 1)))
    legend.append(Patch(**BUBBLE, label="bubble"))
    axes.set(
        xlim=(0, last),
        ylim=(ranks - 0.5, -0.5),
        yticks=range(ranks),
        xlabel=f"time ({unit})",
        ylabel="pipeline rank",
        title=title,
    )
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=min(len(legend), 5),
        fontsize=7,
        frameon=False,
    )
    return figure


def _corners(box: Box) -> list[tuple[float, float]]:
    top, bottom = box.rank - 0.42, box.rank + 0.42
    return [(box.start, top), (box.end, top), (box.end, bottom), (box.start, bottom)]


def _color(kind: type, chunk: int, chunks: int) -> tuple[float, ...]:
    """Half-way to white for the last of several chunks."""
    share = 0.55 * chunk / max(1, chunks - 1)
    return tuple(int(COLORS[kind][i : i + 2], 16) / 255 * (1 - share) + share for i in (1, 3, 5))
