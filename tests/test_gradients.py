"""Where weight gradients go.

Every use of a parameter to its sink, at once or when the schedule says, and bit for bit what
autograd would give.
"""

from dataclasses import replace

import models
import pytest
import torch
from layers import column_parallel, row_parallel
from torch import nn

from trivium import comm
from trivium.gradients import Deferral, Sink, attach_sink, ready_sink, sink_of, use
from trivium.layout import Layout
from trivium.mesh import Axis, Mesh
from trivium.model.gpt import GPT
from trivium.ops import Ops
from trivium.parallel.sharding import Sharding
from trivium.rng import Init, new_parameter
from trivium.testing import run_ranks


class Memory:
    """An owner that is nothing else: a gradient for each parameter, and counts."""

    def __init__(self, *parameters: nn.Parameter):
        self.deferral, self.parameters = Deferral(), parameters
        self.gradients = [torch.zeros(p.shape) for p in parameters]
        self.written = self.waits = 0
        for slot, parameter in enumerate(parameters):
            attach_sink(parameter, Sink(self, slot))

    def wait_for_weights(self) -> None:
        self.waits += 1

    def gradient_of(self, slot: int) -> torch.Tensor:
        return self.gradients[slot]

    def wrote(self) -> None:
        self.written += 1


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    )


def add_product(weight: nn.Parameter, dy: torch.Tensor, x: torch.Tensor) -> None:
    """Add dy^T x to the weight's sink, as a linear layer does."""
    sink = sink_of(weight)
    Ops().add_weight_gradient_(sink.memory(), dy, x)
    sink.wrote()


# --- use and Sink ---


def test_without_a_sink_a_parameter_is_used_as_it_is():
    weight = weight_of(3, 2)
    assert use(weight) is weight and ready_sink(weight) is None and sink_of(weight) is None
    use(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_use_brings_its_gradient_to_the_sink_and_leaves_none_behind(dtype):
    weight = weight_of(3, 2, dtype=dtype)
    memory = Memory(weight)
    y = use(weight)
    assert torch.equal(y, weight) and y.dtype == dtype and (memory.written, memory.waits) == (0, 1)
    (y * 3).sum().backward()
    assert (
        torch.equal(memory.gradients[0], torch.full((3, 2), 3.0))
        and memory.written == 1
        and weight.grad is None
    )


def test_each_use_is_one_gradient_however_often_its_result_is_read():
    weight = weight_of(3, 2)
    memory = Memory(weight)
    once = use(weight)
    (once.sum() + (2 * once).sum() + (4 * use(weight)).sum()).backward()
    assert torch.equal(memory.gradients[0], torch.full((3, 2), 7.0)) and (
        memory.written,
        memory.waits,
    ) == (2, 2)


def test_a_parameter_that_did_not_matter_writes_nothing():
    """What hooks would not tell: the owner waits for a count, and says so when it does not come."""
    first, second = weight_of(2), weight_of(3)
    memory = Memory(first, second)
    use(second)
    use(first).sum().backward()
    assert memory.written == 1 and memory.gradients[1].abs().sum() == 0


def test_bf16_gradients_add_up_in_fp32():
    """300 times 1, and a product: bf16 would stop at 256, and round 256 + 1 away."""
    weight = weight_of(4, 4, dtype=torch.bfloat16)
    memory = Memory(weight)
    for _ in range(300):
        use(weight).sum().backward()
    assert torch.equal(memory.gradients[0], torch.full((4, 4), 300.0))
    ones = torch.ones(1, 4, dtype=torch.bfloat16)
    for _ in range(3):
        add_product(weight, ones, ones)
    assert torch.equal(memory.gradients[0], torch.full((4, 4), 303.0)) and memory.written == 303


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_autograd(dtype):
    """In fp32 the GEMM adds; in bf16 each product is rounded, and their sum is not."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(2, 17, n, generator=generator).to(dtype) for n in (5, 7))
    weight = weight_of(5, 7, dtype=dtype)
    memory = Memory(weight)
    for i in range(2):
        add_product(weight, dy[i], x[i])
    expected = sum((dy[i].t() @ x[i]).float() for i in range(2))
    if dtype == torch.bfloat16:
        assert torch.equal(memory.gradients[0], expected)
    else:  # two sums of 17 terms: one rounding each of at most their norm
        assert (memory.gradients[0] - expected).norm() <= 2**-22 * expected.norm()
    assert memory.written == 2


# --- layers ---

LAYERS_INPUT = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(5))


def layers_over(sharding: Sharding, dtype: torch.dtype) -> list[nn.Module]:
    up = column_parallel(12, {"a": 16, "b": 8}, sharding, Init(1, 0.3), bias=True)
    down = row_parallel("d", 24, 12, sharding, Init(1, 0.3))
    return [layer.to(dtype) for layer in (up, down)]


def pass_through(
    mesh: Mesh, how: str, sequence_parallel: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """Return the gradient of the input, those of the parameters, and counts.

    The counts are how many gradients were written before and after backward and after the products.

    how: autograd; sink; deferred, with the products run after backward.
    """
    sharding = Sharding(tp=mesh.tp, sequence_parallel=sequence_parallel)
    layers = layers_over(sharding, dtype)
    params = [p for layer in layers for p in layer.parameters()]
    memory = None if how == "autograd" else Memory(*params)
    x = (
        sharding.own_tokens(LAYERS_INPUT.transpose(1, 2))
        .transpose(1, 2)
        .to(dtype, copy=True)
        .requires_grad_()
    )
    y = layers[1](torch.tanh(layers[0](x)))
    loss = (y * y.detach().sin()).sum()
    counts = [0 if memory is None else memory.written]
    if how == "deferred":
        with memory.deferral.holding() as products:
            loss.backward()
        counts += [memory.written, len(products)]
        assert all(
            gradient.abs().sum() == 0
            for p, gradient in zip(params, memory.gradients, strict=True)
            if p.dim() > 1
        )
        for product in products:
            product()
    else:
        loss.backward()
    counts.append(0 if memory is None else memory.written)
    return x.grad, [p.grad.float() for p in params] if memory is None else memory.gradients, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["alone", "tp2", "tp2-sp"]
)
def test_deferred_products_are_bitwise_the_plain_gradient(n, sequence_parallel, dtype):
    """Two weights wait, two biases do not.

    With sequence parallel a held product gathers its input only when it runs.
    """
    plain, sink, deferred = (
        run_ranks(n, pass_through, how, sequence_parallel, dtype, tp=n)
        for how in ("autograd", "sink", "deferred")
    )
    for rank in range(n):
        assert [found[rank][2] for found in (plain, sink, deferred)] == [
            [0, 0],
            [0, 4],
            [0, 2, 2, 4],
        ]
        for found in (sink, deferred):
            assert torch.equal(found[rank][0], plain[rank][0])
            assert all(map(torch.equal, found[rank][1], plain[rank][1]))


def gathers(mesh: Mesh) -> list[int]:
    """How often tokens were gathered by the end of a backward pass that held its products, and
    after those.
    """
    sharding = Sharding(tp=mesh.tp, sequence_parallel=True)
    layer = column_parallel(12, {"a": 16}, sharding, Init(1, 0.3), bias=False)
    memory, honest, begun = Memory(layer.weight), comm.start_gather_tokens, []
    x = LAYERS_INPUT.tensor_split(mesh.tp.size, dim=1)[mesh.tp.rank].clone().requires_grad_()
    y, counts = layer(x), []
    comm.start_gather_tokens = lambda *args: begun.append(args) or honest(*args)
    try:
        with memory.deferral.holding() as products:
            y.sum().backward()
        counts.append(len(begun))
        for product in products:
            product()
    finally:
        comm.start_gather_tokens = honest
    return [*counts, len(begun)]


def test_a_held_product_keeps_its_tokens_and_gathers_the_others_when_its_turn_comes():
    """Zero-bubble schedules hold many: each would keep all T tokens instead of T / tp."""
    assert run_ranks(2, gathers, tp=2) == [[0, 1]] * 2


# --- Deferral ---


def test_products_run_at_once_unless_they_are_held():
    deferral, done = Deferral(), []
    deferral.run(lambda: done.append(1))
    assert done == [1]
    with deferral.holding() as first:
        deferral.run(lambda: done.append(2))
        deferral.run(lambda: done.append(3))
        assert done == [1]
    with deferral.holding() as second:
        deferral.run(lambda: done.append(4))
    deferral.run(lambda: done.append(5))
    assert done == [1, 5] and (len(first), len(second)) == (2, 1)
    for product in (*second, *first):
        product()
    assert done == [1, 5, 4, 2, 3]


def test_a_backward_pass_that_fails_leaves_nothing_held():
    deferral, done = Deferral(), []
    with pytest.raises(KeyError), deferral.holding():
        raise KeyError
    deferral.run(lambda: done.append(1))
    assert done == [1]


# --- the whole model ---

LLAMA = replace(
    models.LLAMA,
    num_layers=2,
    ffn_hidden_size=48,
    hidden_size=24,
    num_attention_heads=4,
    kv_channels=6,
    max_position_embeddings=16,
    qk_layernorm=True,
)
GPT2 = replace(
    models.GPT2,
    num_layers=2,
    ffn_hidden_size=96,
    hidden_size=24,
    num_attention_heads=4,
    kv_channels=6,
    max_position_embeddings=16,
)


@pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, replace(LLAMA, untie_embeddings_and_output_weights=False)],
    ids=["llama", "gpt2", "tied llama"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_use_of_every_parameter_reaches_its_sink_as_often_as_its_layout_says(config, dtype):
    """And the sum is autograd's, bit for bit where there is one use.

    A tied weight's two are added by autograd in the working dtype.
    """
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    models = [
        GPT(config, 50, ops=Ops(), seed=3).to_device(torch.device("cpu"), dtype) for _ in range(2)
    ]
    memory = Memory(*models[1].parameters())
    for model in models:
        model(tokens, targets=(tokens.roll(-1, 1), torch.ones(tokens.shape)))[0].backward()
    assert memory.written == sum(p.param_layout.uses for p in memory.parameters)
    for plain, p, gradient in zip(
        models[0].parameters(), memory.parameters, memory.gradients, strict=True
    ):
        name = p.param_layout.parts[0].name
        assert p.grad is None, f"{name} was used without passing through its sink"
        if p.param_layout.uses == 1:
            assert torch.equal(gradient, plain.grad.float()), name
        else:
            rounding = 2**-8 if dtype == torch.bfloat16 else 2**-23
            assert (gradient - plain.grad.float()).norm() <= rounding * plain.grad.float().norm(), (
                name
            )


def test_a_use_waits_for_the_weights_before_it_reads_them():
    """Weights that are still on their way from other ranks.

    Each use, and so every micro-batch, asks before it computes.
    """
    weight = new_parameter(Layout.whole("w", (3, 2), Axis("tp")), Init(1, 0.5))
    memory = Memory(weight)
    memory.wait_for_weights = lambda: weight.data.fill_(7.0)
    assert torch.equal(use(weight), torch.full((3, 2), 7.0))
    layer = column_parallel(2, {"a": 3}, Sharding(), Init(1, 0.5), bias=False)
    memory = Memory(layer.weight)
    memory.wait_for_weights = lambda: layer.weight.data.fill_(7.0)
    assert torch.equal(layer(torch.ones(1, 1, 2)), torch.full((1, 1, 3), 14.0))
