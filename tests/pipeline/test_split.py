"""Which layers each stage gets: Megatron's own functions where they can be asked, worked cases
elsewhere."""

import itertools
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest

from trivium.pipeline.placement import Placement
from trivium.pipeline.split import StageSpec, parse_layout, split_layers


def placement(p, v=1):
    return Placement("interleaved" if v > 1 else "1f1b", p, v)


def counts(*args, **options):
    return [len(stage.layers) for stage in split_layers(*args, **options)]


@pytest.fixture(scope="module")
def megatron():
    """Its layer arithmetic; its import prints warnings about kernels that are not installed."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        block = pytest.importorskip("megatron.core.transformer.transformer_block")
        layer = pytest.importorskip("megatron.core.transformer.transformer_layer")
        layout = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    return SimpleNamespace(
        count=block.get_num_layers_to_build,
        offset=layer.get_transformer_layer_offset,
        layout=layout.PipelineParallelLayerLayout,
    )


def their_stages(megatron, num_layers, p, v, first, last, embedding, loss):
    """(first layer, count) by stage; None where they refuse.

    Two ranks with both ends given and several chunks: their offset divides by zero.
    """
    config = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=p,
        virtual_pipeline_model_parallel_size=v if v > 1 else None,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )
    asked = [
        {"vp_stage": chunk if v > 1 else None, "pp_rank": rank}
        for chunk in range(v)
        for rank in range(p)
    ]
    try:
        sizes = [megatron.count(config, **stage) for stage in asked]
        if p == 2 and first and last and v > 1:
            return list(zip(itertools.accumulate([0, *sizes[:-1]]), sizes, strict=True))
        return list(zip((megatron.offset(config, **stage) for stage in asked), sizes, strict=True))
    except AssertionError:
        return None


def test_every_split_is_megatrons(megatron):
    """Where we refuse, they do too, or lose layers: some two ends do not add up to the whole, and a
    stage between them is left empty."""
    agreed, refused = 0, 0
    options = [(first, last, False, False) for first in (None, 1, 2, 4) for last in (None, 2, 3, 4)]
    options += [(None, None, True, False), (None, None, False, True), (None, None, True, True)]
    for num_layers, p, v, option in itertools.product(
        range(1, 33), (1, 2, 3, 4, 8), (1, 2, 3), options
    ):
        first, last, embedding, loss = option
        if p == 1 and (v > 1 or first or last):
            continue  # they leave the chunks out of account there, or the other layers
        theirs = their_stages(megatron, num_layers, p, v, *option)
        flags = {
            "first": first,
            "last": last,
            "account_for_embedding": embedding,
            "account_for_loss": loss,
        }
        try:
            ours = [
                (stage.layers.start, len(stage.layers))
                for stage in split_layers(num_layers, placement(p, v), **flags)
            ]
        except ValueError:
            refused += 1
            assert (
                theirs is None
                or sum(count for _, count in theirs) != num_layers
                or min(count for _, count in theirs) <= 0
            ), (
                num_layers,
                p,
                v,
                option,
            )
        else:
            agreed += 1
            assert ours == theirs, (num_layers, p, v, option)
    assert agreed > 500 and refused > 500


LAYOUTS = [
    ("EtttL", 1, 1),
    ("Et|tL", 2, 1),
    ("E|t*3|(tt|)*1,L", 4, 1),
    ("E,t*2|(tt|)*5tL", 7, 1),
    ("Et*3|(tt|)*2,t|L", 5, 1),
    ("E|(t|)*6L", 4, 2),
    ("Ett|t|tt||t|tL", 3, 2),
    ("E(t*2|t|)*2L", 5, 1),
    ("Et|*3tL", 4, 1),
]


@pytest.mark.parametrize(("layout", "p", "v"), LAYOUTS)
def test_every_layout_is_megatrons(megatron, layout, p, v):
    letters = {"embedding": "E", "decoder": "t", "loss": "L"}
    assert parse_layout(layout) == [
        "".join(letters[kind.name] for kind in stage)
        for stage in megatron.layout.parse_str_to_list(layout)
    ]
    parsed = megatron.layout(layout, p)
    theirs = [
        [kind.name for kind in parsed.layout[rank][chunk]]
        for chunk in range(v)
        for rank in range(p)
    ]
    stages = split_layers(
        sum(stage.count("decoder") for stage in theirs), placement(p, v), layout=layout
    )
    assert [len(stage.layers) for stage in stages] == [stage.count("decoder") for stage in theirs]
    assert [stage.embeds for stage in stages] == ["embedding" in stage for stage in theirs]
    assert [stage.predicts for stage in stages] == ["loss" in stage for stage in theirs]


def test_an_even_split_by_hand():
    assert split_layers(6, placement(3)) == (
        StageSpec(range(2), embeds=True, predicts=False),
        StageSpec(range(2, 4), embeds=False, predicts=False),
        StageSpec(range(4, 6), embeds=False, predicts=True),
    )
    assert split_layers(3, placement(1)) == (StageSpec(range(3), embeds=True, predicts=True),)


def test_uneven_ends_belong_to_ranks_not_to_stages():
    """4 layers of rank 0 are 2 for each of its chunks: stages 0 and 3 in rounds, 0 and 5 where zb-v
    comes back to it."""
    assert counts(20, placement(3, 2), first=4) == [2, 4, 4, 2, 4, 4]
    assert counts(20, Placement("zb-v", 3, 2), first=4) == [2, 4, 4, 4, 4, 2]
    assert counts(20, Placement("zb-v", 3, 2), first=8, last=4) == [4, 4, 2, 2, 4, 4]


def test_embedding_and_loss_weigh_a_layer_each():
    assert counts(30, placement(4), account_for_embedding=True, account_for_loss=True) == [
        7,
        8,
        8,
        7,
    ]
    assert counts(
        14, Placement("zb-v", 4, 2), account_for_embedding=True, account_for_loss=True
    ) == [1, 2, 2, 2, 2, 2, 2, 1]


def test_a_stage_without_layers_comes_of_accounting_or_a_layout_only():
    assert counts(2, placement(4), account_for_embedding=True, account_for_loss=True) == [
        0,
        1,
        1,
        0,
    ]
    assert counts(2, placement(4), layout="E|t|t|L") == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="--num-layers 2 cannot be cut into"):
        split_layers(2, placement(4))


PP = "--pipeline-model-parallel-size"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
LAYOUT = "--pipeline-model-parallel-layout"


@pytest.mark.parametrize(
    ("num_layers", "p", "v", "options", "words"),
    [
        (
            30,
            4,
            1,
            {},
            f"--num-layers 30 cannot be cut into {PP} 4 stages; use 28 or 32, or set {FIRST} 6",
        ),
        (
            30,
            4,
            2,
            {},
            f"--num-layers 30 cannot be cut into {PP} 4 x 2 model chunks = 8 stages; "
            f"use 24 or 32, or set {FIRST} 6",
        ),
        (3, 4, 1, {}, f"--num-layers 3 cannot be cut into {PP} 4 stages; use 4"),
        (
            *(31, 4, 1, {"account_for_embedding": True, "account_for_loss": True}),
            "--num-layers 31 with --account-for-embedding-in-pipeline-split and "
            "--account-for-loss-in-pipeline-split makes 33, "
            f"which cannot be cut into {PP} 4 stages; use 30 or 34",
        ),
        (
            30,
            4,
            1,
            {"first": 5},
            f"30 less {FIRST} 5 leaves 25 layers, which cannot be cut into 3 x 1 stages; "
            f"use {FIRST} 6 or 3",
        ),
        (
            30,
            4,
            1,
            {"last": 5},
            f"30 less {LAST} 5 leaves 25 layers, which cannot be cut into 3 x 1 stages; "
            f"use {LAST} 6 or 3",
        ),
        (
            30,
            4,
            1,
            {"first": 2, "last": 5},
            f"leaves 23 layers, which cannot be cut into 2 x 1 stages; use {FIRST} 1 or 3",
        ),
        (
            3,
            4,
            1,
            {"last": 1},
            "leaves 2 layers, which cannot be cut into 3 x 1 stages; use --num-layers 4",
        ),
        (30, 4, 2, {"first": 5}, f"{FIRST} 5 cannot be cut into 2 model chunks; use 4 or 6"),
        (30, 4, 1, {"first": 0}, f"{FIRST} 0 cannot be cut into 1 model chunk; use 1 or 2"),
        (
            30,
            2,
            1,
            {"first": 5, "last": 5},
            "leaves 20 layers and no stage for them; the two must add up to --num-layers",
        ),
        (30, 1, 1, {"first": 5}, f"{FIRST} cannot be had with {PP} 1; use 2 or more"),
        (
            30,
            4,
            1,
            {"first": 6, "account_for_loss": True},
            f"{FIRST} cannot be had with --account-for-loss-in-pipeline-split; use {LAYOUT}",
        ),
        (
            4,
            2,
            1,
            {"layout": "Ett|ttL", "last": 2},
            f"{LAYOUT} says all about the stages; leave out {LAST}",
        ),
        (
            4,
            4,
            1,
            {"layout": "Ett|ttL"},
            f"{LAYOUT} Ett|ttL has 2 stages for {PP} 4 stages; add or join some",
        ),
        (
            4,
            2,
            1,
            {"layout": "Ett|tL"},
            f"{LAYOUT} Ett|tL has 3 layers for --num-layers 4; make them equal",
        ),
        (
            4,
            2,
            1,
            {"layout": "Ett|mttL"},
            "has m, a multi-token prediction layer, and there are none; leave it out",
        ),
        (4, 2, 1, {"layout": "Ett(t|tL"}, "has ( where E, t, L, |, x*n or (...)*n is expected"),
        (4, 2, 1, {"layout": "Exx|tL"}, "has x where E, t, L"),
        (
            4,
            2,
            1,
            {"layout": "tEtt|tL"},
            "has tEtt | tL; the first stage begins with the only E, the last one ends with the "
            "only L",
        ),
        (4, 2, 1, {"layout": "Ett|Ett"}, "the first stage begins with the only E"),
        (2, 3, 1, {"layout": "|Et|tL"}, "the first stage begins with the only E"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_a_remedy(num_layers, p, v, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        split_layers(num_layers, placement(p, v), **options)


def test_every_remedy_works():
    """The layer counts and the first rank's share that an error names can be used."""
    tried = 0
    for num_layers, p, v in itertools.product(range(1, 41), range(2, 6), (1, 2)):
        try:
            split_layers(num_layers, placement(p, v))
        except ValueError as error:
            layers, _, first = str(error).partition("; use ")[2].partition(f", or set {FIRST} ")
            for count in layers.split(" or "):
                assert sum(counts(int(count), placement(p, v))) == int(count)
            if first:
                assert counts(num_layers, placement(p, v), first=int(first))[0] == int(first) // v
            tried += 1
    assert tried > 100
