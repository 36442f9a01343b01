"""Layouts: over any cut, each element of a part lies on exactly one rank (or is counted on one),
and padding in no part.
"""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.layout import Layout, Part, Rows
from trivium.mesh import Axis, Mesh

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
    assert {name: tuple(whole.shape) for name, whole in held.items()} == {
        "q": (16, *columns),
        "k": (8, *columns),
        "v": (4, *columns),
    }
    assert all((whole == 1).all() for whole in held.values())
    assert all(
        layout.shape == (28 // tp, *columns) and (marked(layout) == 1).all() for layout in layouts
    )


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
    assert sum(len(list(layout.pieces(torch.zeros(layout.shape)))) for layout in layouts) == -(
        -rows // (16 // tp)
    )


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
        assert all(
            (whole == 1).all()
            for whole in counts([make(axis) for axis in ranks_of(tp)], primary_only=True).values()
        )


@pytest.mark.parametrize("copies", [2, 4])
def test_fewer_heads_than_ranks_are_held_by_neighbours_and_counted_once(copies):
    """4 / copies key-value heads of 2 rows on 4 ranks, beside queries that are cut over all of
    them.
    """
    heads, meshes = 4 // copies, [Mesh.plan(4, rank, tp=4, kv_copies=copies) for rank in range(4)]
    layouts = [
        Layout.rows_cut(
            {"q": 16, "k": Rows(2 * heads, mesh.kv), "v": Rows(2 * heads, mesh.kv)}, (6,), mesh.tp
        )
        for mesh in meshes
    ]
    held, counted = counts(layouts), counts(layouts, primary_only=True)
    assert {name: tuple(whole.shape) for name, whole in held.items()} == {
        "q": (16, 6),
        "k": (2 * heads, 6),
        "v": (2 * heads, 6),
    }
    assert (held["q"] == 1).all() and (held["k"] == copies).all() and (held["v"] == copies).all()
    assert all((whole == 1).all() for whole in counted.values())
    for rank, layout in enumerate(layouts):
        q, k, v = layout.parts
        head = rank // copies
        assert layout.shape == (8, 6) and (marked(layout) == 1).all()
        assert q.box == ((4 * rank, 4 * rank + 4), (0, 6)) and k.box == v.box == (
            (2 * head, 2 * head + 2),
            (0, 6),
        )


def test_a_gradient_is_partial_over_the_ranks_that_hold_the_same_heads_and_over_no_others():
    """Each of the copies serves other query heads, so each sees a share; a projection of its own
    rows sees all.
    """
    for rank in range(4):
        mesh = Mesh.plan(4, rank, tp=4, kv_copies=2)
        q, k = Layout.rows_cut({"q": 16, "k": Rows(4, mesh.kv)}, (), mesh.tp).parts
        assert q.partial.size == 1 and k.partial is mesh.kv


def test_whole_tensors_are_partial_where_they_are_said_to_be():
    axis = ranks_of(4)[2]
    assert Layout.whole("norm", (5,), axis).parts[0].partial.size == 1
    assert Layout.whole("norm", (5,), axis, partial=True).parts[0].partial is axis


@pytest.mark.parametrize("tp", [1, 2])
def test_twins_are_counted_on_the_first_of_them(tp):
    """Embedding and tied head: two ranks of the pipeline, each with the same cut over tp."""
    cut = [Layout.vocabulary_cut("words", 13, 16, 3, axis) for axis in ranks_of(tp)]
    twins = [Axis("embedding", 2, rank, (0, 6)) for rank in range(2)]
    layouts = [layout.tied(axis, uses=1) for layout in cut for axis in twins]
    assert (counts(layouts)["words"] == 2).all() and (
        counts(layouts, primary_only=True)["words"] == 1
    ).all()
    assert all(
        layout.twins is axis and layout.uses == 1
        for layout, axis in zip(layouts, twins * tp, strict=True)
    )
    assert all(layout.parts[0].primary == (layout.twins.rank == 0) for layout in layouts)


def test_a_tied_weight_on_one_rank_has_two_uses_and_no_twin():
    plain = Layout.vocabulary_cut("words", 13, 16, 3, ranks_of(2)[1])
    tied = plain.tied(Axis("embedding"), uses=2)
    assert (plain.uses, plain.twins.size) == (1, 1) and (tied.uses, tied.twins.size) == (2, 1)
    assert (tied.shape, tied.parts) == (plain.shape, plain.parts) and tied.parts[0].primary


def test_what_a_tied_copy_is_not_primary_of_stays_so():
    axis = ranks_of(2)[1]
    assert not Layout.whole("w", (4, 2), axis).tied(Axis("embedding"), uses=2).parts[0].primary


def layouts_to_cut() -> st.SearchStrategy[Layout]:
    """Every kind of layout, on any rank of a cut, of two dims, of one and of none."""
    axes = st.sampled_from([axis for size in CUTS for axis in ranks_of(size)])
    meshes = st.sampled_from(
        [Mesh.plan(4, rank, tp=4, kv_copies=copies) for rank in range(4) for copies in CUTS]
    )
    sizes = st.integers(1, 5)
    return st.one_of(
        st.builds(
            lambda axis, a, b, c: Layout.rows_cut({"q": 4 * a, "k": 4 * b}, (c,), axis),
            axes,
            sizes,
            sizes,
            sizes,
        ),
        st.builds(
            lambda axis, a, b: Layout.rows_cut({"q": 4 * a, "k": 4 * b}, (), axis),
            axes,
            sizes,
            sizes,
        ),
        st.builds(
            lambda mesh, a, c: Layout.rows_cut({"q": 8, "k": Rows(4 * a, mesh.kv)}, (c,), mesh.tp),
            meshes,
            sizes,
            sizes,
        ),
        st.builds(lambda axis, a, b: Layout.columns_cut("o", a, 4 * b, axis), axes, sizes, sizes),
        st.builds(
            lambda axis, rows, c: Layout.vocabulary_cut("words", rows, 16, c, axis),
            axes,
            st.integers(1, 16),
            sizes,
        ),
        st.builds(lambda axis, a, b: Layout.whole("norm", (a, b), axis), axes, sizes, sizes),
        st.builds(lambda axis: Layout.whole("steps", (), axis), axes),
    )


def places(part: Part) -> torch.Tensor:
    """The place of each element of a part in its global tensor, in the shape of its box."""
    whole = torch.arange(prod(part.shape)).view(part.shape)
    return whole[tuple(slice(*interval) for interval in part.box)]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(layout=layouts_to_cut(), data=st.data())
def test_the_pieces_of_any_flat_range_tile_exactly_that_range(layout, data):
    """Memory that begins and ends anywhere, as an optimizer's shard does: each of its elements is
    in one piece, under its own name and
    place, but those of the padding in none."""
    count = prod(layout.shape)
    start = data.draw(st.integers(0, count), label="start")
    stop = data.draw(st.integers(start, count), label="stop")
    expected_names, expected_places = [""] * count, torch.full((count,), -1)
    for part in layout.parts:
        first, last = part.range
        expected_names[first:last] = [part.name] * (last - first)
        expected_places[first:last] = places(part).flatten()
    memory = torch.full((stop - start,), -1)
    names = [""] * (stop - start)
    for piece in layout.pieces(memory, start=start):
        assert (
            tuple(piece.tensor.shape) == tuple(b - a for a, b in piece.box)
            and piece.tensor.numel() > 0
        )
        assert all(0 <= a < b <= size for (a, b), size in zip(piece.box, piece.shape, strict=True))
        at = piece.tensor.storage_offset()
        assert (
            piece.tensor.is_contiguous() and (memory[at : at + piece.tensor.numel()] == -1).all()
        ), "in two pieces"
        names[at : at + piece.tensor.numel()] = [piece.name] * piece.tensor.numel()
        whole = torch.arange(prod(piece.shape)).view(piece.shape)
        piece.tensor.copy_(
            whole[tuple(slice(*interval) for interval in piece.box)]
        )  # through the view, into memory
    assert (
        memory.tolist() == expected_places[start:stop].tolist()
        and names == expected_names[start:stop]
    )
    pieces = list(layout.pieces(memory, start=start))
    assert all(sum(piece.name == part.name for piece in pieces) <= 3 for part in layout.parts)


def test_a_flat_range_is_a_row_end_whole_rows_and_a_row_start():
    """Elements 4 to 20 of rows of 5: the end of row 0, rows 1 to 3 whole, nothing of row 4."""
    layout = Layout.whole("w", (6, 5), ranks_of(1)[0])
    local = torch.arange(30.0)
    boxes = [piece.box for piece in layout.pieces(local[4:20], start=4)]
    assert boxes == [((0, 1), (4, 5)), ((1, 4), (0, 5))]
    assert [piece.box for piece in layout.pieces(local[4:23], start=4)] == [
        *boxes,
        ((4, 5), (0, 3)),
    ]
    assert [piece.box for piece in layout.pieces(local[6:9], start=6)] == [((1, 2), (1, 4))]
    assert [piece.box for piece in layout.pieces(local)] == [((0, 6), (0, 5))]


def test_pieces_of_shards_say_who_counts_them():
    """A shard of a tensor that is not primary here is not primary either."""
    layout = Layout.whole("w", (4, 4), ranks_of(2)[1])
    assert [piece.primary for piece in layout.pieces(torch.zeros(7), start=3)] == [
        False,
        False,
        False,
    ]


def test_pieces_are_views_at_the_right_place():
    layout = Layout.rows_cut({"q": 4, "k": 2}, (3,), ranks_of(2)[1])
    local = torch.arange(9.0).view(3, 3)
    pieces = {piece.name: piece for piece in layout.pieces(local, "moment.")}
    assert pieces["moment.k"].box == ((1, 2), (0, 3)) and torch.equal(
        pieces["moment.k"].tensor, local[2:]
    )
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
