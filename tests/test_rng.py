"""Random numbers: a function of what they are for, the same under any cut, and as random as they
claim.

Bounds are five standard deviations of the statistic unless said otherwise: a right generator with
fixed seeds either passes for ever or was a 1-in-two-million accident.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from trivium.layout import Layout
from trivium.mesh import Axis
from trivium.rng import (
    DropoutStream,
    Init,
    attention_dropout_seed,
    dropout,
    new_parameter,
    normal_rows,
)


def ranks_of(size: int) -> list[Axis]:
    return [Axis("tp", size, rank, tuple(range(size))) for rank in range(size)]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r times sqrt(n): standard normal for independent samples."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1] * math.sqrt(a.size))


# --- initial weights ---


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_any_range_of_rows_is_the_slice_of_the_whole(columns):
    whole = normal_rows(1234, "layers.0.q", 0, 20, columns)
    assert whole.shape == (20, columns) and whole.dtype == np.float32
    for start, stop in ((0, 1), (3, 17), (19, 20), (5, 5)):
        assert np.array_equal(
            normal_rows(1234, "layers.0.q", start, stop, columns), whole[start:stop]
        )


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_cut_parameters_are_slices_of_the_whole(tp):
    init, axes = Init(seed=7, std=0.02), ranks_of(tp)
    for name, height in (("q", 24), ("k", 12)):
        layouts = [Layout.rows_cut({"q": 24, "k": 12}, (36,), axis) for axis in axes]
        cut = [
            part.within(new_parameter(layout, init).data)
            for layout in layouts
            for part in layout.parts
            if part.name == name
        ]
        assert np.array_equal(
            torch.cat(cut).numpy(), normal_rows(7, name, 0, height, 36) * np.float32(0.02)
        )
    columns = torch.cat(
        [new_parameter(Layout.columns_cut("o", 10, 36, axis), init).data for axis in axes], dim=1
    )
    assert np.array_equal(columns.numpy(), normal_rows(7, "o", 0, 10, 36) * np.float32(0.02))
    table = torch.cat(
        [new_parameter(Layout.vocabulary_cut("words", 17, 24, 5, axis), init).data for axis in axes]
    )
    assert np.array_equal(table[:17].numpy(), normal_rows(7, "words", 0, 17, 5) * np.float32(0.02))
    assert (table[17:] == 0).all()


def test_rows_are_the_same_across_the_seams_of_drawing():
    """2^20 elements are drawn at a time: row 1,024 of a width of 1,024 opens the second draw."""
    parameter = new_parameter(
        Layout.whole("wide", (1500, 1024), ranks_of(1)[0]), Init(seed=3, std=1.0)
    )
    assert np.array_equal(
        parameter[1000:1100].detach().numpy(), normal_rows(3, "wide", 1000, 1100, 1024)
    )


def test_constants_fill_parts_and_leave_padding_zero():
    layout = Layout.vocabulary_cut("words", 5, 8, 2, ranks_of(2)[1])
    assert new_parameter(layout, Init(seed=1, fill=1.0)).tolist() == [
        [1.0, 1.0],
        [0.0, 0.0],
        [0.0, 0.0],
        [0.0, 0.0],
    ]
    assert (new_parameter(layout, Init(seed=None, std=0.02)) == 0).all()


def test_a_parameter_carries_its_layout():
    layout = Layout.whole("norm", (4,), ranks_of(1)[0])
    assert new_parameter(layout, Init(seed=1, fill=1.0)).param_layout is layout


def test_normals_have_the_moments_of_a_normal():
    x = normal_rows(1, "moments", 0, 1000, 1000).astype(np.float64).ravel()
    n = x.size
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_normals_have_the_tails_of_a_normal(bound, sign):
    x = normal_rows(1, "tails", 0, 1000, 1000) * sign
    expected = 0.5 * math.erfc(bound / math.sqrt(2)) * x.size
    assert abs((x > bound).sum() - expected) < 5 * math.sqrt(expected)


def test_normals_are_finite_at_the_ends():
    """Rows found by search, where the 24 bits behind one radius are all zeros (the largest there
    is), and all ones (none).
    """
    longest, shortest = (
        normal_rows(2, "ends", 21_560_157, 21_560_158, 8)[0, 6:],
        normal_rows(2, "ends", 1_525_134, 1_525_135, 8)[0, 2:4],
    )
    assert np.hypot(*longest) == pytest.approx(math.sqrt(48 * math.log(2)), rel=1e-5)
    assert np.hypot(*shortest) == 0


def test_names_seeds_rows_and_columns_are_uncorrelated():
    x = normal_rows(1, "a", 0, 500, 512)
    others = {
        "name": normal_rows(1, "b", 0, 500, 512),
        "seed": normal_rows(2, "a", 0, 500, 512),
        "digit between seed and name": normal_rows(11, "a", 0, 500, 512),
        "longer name": normal_rows(1, "a0", 0, 500, 512),
    }
    for what, other in others.items():
        assert not np.array_equal(x, other) and abs(correlation(x, other)) < 5, what
    for lag in (1, 2, 3, 4, 8, 16):
        assert abs(correlation(x[:, lag:], x[:, :-lag])) < 5, f"columns {lag} apart"
        assert abs(correlation(np.abs(x[:, lag:]), np.abs(x[:, :-lag]))) < 5, (
            f"sizes of columns {lag} apart: Box-Muller's pairs share a radius"
        )
        assert abs(correlation(x[lag:], x[:-lag])) < 5, f"rows {lag} apart"


# --- hidden dropout ---


def keep(
    iteration: int,
    samples: list[int],
    site: str,
    p: float = 0.1,
    shape=(128, 256),
    seed: int = 1234,
) -> np.ndarray:
    stream = DropoutStream.of(seed, iteration, torch.tensor(samples), torch.arange(shape[0]))
    return stream.keep(torch.Size((len(samples), *shape)), p, site).numpy()


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_dropout_drops_with_probability_p(p):
    for iteration, site in (
        (0, "embedding"),
        (17, "layers.3.mlp"),
        (2**31, "layers.100.attention"),
    ):
        mask = keep(iteration, list(range(8)), site, p)
        dropped = mask.size - mask.sum(dtype=np.int64)
        # At p = 1 the largest 32-bit hash stays: one element in 4 billion.
        assert abs(dropped - p * mask.size) <= 5 * math.sqrt(p * (1 - p) * mask.size) + (p == 1.0)


def test_each_sample_site_and_row_drops_with_probability_p():
    mask = keep(5, list(range(64)), "layers.0.mlp", 0.25, (64, 64))
    for axes in ((1, 2), (0, 2), (0, 1)):
        frequency = mask.mean(axis=axes)
        deviation = math.sqrt(0.25 * 0.75 / (mask.size / frequency.size))
        # The largest of 64 deviations; 6 rather than 5 for the 192 tries. Their spread must not be
        # too small either.
        assert np.abs(frequency - 0.75).max() < 6 * deviation
        assert 0.5 < frequency.std() / deviation < 1.5


def test_masks_of_other_samples_sites_iterations_and_seeds_are_independent():
    mask = keep(10, [100], "layers.0.attention", 0.5)
    others = {
        "sample": keep(10, [101], "layers.0.attention", 0.5),
        "far sample": keep(10, [100 + 2**40], "layers.0.attention", 0.5),
        "site": keep(10, [100], "layers.0.mlp", 0.5),
        "layer": keep(10, [100], "layers.1.attention", 0.5),
        "iteration": keep(11, [100], "layers.0.attention", 0.5),
        "iteration and sample exchanged": keep(100, [10], "layers.0.attention", 0.5),
        "seed": keep(10, [100], "layers.0.attention", 0.5, seed=1235),
    }
    for what, other in others.items():
        assert abs(correlation(mask, other)) < 5, what


def test_many_pairs_of_masks_are_independent():
    """2,016 pairs of samples, and 2,016 of sites: the correlations together are standard normal."""
    by_sample = keep(3, list(range(64)), "layers.0.mlp", 0.5, (64, 64)).reshape(64, -1)
    by_site = np.concatenate(
        [keep(3, [0], f"layers.{layer}.mlp", 0.5, (64, 64)) for layer in range(64)]
    ).reshape(64, -1)
    for masks in (by_sample, by_site):
        r = np.corrcoef(masks.astype(np.float64))[np.triu_indices(64, 1)] * math.sqrt(
            masks.shape[1]
        )
        assert np.abs(r).max() < 5.5
        assert abs(r.var() - 1) < 5 * math.sqrt(2 / r.size)


def test_masks_need_both_words_of_the_key_to_agree():
    """Samples whose 64-bit keys share 32 bits, one pair in 4 billion: still other masks, and not
    the same one in another order.
    """
    keys = torch.tensor([[7, 7, 6, 9], [1, 2, 2, 1]], dtype=torch.int32).unsqueeze(-1)
    masks = (
        DropoutStream(keys, torch.arange(128).int())
        .keep(torch.Size((4, 128, 256)), 0.5, "layers.0.mlp")
        .numpy()
        .reshape(4, -1)
    )
    neighbours = np.arange(masks.shape[1]) ^ 1
    for a in range(4):
        for b in range(a):
            assert (
                abs(correlation(masks[a], masks[b])) < 5
                and abs(correlation(masks[a], masks[b][neighbours])) < 5
            ), (a, b)
    assert len({int(mask.sum()) for mask in masks}) == 4, "a reordered mask keeps its count"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_within_a_mask_are_independent(p):
    mask = keep(1, list(range(4)), "layers.2.attention", p)
    flat = mask.reshape(4, -1)
    for lag in (1, 2, 3, 4, 8, 16, 32, 255, 256, 257, 1024, 4096):
        assert abs(correlation(flat[:, lag:], flat[:, :-lag])) < 5, lag


def test_a_sample_has_its_mask_in_any_batch():
    together = keep(9, [3, 8, 5, 1], "layers.0.mlp")
    assert np.array_equal(together[2:3], keep(9, [5], "layers.0.mlp"))
    assert np.array_equal(together[[1, 0]], keep(9, [8, 3], "layers.0.mlp"))
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize(
    "cut", [[5], [0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 10, 11], [15, 3, 9, 0]], ids=str
)
def test_the_mask_of_some_tokens_is_the_slice_of_the_whole_mask(cut):
    """Of any tokens in any order: of sequence parallel, of both zig-zag chunks of context parallel,
    of both at once.
    """
    samples, tokens = torch.tensor([7, 2**40]), torch.tensor(cut)
    whole = DropoutStream.of(1234, 6, samples, torch.arange(16)).keep(
        torch.Size((2, 16, 24)), 0.5, "layers.1.mlp"
    )
    part = DropoutStream.of(1234, 6, samples, tokens).keep(
        torch.Size((2, len(cut), 24)), 0.5, "layers.1.mlp"
    )
    assert torch.equal(part, whole[:, tokens])
    assert not torch.equal(
        part, DropoutStream.of(1234, 6, samples, tokens + 1).keep(part.shape, 0.5, "layers.1.mlp")
    )


def test_dropout_scales_and_its_gradient_uses_the_same_mask():
    stream = DropoutStream.of(1, 2, torch.tensor([3, 4]), torch.arange(16))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = dropout(x, 0.25, stream, "layers.0.mlp")
    mask = stream.keep(x.shape, 0.25, "layers.0.mlp")
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(y, torch.where(mask, x * (1 / 0.75), 0.0))
    y.sum().backward()
    assert torch.equal(x.grad, mask * (1 / 0.75))


def test_dropout_keeps_infinities_out_of_what_it_drops():
    """Selected, not multiplied: 0 x inf is nan."""
    stream = DropoutStream.of(1, 2, torch.tensor([3]), torch.arange(8))
    y = dropout(torch.full((1, 8, 8), torch.inf), 0.5, stream, "site")
    assert set(y.flatten().tolist()) == {0.0, torch.inf}


def test_without_a_stream_or_at_zero_dropout_is_the_identity():
    x = torch.randn(1, 4, 4)
    assert dropout(x, 0.5, None, "site") is x
    assert dropout(x, 0.0, DropoutStream.of(1, 2, torch.tensor([3]), torch.arange(4)), "site") is x


def test_attention_seeds_differ_by_every_input():
    """Iterations, micro-batches, chunks and ranks: 8,000 of 2^32 within a run, 0.007 collisions
    expected.
    """
    inputs = list(itertools.product(range(20), range(20), range(4), range(5)))
    one, other = ({attention_dropout_seed(seed, *place) for place in inputs} for seed in (1, 2))
    assert len(one) == len(other) == 8000
    assert len(one & other) < 10
    assert all(0 <= seed < 2**32 for seed in one)
