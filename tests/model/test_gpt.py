"""The model against transformers, in one process: logits, loss, every gradient, the cache."""

from dataclasses import replace

import pytest
import torch

from trivium import rng
from trivium.config import ModelConfig
from trivium.decode.generate import Sampling, choose, generate
from trivium.interop import families
from trivium.interop.hf_names import hf_places
from trivium.model.gpt import GPT
from trivium.model.tokens import TokenContext
from trivium.ops import Ops

transformers = pytest.importorskip("transformers")

LLAMA = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, kv_channels=8, group_query_attention=True, num_query_groups=2,
    max_position_embeddings=16384, position_embedding_type="rope", normalization="RMSNorm", swiglu=True, disable_bias_linear=True,
    untie_embeddings_and_output_weights=True, attention_dropout=0.0, hidden_dropout=0.0, init_method_std=0.1,
)  # fmt: skip
GPT2 = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=192, num_attention_heads=6, kv_channels=8, max_position_embeddings=40,
    attention_dropout=0.0, hidden_dropout=0.0, init_method_std=0.1,
)  # fmt: skip
VOCAB = 101


def model_of(config: ModelConfig) -> GPT:
    return GPT(config, VOCAB, ops=Ops(), seed=3)


def tokens_of(batch: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def pieces_of(model: GPT, of=lambda p: p.data) -> dict[str, torch.Tensor]:
    return {
        piece.name: piece.tensor
        for p in model.parameters()
        for piece in p.param_layout.pieces(of(p))
    }


def llama_of(model: GPT, **options):
    """transformers' model with the same weights."""
    values = families.write_config(model.config, VOCAB, {})
    peer = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**values), **options)
    places = hf_places(model.config, VOCAB)
    peer.load_state_dict(
        {places[name].name: tensor for name, tensor in pieces_of(model).items()},
        strict=not model.config.tied,
    )
    return peer


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
    """fp32, two implementations of one function: rounding of sums over at most 96 terms, 1e-6 of the norm."""
    config = replace(LLAMA, **change)
    model = model_of(config)
    with torch.no_grad():
        for p in model.parameters():  # norms of one and biases of zero would hide a swap
            p[...] += (
                0.05
                * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                * (p != 0)
            )
    peer, places = llama_of(model, attn_implementation="eager"), hf_places(model.config, VOCAB)
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


@pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, replace(LLAMA, qk_layernorm=True, rotary_percent=0.5, rotary_interleaved=True)],
)
def test_cache_gives_the_logits_of_the_whole_sequence(config):
    model, tokens = model_of(config).eval(), tokens_of(length=20)
    with torch.no_grad():
        whole, caches = model(tokens), model.caches(2, 20)
        parts = [model(tokens[:, :7], caches=caches), model(tokens[:, 7:12], caches=caches)]
        parts += [model(tokens[:, i : i + 1], caches=caches) for i in range(12, 20)]
        last = model(tokens, last_only=True)
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert last.shape[1] == 1 and (last - whole[:, -1:]).abs().max() <= 1e-5 * whole.abs().max()


def test_initial_weights_have_the_spread_they_should():
    """Megatron's: init_method_std, and that over sqrt(2 layers) for what writes into the residual stream. 2,304 draws or more: 5 sigma is 7.4%."""
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
        return torch.bincount(choose(logits, sampling, generator), minlength=4) / 20_000

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
