"""Layers cut over two ranks against the whole layer: outputs and every gradient."""

import torch
from ranks import run_ranks

from trivium import comm
from trivium.mesh import Axis, Mesh
from trivium.parallel.embedding import VocabParallelEmbedding
from trivium.parallel.linear import ColumnParallelLinear, RowParallelLinear
from trivium.parallel.loss import vocab_parallel_cross_entropy
from trivium.rng import Init

H, F, V, PADDED = 12, 20, 21, 24


def forward_and_gradients(tp: Axis) -> dict[str, torch.Tensor]:
    """A small language model over `tp`: loss, and the gradient of every part that lies here, in global places."""
    generator = torch.Generator().manual_seed(7)
    tokens, labels = torch.randint(0, V, (2, 9), generator=generator), torch.randint(0, V, (18,), generator=generator)
    embedding = VocabParallelEmbedding("e", V, PADDED, H, tp, Init(1, 0.5))
    up = ColumnParallelLinear(H, {"a": F, "b": F}, tp, bias=True, init=Init(1, 0.3))
    down = RowParallelLinear("d", F, H, tp, bias=True, init=Init(1, 0.3))
    x = embedding(tokens)
    a, b = up(x).chunk(2, dim=-1)
    from_heads = x + down(torch.tanh(a) * b)
    logits = torch.nn.functional.linear(comm.copy_to(from_heads, tp), embedding.weight).flatten(0, 1)
    losses = vocab_parallel_cross_entropy(logits, labels, V, tp)
    losses.sum().backward()
    found = {"losses": losses.detach()}
    for p in (embedding.weight, up.weight, up.bias, down.weight, down.bias):
        for piece in p.param_layout.pieces(p.grad):
            whole = torch.zeros(piece.shape)
            whole[tuple(slice(*bounds) for bounds in piece.box)] = piece.tensor
            found[piece.name] = whole if piece.primary else torch.zeros(piece.shape)
    return found


def on_rank(mesh: Mesh) -> dict[str, torch.Tensor]:
    return forward_and_gradients(mesh.tp)


def test_two_ranks_match_one():
    """fp32, sums in another order over at most 24 terms: 1e-6 of each tensor's norm."""
    expected, ranks = forward_and_gradients(Axis("tp")), run_ranks(2, on_rank, tp=2)
    for name, tensor in expected.items():
        found = ranks[0][name] if name == "losses" else ranks[0][name] + ranks[1][name]
        assert (found - tensor).norm() <= 1e-6 * tensor.norm(), name
    assert torch.equal(ranks[0]["losses"], ranks[1]["losses"])


def test_cross_entropy_is_that_of_torch_where_one_label_is_certain():
    """p near 1 in bf16: the gradient p - 1 of the true class must not come from rounded p. Error at most one rounding, 2^-8."""
    logits = torch.randn(64, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(64) % V
    logits[torch.arange(64), labels] = 9.0
    padded = torch.nn.functional.pad(logits, (0, PADDED - V), value=50.0).requires_grad_()
    exact = logits.double().requires_grad_()
    weights = torch.rand(64, generator=torch.Generator().manual_seed(1))
    losses = vocab_parallel_cross_entropy(padded * 1, labels, V, Axis("tp"))
    (losses * weights).sum().backward()
    reference = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (reference * weights).sum().backward()
    assert (losses - reference).abs().max() <= 1e-5
    assert ((padded.grad[:, :V] - exact.grad).abs() <= 2**-8 * exact.grad.abs() + 1e-9).all()
    assert padded.grad[:, V:].abs().sum() == 0
