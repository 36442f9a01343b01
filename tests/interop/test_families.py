"""Every Hugging Face family: the logits of transformers, and the same weights back, bit for bit.

What cannot be read is refused.
"""

import json
import re
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import pairwise, product

import pytest
import torch
from interop.families import CONFIGS, LENGTH, VOCAB, tokens_of, write_peer
from runs import CP, PP, SP, TP
from safetensors.torch import load_file, save_file

from trivium.checkpoint.manifest import CheckpointError
from trivium.config import ModelConfig, flags, resolve
from trivium.config.validate import validate
from trivium.decode.generate import Decoder, generate
from trivium.decode.sampling import Sampling
from trivium.interop.export import Beside, export_weights
from trivium.interop.families import differences, export_problems
from trivium.interop.hf_model import HFModel
from trivium.interop.name_map import assemble, their_shapes
from trivium.mesh import Mesh
from trivium.model.gpt import GPT
from trivium.model.tokens import TokenContext
from trivium.ops import Ops, cpu
from trivium.parallel.context import local_tokens, token_positions
from trivium.testing import run_ranks
from trivium.train.build import build_passes
from trivium.train.schedule import BatchSchedule


def loaded(source: HFModel, kernels: str = "torch") -> GPT:
    model = GPT(source.config, source.vocab_size, ops=Ops(kernels), seed=None)
    source.read_into(
        piece
        for parameter in model.parameters()
        for piece in parameter.param_layout.pieces(parameter.data)
    )
    return model.eval()


BASIC = [name for name in CONFIGS if "-" not in name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in BASIC else pytest.mark.parity) for name in CONFIGS],
)
def test_every_gradient_is_that_of_transformers(name, tmp_path):
    """Two implementations of one function in fp32: sums over up to 97 terms through four layers.

    So 1e-5 of a gradient's norm, or of its share of the whole norm where the true gradient is
    nearly zero, as a key bias' is.
    """
    peer, tokens = write_peer(name, tmp_path), tokens_of()
    source = HFModel(tmp_path)
    model, labels = loaded(source), tokens.roll(-1, dims=1)
    model(tokens, targets=(labels, torch.full(labels.shape, 1 / labels.numel())))[0].backward()
    torch.nn.functional.cross_entropy(
        peer(tokens).logits.flatten(0, 1), labels.flatten()
    ).backward()
    ours = {
        part.name: part.within(p.grad) for p in model.parameters() for part in p.param_layout.parts
    }
    found = {
        their: assemble(their, source.correspondences, ours.get)
        for their in their_shapes(source.correspondences)
    }
    expected = {
        ("embed_out.weight" if key == "lm_head.weight" and "neox" in name else key): p.grad
        for key, p in peer.named_parameters()
    }
    assert found.keys() == expected.keys()
    total = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    count = sum(gradient.numel() for gradient in expected.values())
    for key, gradient in expected.items():
        limit = 1e-5 * max(gradient.norm(), total * (gradient.numel() / count) ** 0.5)
        assert (found[key] - gradient).norm() <= limit, key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_transformers_and_weights_go_back_bit_for_bit(name, tmp_path):
    peer = write_peer(name, tmp_path / "theirs")
    source = HFModel(tmp_path / "theirs")
    logits, expected = loaded(source)(tokens_of())[..., :VOCAB], peer(tokens_of()).logits
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())

    export_weights(
        source.config,
        source.vocab_size,
        source.read,
        tmp_path / "ours",
        source.dtype,
        Beside([], {"eos_token_id": 2}),
    )
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    transformers = pytest.importorskip("transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(again) is type(peer) and torch.equal(again(tokens_of()).logits, expected)


RUN = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1 "
    "--tokenizer-type NullTokenizer --vocab-size 96 --mock-data"
)
LAYOUTS = {
    f"{TP} 2": (2, {"tp": 2}),
    f"{PP} 2": (2, {"pp": 2}),
    f"{TP} 2 {SP} {PP} 2": (4, {"tp": 2, "pp": 2}),
    f"{CP} 2": (2, {"cp": 2}),
    f"{CP} 2 --cp-comm-type allgather": (2, {"cp": 2}),
    f"{CP} 2 --cp-comm-type a2a": (2, {"cp": 2}),
}


def logits_on_rank(
    mesh: Mesh, folder, layout: str
) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """Return the tp rank of a last stage, its columns of the logits, and where its tokens are."""
    source, config = HFModel(folder), flags.parse(f"{RUN} {layout} --device cpu".split()).config
    config = resolve(replace(config, model=source.config), mesh.world_size)
    assert not validate(config, mesh.world_size)
    cpu, eod = torch.device("cpu"), source.vocab_size - 1
    passes = build_passes(config, source.vocab_size, mesh, Ops(), cpu, eod)
    source.read_into(
        piece
        for parameter in passes.parameters()
        for piece in parameter.param_layout.pieces(parameter.data)
    )
    positions, found = token_positions(LENGTH, mesh.cp), []
    tokens, context = local_tokens(tokens_of(), mesh.cp), TokenContext(positions, length=LENGTH)

    def stage(chunk: int, index: int, x: torch.Tensor | None) -> torch.Tensor:
        x = passes.chunks[chunk](tokens if x is None else x, context)
        if passes.chunks[chunk].predicts:
            found.append(x)
            return x.sum()
        return x

    one_batch = BatchSchedule(config.batch, mesh.dp.size).evaluation
    with torch.no_grad():
        for chunk in passes.chunks:
            chunk.eval()
        passes.runner(one_batch, forward_only=True).run(stage)
    return (mesh.tp.rank, found[0], positions) if found else None


# In `make test`: every family with its layers cut both ways, and the three ways to cut a sequence
# under a window. In `make parity`: everything.
CORE = {(name, f"{TP} 2 {SP} {PP} 2") for name in BASIC} | {
    (name, f"{cut} 2") for name in ("gpt2", "olmo2", "gemma3") for cut in (TP, PP)
}
CORE |= {
    ("gemma2", f"{CP} 2"),
    ("mistral", f"{CP} 2 --cp-comm-type allgather"),
    ("gemma3", f"{CP} 2 --cp-comm-type a2a"),
}
CASES = [
    pytest.param(*case, marks=() if case in CORE else pytest.mark.parity)
    for case in product(CONFIGS, LAYOUTS)
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_under_a_layout_are_those_of_transformers(name, layout, tmp_path):
    """Each rank reads only its slices of the folder."""
    with torch.no_grad():
        expected = write_peer(name, tmp_path)(tokens_of()).logits
    ranks, axes = LAYOUTS[layout]
    found = [
        result for result in run_ranks(ranks, logits_on_rank, tmp_path, layout, **axes) if result
    ]
    logits = torch.full(
        (2, LENGTH, max(rank for rank, *_ in found) + 1, found[0][1].shape[-1]), torch.nan
    )
    for rank, columns, positions in found:
        logits[:, positions, rank] = columns
    logits = logits.flatten(2)[..., :VOCAB]
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize(
    "kernels",
    [
        "torch",
        pytest.param("native", marks=pytest.mark.skipif(not cpu.AVAILABLE, reason="no compiler")),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "gemma2",
        "gemma3",
        "mistral",
        "phi3-longrope",
        "qwen2",
        "qwen3-yarn",
        "olmo2",
        "gpt_neox",
    ],
)
@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(name, kernels, tmp_path):
    """Several tokens at a time and single ones, for which native has one call a block.

    Gemma's blocks have no such call.
    """
    write_peer(name, tmp_path)
    model, tokens = loaded(HFModel(tmp_path), kernels), tokens_of()
    whole, decoder = model(tokens), Decoder(model, 2, LENGTH)
    in_one_call = kernels == "native" and "gemma" not in name
    assert all((step is not None) == in_one_call for step in decoder.cache.steps)
    ends = [0, 11, 12, 13, 20, *range(21, LENGTH + 1)]
    parts = [decoder.logits(tokens[:, a:b], predicted=None) for a, b in pairwise(ends)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5 * max(1.0, whole.abs().max())


def written(folder, name: str, change: dict | None = None, drop: tuple[str, ...] = ()) -> HFModel:
    """The folder of a family with keys of its config.json changed or left out."""
    write_peer(name, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | (change or {})
    (folder / "config.json").write_text(json.dumps(config))
    return HFModel(folder)


def reloaded(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("name", "change", "drop"),
    [
        ("llama2", {}, ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")),
        ("qwen3", {}, ("rms_norm_eps", "rope_parameters", "layer_types")),
        (
            "gemma2",
            {},
            (
                "rms_norm_eps",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "layer_types",
                "tie_word_embeddings",
            ),
        ),
        ("mistral", {}, ("rms_norm_eps",)),
        (
            "llama2",
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            (),
        ),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ()),
        (
            "phi3-longrope",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0, 3.0],
                    "long_factor": [2.0, 5.0],
                }
            },
            ("rope_parameters",),
        ),
    ],
)
@torch.no_grad()
def test_what_config_json_leaves_out_or_says_twice_means_what_transformers_makes_of_it(
    name, change, drop, tmp_path
):
    source, peer = written(tmp_path, name, change, drop), reloaded(tmp_path)
    expected = peer(tokens_of()).logits
    assert (loaded(source)(tokens_of())[..., :VOCAB] - expected).abs().max() <= 1e-5 * max(
        1.0, expected.abs().max()
    )


def test_a_missing_window_is_the_familys(tmp_path):
    assert written(tmp_path, "mistral", drop=("sliding_window",)).config.window(0) == 4096


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("gemma3", {"attn_logit_softcapping": 5.0}, "gemma3_text leaves it out"),
        ("gemma2", {"query_pre_attn_scalar": 204.08}, "of a whole number"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type 'linear' is none of default, longrope",
        ),
        ("llama2", {"num_hidden_layers": "4"}, "num_layers is '4'"),
        ("llama2", {"hidden_size": -32}, "--hidden-size -32 must be above 0"),
        ("llama2", {"rms_norm_eps": "x"}, "norm_epsilon is 'x'"),
        (
            "llama2",
            {"rope_theta": -1.0, "rope_parameters": None},
            "--rotary-base -1.0 must be above 0",
        ),
        ("llama2", {"vocab_size": None}, "vocab_size is None"),
        ("llama2", {"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' without factor"),
        (
            "llama2",
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5},
            },
            "rotates whole heads",
        ),
    ],
)
def test_a_config_json_that_means_something_else_is_refused(name, change, expected, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        written(tmp_path, name, change)


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    write_peer("llama3.2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for head, fits in (
        (tensors["model.embed_tokens.weight"].clone(), True),
        (torch.zeros(VOCAB, 32), False),
    ):
        save_file(
            tensors | {"lm_head.weight": head},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        with (
            nullcontext()
            if fits
            else pytest.raises(CheckpointError, match="tie_word_embeddings, but lm_head")
        ):
            HFModel(tmp_path)


FLAGS = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 32 "
)
FLAGS += (
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--max-position-embeddings 64 --init-method-std 0.2 "
)
GEMMA = "--geglu --apply-layernorm-1p --norm-placement both --scale-embeddings "


@pytest.mark.parametrize(
    ("line", "family"),
    [
        ("--swiglu --untie-embeddings-and-output-weights", "llama"),
        (GEMMA, "gemma2"),
        (GEMMA + "--qk-layernorm", "gemma3_text"),
        (GEMMA + "--softmax-scale 0.07", None),
        (GEMMA + "--qk-layernorm --window-size 4,0 --attn-logit-softcapping 5", None),
        ("--swiglu --rotary-percent 0.5 --use-rope-scaling", None),
        ("--swiglu --rotary-percent 0.5", "phi3"),
    ],
)
@torch.no_grad()
def test_what_is_exported_transformers_loads_and_computes_alike(line, family, tmp_path):
    """Or it is refused: never a folder that means something else there."""
    config = resolve(flags.parse((FLAGS + line).split()).config, 1).model
    if family is None:
        assert export_problems(config)
        return
    model = GPT(config, VOCAB, ops=Ops(), seed=1).eval()
    parts = {
        part.name: part.within(p.data) for p in model.parameters() for part in p.param_layout.parts
    }
    beside = Beside([], {"eos_token_id": 2})
    export_weights(config, VOCAB, parts.get, tmp_path, lambda name: torch.float32, beside)
    peer = reloaded(tmp_path)
    expected = peer(tokens_of()).logits
    assert peer.config.model_type == family
    assert (model(tokens_of())[..., :VOCAB] - expected).abs().max() <= 1e-5 * max(
        1.0, expected.abs().max()
    )


def test_generation_past_the_original_length_equals_transformers(tmp_path):
    """Keys so far are computed again at the length at which longrope changes its frequencies."""
    peer = write_peer("phi3-longrope-beyond", tmp_path)
    prompt = tokens_of(10)[:1]
    ours = list(
        generate(loaded(HFModel(tmp_path)), prompt, 16, Sampling(temperature=0), torch.Generator())
    )
    peer.generation_config.eos_token_id = None
    theirs = peer.generate(prompt, max_new_tokens=16, do_sample=False)[0, 10:]
    assert torch.cat(ours).tolist() == theirs.tolist()


# A model in which each field means something, and for each field a value that means something else.
COMPARED = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    kv_channels=8,
    group_query_attention=True,
    num_query_groups=2,
    max_position_embeddings=64,
    position_embedding_type="rope",
    use_rope_scaling=True,
    normalization="RMSNorm",
    disable_bias_linear=True,
    qk_layernorm=True,
    window_size="4,0",
)
ANOTHER = {
    "position_embedding_type": "none",
    "rope_scaling": None,  # --use-rope-scaling excludes it
    "rotary_base_local": 500.0,
    "normalization": "LayerNorm",
    "norm_placement": "post",
    "qk_layernorm_width": "projection",
    "softmax_scale": 0.5,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "window_size": "5,0",
    "window_attn_skip_freq": "2",
}
NO_PART = {
    "init_method_std",
    "attention_dropout",
    "hidden_dropout",
    "make_vocab_size_divisible_by",
    "hf_model_type",
}


@pytest.mark.parametrize("name", [item.name for item in fields(ModelConfig)])
def test_a_field_of_the_model_makes_another_model(name):
    """A new field does so without an edit, so that no family exports a model that uses it."""
    value = getattr(COMPARED, name)
    if name in ANOTHER:
        other = ANOTHER[name]
    elif isinstance(value, bool):
        other = not value
    else:
        other = "llama" if value is None else 2 * value
    flag = "--" + name.replace("_", "-")
    told = differences(COMPARED, replace(COMPARED, **{name: other}))
    expected = name not in NO_PART and name != "rope_scaling"
    assert any(flag in line for line in told) == expected
