"""Collectives: the conjugate pair around a parallel region, forward and gradient, and agreement of all ranks."""

import pytest
import torch
from ranks import run_ranks

from trivium.comm import all_reduce, copy_to, reduce_from
from trivium.mesh import Mesh


def through(mesh: Mesh, name: str):
    """y = f(x) and the gradient of sum(w y), with x and w different on each rank."""
    function = {"copy_to": copy_to, "reduce_from": reduce_from}[name]
    x = torch.tensor([1.0, 10.0]).mul(mesh.rank + 1).requires_grad_()
    w = torch.tensor([2.0, 3.0]) * (mesh.rank + 1)
    y = function(x, mesh.tp)
    (w * y).sum().backward()
    return y.tolist(), x.grad.tolist(), x.tolist()


def test_copy_to_sums_gradients():
    results = run_ranks(2, through, "copy_to", tp=2)
    assert [y for y, _, _ in results] == [[1.0, 10.0], [2.0, 20.0]]
    assert [grad for _, grad, _ in results] == [[6.0, 9.0]] * 2


def test_reduce_from_sums_values():
    results = run_ranks(2, through, "reduce_from", tp=2)
    assert [y for y, _, _ in results] == [[3.0, 30.0]] * 2
    assert [grad for _, grad, _ in results] == [[2.0, 3.0], [4.0, 6.0]]
    assert [x for _, _, x in results] == [[1.0, 10.0], [2.0, 20.0]], "the input was overwritten"


def test_the_pair_over_the_other_axis_does_nothing():
    for name in ("copy_to", "reduce_from"):
        assert [y for y, _, _ in run_ranks(2, through, name, pp=2)] == [[1.0, 10.0], [2.0, 20.0]]


def gradient_of_a_shared_output(mesh: Mesh) -> list[float]:
    """Both branches of a residual use one gradient tensor: copy_to must sum into a copy."""
    x = torch.ones(3, requires_grad=True)
    y = copy_to(x, mesh.tp) + x
    y.sum().backward()
    return x.grad.tolist()


def test_copy_to_leaves_the_gradient_of_a_residual_alone():
    assert run_ranks(2, gradient_of_a_shared_output, tp=2) == [[3.0] * 3] * 2


def reduced(mesh: Mesh, op: str) -> float:
    return all_reduce(torch.tensor([4.0, 1.0, 6.0][mesh.rank]), mesh.world, op).item()


@pytest.mark.parametrize(("op", "expected"), [("sum", 11.0), ("max", 6.0), ("min", 1.0)])
def test_all_reduce(op, expected):
    assert run_ranks(3, reduced, op) == [expected] * 3


def test_at_size_one_all_are_the_identity():
    mesh = Mesh.plan(1, 0)
    x = torch.ones(2, requires_grad=True)
    assert copy_to(x, mesh.tp) is x and reduce_from(x, mesh.tp) is x and all_reduce(x, mesh.tp) is x
