"""FLOP and parameter counts against numbers worked out by hand."""

from dataclasses import replace

import models

from trivium.estimate.flops import flops_per_token, peak_flops
from trivium.estimate.parameters import matrix_parameters, parameters_by_role, total_parameters
from trivium.layout import layout_of
from trivium.model.gpt import GPT
from trivium.ops import Ops
from trivium.role import Role

LLAMA = replace(
    models.LLAMA,
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=24,
    num_attention_heads=4,
    kv_channels=2,
    max_position_embeddings=16,
)
GPT2 = replace(
    models.GPT2,
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=32,
    num_attention_heads=4,
    kv_channels=2,
    max_position_embeddings=16,
)


def test_matrix_parameters_by_hand():
    """Per layer q 64, k 32, v 32, o 64, three of 8 x 24 = 192.

    The head is 10 x 8; the embedding does not count.
    """
    assert matrix_parameters(LLAMA, 10) == 2 * (64 + 32 + 32 + 64 + 3 * 192) + 80
    assert matrix_parameters(GPT2, 10) == 2 * (4 * 64 + 2 * 256) + 80


def test_parameters_by_role_by_hand():
    """A tied matrix is an embedding; per layer GPT-2 has biases 24 + 8 + 32 + 8 and two norms."""
    assert parameters_by_role(LLAMA, 10) == {
        Role.HEAD: 80,
        Role.EMBEDDING: 80,
        Role.MATRIX: 2 * (64 + 32 + 32 + 64 + 3 * 192),
        Role.NORM: 2 * 2 * 8 + 8,
    }
    assert parameters_by_role(GPT2, 10) == {
        Role.EMBEDDING: 80 + 16 * 8,
        Role.MATRIX: 2 * (4 * 64 + 2 * 256),
        Role.BIAS: 2 * (24 + 8 + 32 + 8) + 5 * 8,
        Role.NORM: 5 * 8,
    }


def test_flops_by_hand():
    """6N, plus 12 (full) or 6 (causal) x layers x heads x head size x length."""
    n = matrix_parameters(LLAMA, 10)
    assert flops_per_token(LLAMA, 10, 100, causal=False) == 6 * n + 12 * 2 * 8 * 100
    assert flops_per_token(LLAMA, 10, 100, causal=True) == 6 * n + 6 * 2 * 8 * 100


def test_total_parameters_are_those_of_the_model():
    for config in (LLAMA, GPT2):
        model = GPT(config, 10, ops=Ops(), seed=None)
        total = 0
        for parameter in model.parameters():
            pieces = layout_of(parameter).pieces(parameter.data)
            total += sum(piece.tensor.numel() for piece in pieces)
        assert total_parameters(config, 10) == total


def test_peak_is_known_by_name_or_not_at_all():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
