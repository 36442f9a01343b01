"""The model in parts: cut into stages, cut by tokens, computed again.

Each is bit for bit the whole, under dropout too.
"""

from dataclasses import replace

import models
import pytest
import torch

from trivium.config import ModelConfig
from trivium.layout import ReductionGroup, Role
from trivium.mesh import Axis
from trivium.model.block import Block
from trivium.model.gpt import GPT
from trivium.model.recompute import Recompute
from trivium.model.tokens import TokenContext
from trivium.ops import Ops
from trivium.optim.buckets import Reduction, make_buckets
from trivium.parallel.sharding import Sharding
from trivium.rng import DropoutStream

CPU, VOCAB, LENGTH = torch.device("cpu"), 101, 16
UNTIED = replace(
    models.LLAMA,
    ffn_hidden_size=48,
    hidden_size=24,
    num_attention_heads=4,
    kv_channels=6,
    max_position_embeddings=LENGTH,
    hidden_dropout=0.3,
)
TIED = replace(UNTIED, untie_embeddings_and_output_weights=False)
GPT2 = replace(
    models.GPT2,
    ffn_hidden_size=96,
    hidden_size=24,
    num_attention_heads=4,
    kv_channels=6,
    max_position_embeddings=LENGTH,
    hidden_dropout=0.3,
)
MODELS = {"untied llama": UNTIED, "tied llama": TIED, "gpt2": GPT2}
TOKENS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
TARGETS = TOKENS.roll(-1, dims=1), torch.ones(TOKENS.shape)


def model_of(config: ModelConfig, **part) -> GPT:
    return GPT(config, VOCAB, ops=Ops(), seed=3, **part)


def context_of(tokens: torch.Tensor | None = None) -> TokenContext:
    """Return the context of some of the tokens, by their places; of all by default."""
    positions = torch.arange(LENGTH) if tokens is None else tokens
    return TokenContext(positions, stream=DropoutStream.of(1, 7, torch.tensor([4, 9]), positions))


def gradients_of(*models: GPT) -> dict[str, torch.Tensor]:
    """Return gradients by name, those of a weight on two stages added, as the pipeline does."""
    found: dict[str, torch.Tensor] = {}
    for parameter in dict.fromkeys(p for model in models for p in model.parameters()):
        for piece in parameter.param_layout.pieces(parameter.grad):
            found[piece.name] = (
                found[piece.name] + piece.tensor if piece.name in found else piece.tensor
            )
    return found


def names_of(model: GPT) -> list[str]:
    return [part.name for parameter in model.parameters() for part in parameter.param_layout.parts]


# --- stages ---


def through_stages(stages: list[GPT]) -> torch.Tensor:
    """Run all stages forward and backward; return the losses.

    Hidden states and their gradients pass from stage to stage by value, as messages do.
    """
    x, edges = TOKENS, []
    for stage in stages[:-1]:
        y = stage(x, context_of())
        x = y.detach().requires_grad_()
        edges.append((y, x))
    total, losses = stages[-1](x, context_of(), targets=TARGETS)
    total.backward()
    for y, x in reversed(edges):
        y.backward(x.grad)
    return losses.detach()


def stages_of(config: ModelConfig, ends: tuple[int, ...], *, shared: bool) -> list[GPT]:
    """Make stages of the layers up to each of `ends`.

    shared: embedding and head stand on one rank, and a tied weight is one parameter.
    """
    stages: list[GPT] = []
    sharding = Sharding() if shared else Sharding(embedding=Axis("embedding", 2, 0, (0, 1)))
    for stage, (first, last) in enumerate(zip((0, *ends), ends, strict=False)):
        tied = stages[0].embedding.weight if shared and stages and config.tied else None
        ends_of_model = {"embeds": stage == 0, "predicts": stage == len(ends) - 1}
        stages.append(
            model_of(
                config,
                layers=range(first, last),
                sharding=sharding,
                tied_weight=tied,
                **ends_of_model,
            )
        )
    return stages


@pytest.mark.parametrize("shared", [True, False], ids=["one-rank", "two-ranks"])
@pytest.mark.parametrize("ends", [(1, 3), (0, 3), (3, 3), (0, 1, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("config", MODELS.values(), ids=list(MODELS))
def test_stages_are_the_whole_model_in_losses_and_every_gradient(config, ends, shared):
    """Also where a stage has no layer, or embedding or head alone.

    A tied weight gets the same two gradients, and a sum of two has one order.
    """
    whole, stages = model_of(config), stages_of(config, ends, shared=shared)
    total, expected = whole(TOKENS, context_of(), targets=TARGETS)
    total.backward()
    assert torch.equal(through_stages(stages), expected.detach())
    reference, found = gradients_of(whole), gradients_of(*stages)
    assert found.keys() == reference.keys()
    for name in reference:
        assert torch.equal(found[name], reference[name]), name


@pytest.mark.parametrize("config", MODELS.values(), ids=list(MODELS))
def test_each_stage_holds_what_it_computes_and_no_more(config):
    """Every parameter is on one stage, but a tied weight is on the first and on the last.

    It is counted on the first.
    """
    stages, whole = stages_of(config, (1, 2, 3), shared=False), model_of(config)
    held = [name for stage in stages for name in names_of(stage)]
    twins = {"embedding.word.weight"} if config.tied else set()
    assert (
        set(held) == set(names_of(whole))
        and {name for name in held if held.count(name) > 1} == twins
    )
    assert {name.split(".")[1] for name in names_of(stages[1])} == {"1"} and stages[
        1
    ].embedding is stages[1].head is stages[1].final_norm is None
    assert (
        stages[0].embeds and not stages[0].predicts and stages[2].predicts and not stages[2].embeds
    )
    if config.tied:
        first, last = stages[0].embedding.weight, stages[2].head
        assert torch.equal(first, last) and (first.param_layout.uses, last.param_layout.uses) == (
            1,
            1,
        )


def test_a_tied_weight_on_one_rank_is_one_parameter_used_twice():
    first, last = stages_of(TIED, (1, 3), shared=True)
    assert last.head is first.embedding.weight and last.head.param_layout.uses == 2
    assert (
        model_of(TIED).embedding.weight.param_layout.uses == 2
        and model_of(UNTIED).embedding.weight.param_layout.uses == 1
    )


@pytest.mark.parametrize(
    "config", [*MODELS.values(), replace(GPT2, qk_layernorm=True)], ids=[*MODELS, "QK norms"]
)
def test_every_part_has_the_role_that_its_name_says(config):
    """Weight decay goes by roles: vectors must not have that of a matrix, nor matrices another."""
    expected = {"embedding": Role.EMBEDDING, "head": Role.HEAD}
    parts = [part for p in model_of(config).parameters() for part in p.param_layout.parts]
    for part in parts:
        stem, kind = part.name.rsplit(".", 1)
        if kind == "bias":
            assert part.role == Role.BIAS and len(part.shape) == 1
        elif stem.endswith("norm"):
            assert part.role == Role.NORM and len(part.shape) == 1
        else:
            assert part.role == expected.get(stem.split(".")[0], Role.MATRIX)
            assert len(part.shape) == 2


# --- tokens ---


@pytest.mark.parametrize(
    "cut", [range(4), range(12, 16), [4, 5, 6, 7, 8, 9, 10, 11], [2, 3, 12, 13]], ids=str
)
@pytest.mark.parametrize("config", MODELS.values(), ids=list(MODELS))
def test_dropout_and_positions_of_some_tokens_are_those_of_the_whole(config, cut):
    """All but attention treats each token by itself.

    The cuts are those of sequence parallel, of context parallel's zig-zag, and of both.
    """
    tokens = torch.tensor(list(cut))
    embeds, block = model_of(config, layers=range(0), predicts=False), model_of(config).layers[1]
    whole, part = embeds(TOKENS, context_of()), embeds(TOKENS[:, tokens], context_of(tokens))
    assert torch.equal(part, whole[:, tokens]) and (whole == 0).any()
    block.attention = torch.nn.Module()
    block.attention.forward = lambda x, *args: x
    assert torch.equal(
        block(part, None, context_of(tokens)), block(whole, None, context_of())[:, tokens]
    )


# --- recompute ---


def trained(model: GPT) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Run one backward pass into buckets, which count the gradients.

    Returns the losses, all gradients, and the bytes that forward kept for backward.
    """
    reductions = {ReductionGroup.DENSE: Reduction()}
    buckets, kept = make_buckets(model.parameters(), torch.float32, CPU, reductions, 2000), []
    for bucket in buckets:
        bucket.begin(1)
    torch.manual_seed(11)  # attention dropout draws from torch's generator
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        total, losses = model(TOKENS, context_of(), targets=TARGETS)
    total.backward()
    for bucket in buckets:
        bucket.start_reduction()
    return losses.detach(), torch.cat([bucket.gradients for bucket in buckets]), sum(kept)


RECOMPUTES = {
    "every layer": (Recompute("full", "uniform", 1), 6),
    "groups of two": (Recompute("full", "uniform", 2), 6),
    "one group": (Recompute("full", "uniform", 5), 6),
    "the first two": (Recompute("full", "block", 2), 5),
    "more than there are": (Recompute("full", "block", 5), 6),
    "attention": (Recompute("selective"), 3),
}


@pytest.mark.parametrize(("recompute", "block_passes"), RECOMPUTES.values(), ids=list(RECOMPUTES))
@pytest.mark.parametrize(
    "config",
    [replace(config, attention_dropout=0.2) for config in MODELS.values()],
    ids=list(MODELS),
)
def test_recompute_changes_no_bit_and_keeps_less(config, recompute, block_passes, monkeypatch):
    """With both kinds of dropout on; each use of a parameter is still one gradient.

    The passes of blocks say what was computed again.
    """
    expected, reference, everything = trained(model_of(config))
    honest, passes = Block.forward, []
    monkeypatch.setattr(
        Block,
        "forward",
        lambda self, *args, **kwargs: passes.append(self.name) or honest(self, *args, **kwargs),
    )
    losses, gradients, kept = trained(model_of(config, recompute=recompute))
    assert torch.equal(losses, expected) and torch.equal(gradients, reference)
    assert len(passes) == block_passes and kept < everything


def test_recomputed_attention_is_computed_twice_and_nothing_else():
    calls = []

    class Counting(Ops):
        def attention(self, *args, **kwargs):
            calls.append("attention")
            return super().attention(*args, **kwargs)

        def rms_norm(self, *args, **kwargs):
            calls.append("norm")
            return super().rms_norm(*args, **kwargs)

        def add_rms_norm(self, *args, **kwargs):
            calls.append("norm")
            return super().add_rms_norm(*args, **kwargs)

    for recompute, count in ((Recompute(), 3), (Recompute("selective"), 6)):
        calls.clear()
        trained(GPT(UNTIED, VOCAB, ops=Counting(), seed=3, recompute=recompute))
        assert (calls.count("attention"), calls.count("norm")) == (count, 7)
