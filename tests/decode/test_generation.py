"""Generation: the cache against whole sequences, greedy tokens against transformers, sampling."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from models import GPT2, LLAMA, llama_of, model_of, tokens_of

from trivium.decode.generate import Decoder, generate
from trivium.decode.sampling import Sampling, sample
from trivium.model.gpt import GPT
from trivium.ops import Ops, cpu


@pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, replace(LLAMA, qk_layernorm=True, rotary_percent=0.5, rotary_interleaved=True)],
)
@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole_sequence(config):
    model, tokens = model_of(config).eval(), tokens_of(length=20)
    whole, decoder = model(tokens), Decoder(model, 2, 20)
    ends = [0, 7, *range(12, 21)]
    parts = [decoder.logits(tokens[:, start:end], predicted=None) for start, end in pairwise(ends)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5 * whole.abs().max()
    last = Decoder(model, 2, 20).logits(tokens)
    assert last.shape[1] == 1
    assert (last - whole[:, -1:]).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_forward_hook_on_a_layer_fires_for_every_token(kernels):
    """Also where a block is one native call, which then must be what computes the layer."""
    if kernels == "native" and not cpu.AVAILABLE:
        pytest.skip("built without a compiler")
    model, shapes, calls = GPT(LLAMA, 50, ops=Ops(kernels), seed=1), [], []
    model.layers[1].register_forward_hook(lambda block, args, y: shapes.append(tuple(y.shape)))
    model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    list(generate(model, tokens_of(2, 5) % 50, 4, Sampling(temperature=0), torch.Generator()))
    assert shapes == [(2, 5, 48), *[(2, 1, 48)] * 3]
    assert len(calls) == (1 if kernels == "native" else 4)


def test_a_forward_hook_on_a_layer_changes_what_is_generated():
    """A hook's result takes the place of the layer's own output."""
    model, prompt = model_of(LLAMA), tokens_of(1, 5)

    def tokens() -> list[int]:
        generator = torch.Generator()
        return [t.item() for t in generate(model, prompt, 8, Sampling(temperature=0), generator)]

    before = tokens()
    handle = model.layers[2].register_forward_hook(lambda block, args, y: -y)
    assert tokens() != before
    handle.remove()
    assert tokens() == before


def test_greedy_generation_equals_transformers():
    model = model_of(LLAMA).eval()
    peer = llama_of(model).eval()
    prompt = tokens_of(1, 5)
    ours = torch.stack(
        list(generate(model, prompt, 20, Sampling(temperature=0), torch.Generator())), dim=1
    )
    theirs = peer.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 5:]
    assert ours.tolist() == theirs.tolist()


def test_sampling_follows_the_distribution_and_its_cuts():
    """20,000 draws: frequencies within five standard deviations."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits, generator = probabilities.log().expand(20_000, 4), torch.Generator().manual_seed(1)

    def frequencies(sampling: Sampling) -> torch.Tensor:
        return torch.bincount(sample(logits, sampling, generator), minlength=4) / 20_000

    def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool(
            (
                (found - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9
            ).all()
        )

    assert close(frequencies(Sampling()), probabilities)
    assert close(frequencies(Sampling(top_k=2)), torch.tensor([0.625, 0.375, 0, 0]))
    assert close(frequencies(Sampling(top_p=0.6)), torch.tensor([0.625, 0.375, 0, 0]))
    assert close(
        frequencies(Sampling(temperature=0.5)), probabilities**2 / (probabilities**2).sum()
    )
    assert frequencies(Sampling(temperature=0))[0] == 1
