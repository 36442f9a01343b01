"""The order of samples against numbers worked out by hand, and the native index builder against the
numpy one."""

import math

import numpy as np
import pytest

from trivium.data import order
from trivium.data.errors import DataError
from trivium.data.order import Epochs

needs_native = pytest.mark.skipif(not order.NATIVE, reason="no native module")
BOTH = [False, pytest.param(True, marks=needs_native)]


@pytest.mark.parametrize(
    ("items", "prefixes", "weights"),
    [
        (["a"], ["a"], None),
        (["1", "a"], ["a"], [1.0]),
        (["0.3", " a", "7e-1", "b "], ["a", "b"], [0.3, 0.7]),
        (["a", "b"], ["a", "b"], None),
        (["1", "2", "3"], ["1", "2", "3"], None),
        (["1", "a", "x", "b"], ["1", "a", "x", "b"], None),
    ],
)
def test_data_path_is_weight_prefix_pairs_or_prefixes(items, prefixes, weights):
    assert order.parse_data_path(items) == (prefixes, weights)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_not_positive_is_an_error(weight):
    with pytest.raises(DataError, match=r"--data-path: weight .* of b must be above 0"):
        order.parse_data_path(["1", "a", weight, "b"])


@pytest.mark.parametrize(
    ("split", "num_sequences", "bounds"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("100,0,0", 7, [(0, 7), None, None]),
        ("1", 7, [(0, 7), None, None]),
        ("1,1", 5, [(0, 2), (2, 5), None]),  # 2.5 rounds to the even 2
        ("1,1", 7, [(0, 4), (4, 7), None]),  # 3.5 rounds to the even 4
        ("969,30,1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("0,1,0", 3, [None, (0, 3), None]),
    ],
)
def test_a_split_is_contiguous_and_rounds_half_to_even(split, num_sequences, bounds):
    assert order.split_bounds(split, num_sequences) == bounds


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan", "inf,1"])
def test_a_split_that_is_none_is_an_error(split):
    with pytest.raises(DataError, match="is not up to three shares"):
        order.split_bounds(split, 10)


@pytest.mark.parametrize(
    ("tokens", "seq_length", "num_samples", "epochs"),
    [
        (101, 10, None, Epochs(1, False, 10, 10)),
        (101, 10, 10, Epochs(1, False, 10, 10)),
        (
            100,
            10,
            10,
            Epochs(2, True, 9, 19),
        ),  # 100 tokens hold 9 samples and one token; 1 of the last epoch is below int(0.8 * 9) = 7
        (100, 10, 16, Epochs(2, False, 19, 19)),  # 16 - 9 = 7 is not
        (100, 10, 15, Epochs(2, True, 9, 19)),
        (1001, 10, 179, Epochs(2, True, 100, 200)),  # int(0.8 * 100) = 80, of which 79 are used
        (1001, 10, 180, Epochs(2, False, 200, 200)),
        (5, 10, 3, Epochs(7, False, 3, 3)),  # an epoch shorter than a sample
        (10**12, 4096, 10**9, Epochs(5, True, 976_562_499, 1_220_703_124)),
    ],
)
def test_epochs_are_the_fewest_that_hold_the_samples(tokens, seq_length, num_samples, epochs):
    assert order.plan_epochs(tokens, seq_length, num_samples) == epochs


@pytest.mark.parametrize("native", BOTH)
def test_a_sample_that_ends_at_a_document_s_end_stays_there(native):
    # Documents of 3, 2 and 4 tokens in this order; samples of 2 tokens share one.
    index = order.sample_index(
        np.array([2, 4, 3], np.int32), 7, np.array([9, 7, 8], np.int32), 2, 4, native
    )
    assert index.tolist() == [[0, 0], [0, 2], [1, 1], [2, 1], [2, 3]] and index.dtype == np.int32


@needs_native
@pytest.mark.parametrize("case", range(20))
def test_native_sample_index_is_the_numpy_one(case):
    random = np.random.default_rng(case)
    lengths = random.integers(0, 9, random.integers(1, 50)).astype(np.int32)
    first, seq_length = int(random.integers(0, 5)), int(random.integers(1, 20))
    document = random.integers(first, first + len(lengths), 200).astype(np.int32)
    num_samples = max(0, (int(lengths[document - first].sum()) - 1) // seq_length)
    ours = order.sample_index(lengths, first, document, seq_length, num_samples, native=True)
    np.testing.assert_array_equal(
        ours, order.sample_index(lengths, first, document, seq_length, num_samples, native=False)
    )


@pytest.mark.parametrize("native", BOTH)
def test_token_counts_beyond_32_bits_do_not_overflow(native):
    lengths = np.full(5, 2**31 - 1, np.int32)
    index = order.sample_index(lengths, 0, np.arange(5, dtype=np.int32), 2**29, 19, native)
    assert index[-1].tolist() == [4, 19 * 2**29 - 4 * (2**31 - 1)]


@needs_native
def test_native_sample_index_refuses_to_run_past_the_tokens():
    with pytest.raises(ValueError, match="fewer tokens"):
        order.sample_index(np.array([4], np.int32), 0, np.array([0], np.int32), 2, 2, native=True)


def test_indices_have_the_announced_shapes_and_the_last_epoch_apart():
    lengths = np.array([4, 3, 5, 6], np.int32)
    epochs = order.plan_epochs(18, 2, 10)
    assert epochs == Epochs(2, True, 8, 17)
    indices = order.build_indices(lengths, 10, epochs, 2, 1234)
    assert {name: array.shape for name, array in indices.items()} == order.index_shapes(4, epochs)
    assert sorted(indices["document"][:4]) == sorted(indices["document"][4:]) == [10, 11, 12, 13]
    assert sorted(indices["shuffle"][:8]) == list(range(8)) and sorted(
        indices["shuffle"][8:]
    ) == list(range(8, 17))
    assert (indices["document"].dtype, indices["shuffle"].dtype) == (np.int32, np.uint32)


def test_the_random_draws_come_in_the_order_document_then_shuffle():
    random = np.random.RandomState(5)
    document, shuffle = np.tile(np.arange(3), 2), np.arange(5)
    random.shuffle(document)
    random.shuffle(shuffle)
    indices = order.build_indices(np.full(3, 2, np.int32), 0, Epochs(2, False, 5, 5), 2, 5)
    assert (
        indices["document"].tolist() == document.tolist()
        and indices["shuffle"].tolist() == shuffle.tolist()
    )


def test_blend_sizes_round_up_and_then_add_half_a_percent():
    assert order.blend_sizes([1, 3], 1000) == ([250, 750], [252, 754])
    assert order.blend_sizes([1, 1, 1], 10) == ([4, 4, 4], [5, 5, 5])


@pytest.mark.parametrize("native", BOTH)
def test_a_blend_takes_the_dataset_furthest_behind_and_the_first_of_equals(native):
    dataset, sample = order.blend_index([1, 1], 6, native)
    assert dataset.tolist() == [0, 1, 0, 1, 0, 1] and sample.tolist() == [0, 0, 1, 1, 2, 2]
    # By hand, behind by: (.25, .75) (.25, -.25) (-.5, .5) (-.25, .25) (0, 0) (-.75, .75) (-.5, .5)
    # (-.25, .25).
    dataset, sample = order.blend_index([1, 3], 8, native)
    assert dataset.tolist() == [1, 0, 1, 1, 0, 1, 1, 1] and sample.tolist() == [
        0,
        0,
        1,
        2,
        1,
        3,
        4,
        5,
    ]
    assert (dataset.dtype, sample.dtype) == (np.int16, np.int64)


@pytest.mark.parametrize("native", BOTH)
def test_an_exhaustive_blend_uses_every_sample_once(native):
    dataset, sample = order.exhaustive_blend_index([3, 0, 5, 1], native)
    drawn = sorted(zip(dataset.tolist(), sample.tolist(), strict=True))
    assert drawn == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 0)]


@needs_native
@pytest.mark.parametrize("case", range(20))
def test_native_blends_are_the_numpy_ones(case):
    random = np.random.default_rng(case)
    count = int(random.integers(1, 30))
    weights = (
        (10.0 ** random.uniform(-5, 5, count)).tolist()
        if case % 2
        else random.integers(1, 4, count).tolist()
    )
    sizes = random.integers(1, 60, count).tolist()
    built = [
        [order.blend_index(weights, 500, native), order.exhaustive_blend_index(sizes, native)]
        for native in (True, False)
    ]
    for ours, reference in zip(*built, strict=True):
        for mine, theirs in zip(ours, reference, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_normalized_weights_sum_to_one():
    assert math.isclose(sum(order.normalized([1, 2, 3e8])), 1) and order.normalized([1, 3]) == [
        0.25,
        0.75,
    ]
