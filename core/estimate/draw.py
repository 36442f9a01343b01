"""Draw a pipeline: a row for each rank, time to the right, a box for each action.

The row of a rank is hatched first; what its boxes leave free is its bubble.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import FlagError
from ..pipeline.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from ..pipeline.simulate import Timeline

SUFFIXES = (".png", ".svg")
NAMES: dict[type[Compute], str] = {
    Forward: "F forward",
    Backward: "B backward",
    BackwardInput: "B inputs' gradient",
    BackwardWeight: "W weights' gradient",
}
COLORS: dict[type[Compute], str] = {
    Forward: "#5b93c9",
    Backward: "#5fae70",
    BackwardInput: "#5fae70",
    BackwardWeight: "#e79a52",
}
PALEST = 0.55  # how far towards white the last of several chunks is
BUBBLE: dict[str, Any] = {
    "facecolor": "#f4f4f4",
    "edgecolor": "#c8c8c8",
    "hatch": "////",
    "linewidth": 0,
}

ROW = 0.42  # inches of a rank; also half the height of its boxes, in rows
MARGIN = 1.4  # inches above and below the rows
DIGIT = 4.0  # points that a digit takes
POINTS = 72  # an inch
NARROWEST, WIDEST = 8.0, 60.0  # inches


@dataclass(frozen=True)
class DrawnAction:
    """One action of one rank as a box: when it starts and ends, of which chunk and micro-batch."""

    rank: int
    start: float
    end: float
    kind: type[Compute]
    chunk: int
    microbatch: int

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Return the corners of the box, time by rank."""
        top, bottom = self.rank - ROW, self.rank + ROW
        return [(self.start, top), (self.end, top), (self.end, bottom), (self.start, bottom)]


def boxes_of(timeline: Timeline) -> list[DrawnAction]:
    """Return every box of a picture."""
    boxes = []
    for rank, spans in enumerate(timeline.spans):
        for action, start, end in spans:
            box = DrawnAction(rank, start, end, type(action), action.chunk, action.microbatch)
            boxes.append(box)
    return boxes


def check_picture(path: Path) -> None:
    """Raise FlagError if no picture can be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise FlagError(f"--draw {path}: a picture ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FlagError(f"--draw {path}: no folder {path.parent}")


def draw(timeline: Timeline, title: str, unit: str, path: Path) -> None:
    """Write the picture to `path`, whose suffix is its format. unit: of the timeline's times."""
    figure_of(boxes_of(timeline), title, unit).savefig(path, dpi=150, bbox_inches="tight")


def figure_of(boxes: Sequence[DrawnAction], title: str, unit: str) -> Any:
    """Make a matplotlib figure.

    Boxes have the colour of their kind, paler for later chunks, and their micro-batch's number
    where there is room for it.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed for a picture

    ranks = 1 + max(box.rank for box in boxes)
    last = max(box.end for box in boxes)
    shortest = min(box.end - box.start for box in boxes)
    width = min(WIDEST, max(NARROWEST, 0.2 * last / shortest))
    figure = Figure(figsize=(width, ROW * ranks + MARGIN), layout="constrained")
    axes = figure.add_subplot()
    _draw_bubbles(axes, ranks, last)
    legend = _draw_boxes(axes, boxes)
    _draw_numbers(axes, boxes, last, width)
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


def _draw_bubbles(axes: Any, ranks: int, last: float) -> None:
    """Hatch a whole row for each rank: what no box covers is its bubble."""
    from matplotlib.patches import Rectangle

    for rank in range(ranks):
        axes.add_patch(Rectangle((0, rank - ROW), last, 2 * ROW, **BUBBLE))


def _draw_boxes(axes: Any, boxes: Sequence[DrawnAction]) -> list[Any]:
    """Draw the boxes, one collection for each kind and chunk, and return the legend."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    chunks = 1 + max(box.chunk for box in boxes)
    kinds = list(NAMES)
    groups: dict[tuple[int, int], list[DrawnAction]] = defaultdict(list)
    for box in boxes:
        groups[kinds.index(box.kind), box.chunk].append(box)
    legend = []
    for (index, chunk), group in sorted(groups.items()):
        kind = kinds[index]
        color = _color(kind, chunk, chunks)
        collection = PolyCollection(
            [box.corners for box in group],
            facecolors=[color],
            edgecolors="white",
            linewidths=0.4,
            label=f"{kind.__name__} {chunk}",
        )
        axes.add_collection(collection)
        of_chunk = f", chunk {chunk}" if chunks > 1 else ""
        legend.append(Patch(color=color, label=NAMES[kind] + of_chunk))
    legend.append(Patch(**BUBBLE, label="bubble"))
    return legend


def _draw_numbers(axes: Any, boxes: Sequence[DrawnAction], last: float, width: float) -> None:
    """Write each box's micro-batch where it fits.

    last: the end of time. width: of the whole picture, in inches.
    """
    for box in boxes:
        points = (box.end - box.start) / last * width * POINTS
        if points > DIGIT * len(str(box.microbatch)):
            middle = (box.start + box.end) / 2
            axes.text(middle, box.rank, box.microbatch, ha="center", va="center", fontsize=6)


def _color(kind: type[Compute], chunk: int, chunks: int) -> tuple[float, float, float]:
    """Return the colour of a kind, paler the later the chunk, as shares of red, green, blue."""
    white = PALEST * chunk / max(1, chunks - 1)
    channels = bytes.fromhex(COLORS[kind].removeprefix("#"))
    red, green, blue = (channel / 255 * (1 - white) + white for channel in channels)
    return red, green, blue
