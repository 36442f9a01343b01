"""Layouts: over any cut, each element of a part lies on exactly one rank (or is counted on one), and padding in no part."""

import pytest
import torch

from trivium.layout import Layout
from trivium.mesh import Axis

CUTS = (1, 2, 4)


def ranks_of(size: int) -> list[Axis]:
    return [Axis("tp", size, rank, tuple(range(size))) for rank in range(size)]


def counts(layouts: list[Layout], primary_only: bool = False) -> dict[str, torch.Tensor]:
    """For each part, how often each of its global elements is held."""
    held: dict[str, torch.Tensor] = {}
    for layout in layouts:
        for part in layout.parts:
            whole = held.setdefault(part.name, torch.zeros(part.shape, dtype=torch.int64))
            assert whole.shape == part.shape
            if part.primary or not primary_only:
                whole[tuple(slice(*interval) for interval in part.box)] += 1
    return held


def marked(layout: Layout) -> torch.Tensor:
    """How many parts each element of the local tensor belongs to."""
    local = torch.zeros(layout.shape, dtype=torch.int64)
    for part in layout.parts:
        part.within(local).add_(1)
    return local


@pytest.mark.parametrize("tp", CUTS)
@pytest.mark.parametrize("columns", [(6,), ()], ids=["weight", "bias"])
def test_rows_cut_tiles_every_part_once(tp, columns):
    layouts = [Layout.rows_cut({"q": 16, "k": 8, "v": 4}, columns, axis) for axis in ranks_of(tp)]
    held = counts(layouts)
    assert {name: tuple(whole.shape) for name, whole in held.items()} == {"q": (16, *columns), "k": (8, *columns), "v": (4, *columns)}
    assert all((whole == 1).all() for whole in held.values())
    assert all(layout.shape == (28 // tp, *columns) and (marked(layout) == 1).all() for layout in layouts)


@pytest.mark.parametrize("tp", CUTS)
def test_columns_cut_tiles_the_part_once(tp):
    layouts = [Layout.columns_cut("o", 6, 16, axis) for axis in ranks_of(tp)]
    assert (counts(layouts)["o"] == 1).all() and counts(layouts)["o"].shape == (6, 16)
    assert all(layout.shape == (6, 16 // tp) and (marked(layout) == 1).all() for layout in layouts)


@pytest.mark.parametrize("tp", CUTS)
@pytest.mark.parametrize("rows", [16, 13, 7, 1])
def test_vocabulary_cut_tiles_the_words_and_leaves_the_padding(tp, rows):
    """At 7 of 16 rows over 4 ranks the last two hold padding only."""
    layouts = [Layout.vocabulary_cut("words", rows, 16, 3, axis) for axis in ranks_of(tp)]
    assert (counts(layouts)["words"] == 1).all() and counts(layouts)["words"].shape == (rows, 3)
    belongs = torch.cat([marked(layout) for layout in layouts])
    assert (belongs[:rows] == 1).all() and (belongs[rows:] == 0).all() and len(belongs) == 16
    assert sum(len(list(layout.pieces(torch.zeros(layout.shape)))) for layout in layouts) == -(-rows // (16 // tp))


@pytest.mark.parametrize("tp", CUTS)
def test_whole_is_held_by_all_and_counted_by_one(tp):
    layouts = [Layout.whole("norm", (5,), axis) for axis in ranks_of(tp)]
    assert (counts(layouts)["norm"] == tp).all()
    assert (counts(layouts, primary_only=True)["norm"] == 1).all()


@pytest.mark.parametrize("tp", CUTS)
def test_cut_parts_are_primary_everywhere(tp):
    for make in (
        lambda axis: Layout.rows_cut({"q": 16, "k": 8}, (6,), axis),
        lambda axis: Layout.columns_cut("o", 6, 16, axis),
        lambda axis: Layout.vocabulary_cut("words", 13, 16, 3, axis),
    ):
        assert all((whole == 1).all() for whole in counts([make(axis) for axis in ranks_of(tp)], primary_only=True).values())


def test_pieces_are_views_at_the_right_place():
    layout = Layout.rows_cut({"q": 4, "k": 2}, (3,), ranks_of(2)[1])
    local = torch.arange(9.0).view(3, 3)
    pieces = {piece.name: piece for piece in layout.pieces(local, "moment.")}
    assert pieces["moment.k"].box == ((1, 2), (0, 3)) and torch.equal(pieces["moment.k"].tensor, local[2:])
    pieces["moment.q"].tensor.fill_(-1)
    assert (local[:2] == -1).all() and (local[2:] >= 0).all()


def test_a_cut_that_does_not_divide_is_refused_with_both_numbers():
    axis = ranks_of(4)[0]
    for make in (
        lambda: Layout.rows_cut({"q": 6}, (3,), axis),
        lambda: Layout.columns_cut("q", 3, 6, axis),
        lambda: Layout.vocabulary_cut("q", 5, 6, 3, axis),
    ):
        with pytest.raises(ValueError, match=r"^q: 6 .* 4 "):
            make()
