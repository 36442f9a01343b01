"""Layers cut over ranks against the whole layer: outputs and every gradient."""

import pytest
import torch
from layers import column_parallel, row_parallel

from trivium.layout import Layout, Rows
from trivium.mesh import Mesh
from trivium.ops import Ops
from trivium.parallel.layers import VocabParallelEmbedding
from trivium.parallel.loss import head_loss
from trivium.parallel.sharding import Sharding
from trivium.rng import Init, new_parameter
from trivium.testing import run_ranks

H, F, V, PADDED = 12, 24, 21, 24


def forward_and_gradients(sharding: Sharding) -> dict[str, torch.Tensor]:
    """A small language model cut as `sharding` says.

    Losses, and this rank's share of the gradient of every part, in global places.
    """
    generator, tp = torch.Generator().manual_seed(7), sharding.tp
    tokens, labels = (
        torch.randint(0, V, (2, 12), generator=generator),
        torch.randint(0, V, (24,), generator=generator),
    )
    words = new_parameter(Layout.vocabulary_cut("e", V, PADDED, H, tp), Init(1, 0.5))
    embedding = VocabParallelEmbedding(words, sharding)
    up = column_parallel(H, {"a": F, "b": F}, sharding, Init(1, 0.3), bias=True)
    down = row_parallel("d", F, H, sharding, Init(1, 0.3))
    x = embedding(tokens)
    assert x.shape == (2, 12 // tp.size if sharding.sequence_parallel else 12, H)
    a, b = up(x).chunk(2, dim=-1)
    from_heads = x + down(torch.tanh(a) * b)
    assert a.shape == (2, 12, F // tp.size) and from_heads.shape == x.shape
    total, losses = head_loss(
        from_heads, embedding.weight, labels, torch.ones(labels.shape), V, sharding, Ops()
    )
    total.backward()
    found = {"losses": losses}
    for p in (embedding.weight, up.weight, up.bias, down.weight, down.bias):
        partial = {part.name for part in p.param_layout.parts if part.partial.size > 1}
        for piece in p.param_layout.pieces(p.grad):
            whole = found.setdefault(piece.name, torch.zeros(piece.shape))
            if piece.primary or piece.name in partial:
                whole[tuple(slice(*bounds) for bounds in piece.box)] = piece.tensor
    return found


def on_rank(mesh: Mesh, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    return forward_and_gradients(Sharding(tp=mesh.tp, sequence_parallel=sequence_parallel))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_any_number_of_ranks_matches_one(n, sequence_parallel):
    """fp32, sums in another order over at most 24 terms: 1e-6 of each tensor's norm."""
    expected, ranks = (
        forward_and_gradients(Sharding()),
        run_ranks(n, on_rank, sequence_parallel, tp=n),
    )
    for name, tensor in expected.items():
        found = ranks[0][name] if name == "losses" else sum(rank[name] for rank in ranks)
        assert (found - tensor).norm() <= 1e-6 * tensor.norm(), name
    assert all(torch.equal(ranks[0]["losses"], rank["losses"]) for rank in ranks)


def of_copied_rows(
    mesh: Mesh, sequence_parallel: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q cut over all of tp beside a k of which several ranks hold the same rows.

    This rank's k, and its shares of the gradients of x and k.
    """
    sharding = Sharding(tp=mesh.tp, kv=mesh.kv, sequence_parallel=sequence_parallel)
    parts = {"q": 8, "k": Rows(4, mesh.kv)}
    layer = column_parallel(H, parts, sharding, Init(1, 0.3), bias=False)
    x = torch.randn(1, 4, H, generator=torch.Generator().manual_seed(2))
    x = x.tensor_split(mesh.tp.size, dim=1)[mesh.tp.rank] if sequence_parallel else x
    x = x.clone().requires_grad_()
    q, k = layer(x).split((8 // mesh.tp.size, 4 * mesh.kv.size // mesh.tp.size), dim=-1)
    # Each rank's queries weigh its keys by their own number: its share of the gradient is its
    # alone.
    (q.sum() + (mesh.tp.rank + 1) * k.sum()).backward()
    part = layer.weight.param_layout.parts[1]
    whole = torch.zeros(part.shape)
    whole[slice(*part.box[0])] = part.within(layer.weight.grad)
    return k.detach(), x.grad, whole


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
def test_rows_that_several_ranks_hold_are_the_same_and_their_gradients_add_up(sequence_parallel):
    """4 ranks, 2 of them for each half of k.

    fp32, sums of at most 12 terms in another order: 1e-6.
    """
    ranks = run_ranks(4, of_copied_rows, sequence_parallel, tp=4, kv_copies=2)
    layer = column_parallel(H, {"q": 8, "k": 4}, Sharding(), Init(1, 0.3), bias=False)
    x = torch.randn(1, 4, H, generator=torch.Generator().manual_seed(2)).requires_grad_()
    q, k = layer(x).split((8, 4), dim=-1)
    (q.sum() + 3 * k[..., :2].sum() + 7 * k[..., 2:].sum()).backward()  # 1 + 2 and 3 + 4
    found = torch.cat([rank[1] for rank in ranks], dim=1) if sequence_parallel else ranks[0][1]
    for rank, (held, _, _) in enumerate(ranks):
        assert torch.allclose(
            held, k[..., 2 * (rank // 2) : 2 * (rank // 2) + 2], rtol=1e-6, atol=1e-6
        )
    assert (found - x.grad).norm() <= 1e-6 * x.grad.norm()
    gradient = layer.weight.param_layout.parts[1].within(layer.weight.grad)
    assert (sum(rank[2] for rank in ranks) - gradient).norm() <= 1e-6 * gradient.norm()
