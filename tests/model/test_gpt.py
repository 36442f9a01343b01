"""The model against transformers, in one process: logits, loss, every gradient."""

from dataclasses import replace

import pytest
import torch
from models import GPT2, LLAMA, VOCAB, llama_of, model_of, pieces_of, tokens_of

from trivium import rng
from trivium.interop.hf_names import hf_correspondences
from trivium.model.tokens import TokenContext

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_rope_scaling": True},
        {"untie_embeddings_and_output_weights": False},
        {"disable_bias_linear": False},
    ],
)
def test_llama_equals_transformers_in_logits_and_every_gradient(change):
    """Two implementations of one function in fp32: sums over at most 96 terms, 1e-6 of the norm."""
    config = replace(LLAMA, **change)
    model = model_of(config)
    with torch.no_grad():
        for p in model.parameters():  # norms of one and biases of zero would hide a swap
            p[...] += (
                0.05
                * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                * (p != 0)
            )
    peer, places = (
        llama_of(model, attn_implementation="eager"),
        hf_correspondences(model.config, VOCAB),
    )
    tokens, labels = tokens_of(), tokens_of().roll(-1, dims=1)
    expected = peer(tokens).logits
    logits = model(tokens)[..., :VOCAB]
    assert (logits - expected).norm() <= 2e-6 * expected.norm()
    mean, losses = model(tokens, targets=(labels, torch.full(labels.shape, 1 / labels.numel())))
    peer_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert losses.mean().item() == pytest.approx(peer_loss.item(), rel=1e-6)
    mean.backward()
    peer_loss.backward()
    gradients = dict(peer.named_parameters())
    total = torch.stack([g.grad.norm() for g in gradients.values()]).norm()
    for name, gradient in pieces_of(model, lambda p: p.grad).items():
        reference = gradients[places[name].name].grad
        assert (gradient - reference).norm() <= 1e-5 * max(reference.norm(), 1e-3 * total), name


def test_gpt2_equals_transformers():
    model = model_of(GPT2)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=40,
            n_embd=48,
            n_layer=3,
            n_head=6,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    )
    weights, ours = peer.state_dict(), pieces_of(model)
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = ours["embedding.word.weight"]
    weights["transformer.wpe.weight"] = ours["embedding.position.weight"]
    for i in range(3):
        theirs, mine = f"transformer.h.{i}", f"layers.{i}"
        weights[f"{theirs}.attn.c_attn.weight"] = torch.cat(
            [ours[f"{mine}.attention.{n}.weight"] for n in "qkv"]
        ).T
        weights[f"{theirs}.attn.c_proj.weight"] = ours[f"{mine}.attention.out.weight"].T
        weights[f"{theirs}.mlp.c_fc.weight"] = ours[f"{mine}.mlp.up.weight"].T
        weights[f"{theirs}.mlp.c_proj.weight"] = ours[f"{mine}.mlp.down.weight"].T
    peer.load_state_dict(weights)
    expected = peer(tokens_of()).logits
    assert (model(tokens_of())[..., :VOCAB] - expected).norm() <= 2e-6 * expected.norm()


def test_padding_of_the_vocabulary_changes_nothing_and_gets_no_gradient():
    tokens = tokens_of()
    losses = []
    for multiple in (1, 128):
        model = model_of(replace(GPT2, make_vocab_size_divisible_by=multiple))
        weights = torch.full(tokens.shape, 1 / tokens.numel())
        loss, _ = model(tokens, targets=(tokens.roll(-1, 1), weights))
        loss.backward()
        losses.append(loss.item())
        assert model.embedding.weight.grad[VOCAB:].abs().sum() == 0
        assert model.embedding.weight[VOCAB:].abs().sum() == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_initial_weights_have_the_spread_they_should():
    """Megatron's: init_method_std, and that over sqrt(2 layers) for what writes into the residual.

    2,304 draws or more: 5 sigma is 7.4%.
    """
    weights = pieces_of(model_of(LLAMA))
    for name, expected in (
        ("attention.q", 0.1),
        ("mlp.gate", 0.1),
        ("attention.out", 0.1 / 6**0.5),
        ("mlp.down", 0.1 / 6**0.5),
    ):
        assert weights[f"layers.1.{name}.weight"].std().item() == pytest.approx(
            expected, rel=0.074
        ), name
    assert weights["embedding.word.weight"][:VOCAB].std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("site", ["embedding", "layers.1.attention", "layers.1.mlp"])
def test_hidden_dropout_is_at_every_site_with_its_own_mask(site, monkeypatch):
    """Each site's mask taken out in turn changes the output."""
    model, tokens = model_of(replace(LLAMA, hidden_dropout=0.3)), tokens_of()
    positions = torch.arange(tokens.shape[1])
    context = TokenContext(positions, stream=rng.DropoutStream.of(1, 1, torch.arange(2), positions))
    with torch.no_grad():
        whole = model(tokens, context)
        honest = rng.DropoutStream.keep
        monkeypatch.setattr(
            rng.DropoutStream,
            "keep",
            lambda self, shape, p, at: honest(self, shape, p, at) | (at == site),
        )
        assert not torch.equal(model(tokens, context), whole)
