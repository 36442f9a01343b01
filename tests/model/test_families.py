"""Every Hugging Face family: the same logits as transformers, the same weights back, bit for bit; what cannot be read is refused."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from model.families import CONFIGS, LENGTH, VOCAB, tokens_of, write_peer
from ranks import run_ranks
from runs import CP, PP, SP, TP
from safetensors.torch import load_file

from trivium import flags
from trivium.config import resolve
from trivium.mesh import Mesh
from trivium.model.gpt import GPT, Passage
from trivium.name_map import assemble, their_shapes
from trivium.ops import Ops
from trivium.parallel.context import local_tokens, token_positions
from trivium.train.build import build_stages
from trivium.train.export import export_weights
from trivium.train.hf_model import HFModel
from trivium.validate import validate


def loaded(source: HFModel) -> GPT:
    model = GPT(source.config, source.vocab_size, ops=Ops(), seed=None)
    source.read_into(piece for parameter in model.parameters() for piece in parameter.param_layout.pieces(parameter.data))
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_is_that_of_transformers(name, tmp_path):
    """Two implementations of one function in fp32: sums over up to 97 terms through four layers, 1e-5 of a gradient's norm, or of its share
    of the whole norm where the true gradient is nearly zero, as a key bias' is.
    """
    peer, tokens = write_peer(name, tmp_path), tokens_of()
    source = HFModel(tmp_path)
    model, labels = loaded(source), tokens.roll(-1, dims=1)
    model.token_losses(tokens, labels).mean().backward()
    torch.nn.functional.cross_entropy(peer(tokens).logits.flatten(0, 1), labels.flatten()).backward()
    ours = {part.name: part.within(p.grad) for p in model.parameters() for part in p.param_layout.parts}
    found = {their: assemble(their, source.places, ours.get) for their in their_shapes(source.places)}
    expected = {("embed_out.weight" if key == "lm_head.weight" and "neox" in name else key): p.grad for key, p in peer.named_parameters()}
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

    export_weights(source.config, source.vocab_size, source.read, tmp_path / "ours", torch.float32, [], {"eos_token_id": 2})
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    transformers = pytest.importorskip("transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(peer) and torch.equal(again(tokens_of()).logits, expected)


RUN = "--seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1 --tokenizer-type NullTokenizer --vocab-size 96 --mock-data"
LAYOUTS = {
    f"{TP} 2": (2, {"tp": 2}),
    f"{PP} 2": (2, {"pp": 2}),
    f"{TP} 2 {SP} {PP} 2": (4, {"tp": 2, "pp": 2}),
    f"{CP} 2": (2, {"cp": 2}),
    f"{CP} 2 --cp-comm-type allgather": (2, {"cp": 2}),
    f"{CP} 2 --cp-comm-type a2a": (2, {"cp": 2}),
}


def logits_on_rank(mesh: Mesh, folder, layout: str) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """What the last stage computes: its rank of tp, its columns of the logits, and the places of its tokens."""
    source, config = HFModel(folder), flags.parse(f"{RUN} {layout} --device cpu".split()).config
    config = resolve(replace(config, model=source.config), mesh.world_size)
    assert not validate(config, mesh.world_size)
    stages = build_stages(config, source.vocab_size, mesh, Ops(), torch.device("cpu"))
    source.read_into(piece for parameter in stages.parameters() for piece in parameter.param_layout.pieces(parameter.data))
    positions, found = token_positions(LENGTH, mesh.cp), []
    tokens, passage = local_tokens(tokens_of(), mesh.cp), Passage(positions, length=LENGTH)

    def stage(chunk: int, index: int, x: torch.Tensor | None) -> torch.Tensor:
        x = stages.chunks[chunk](tokens if x is None else x, passage)
        if stages.chunks[chunk].predicts:
            found.append(x)
            return x.sum()
        return x

    with torch.no_grad():
        stages.evaluate(stage)
    return (mesh.tp.rank, found[0], positions) if found else None


# Of `make test`: every family with its layers cut, and the three ways to cut a sequence under a window. `make parity`: everything.
CORE = {(name, layout) for name in CONFIGS if "-" not in name for layout in LAYOUTS if CP not in layout}
CORE |= {("gemma2", f"{CP} 2"), ("mistral", f"{CP} 2 --cp-comm-type allgather"), ("gemma3", f"{CP} 2 --cp-comm-type a2a")}
CASES = [pytest.param(*case, marks=() if case in CORE else pytest.mark.parity) for case in product(CONFIGS, LAYOUTS)]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_under_a_layout_are_those_of_transformers(name, layout, tmp_path):
    """Each rank reads only its slices of the folder."""
    with torch.no_grad():
        expected = write_peer(name, tmp_path)(tokens_of()).logits
    ranks, axes = LAYOUTS[layout]
    found = [result for result in run_ranks(ranks, logits_on_rank, tmp_path, layout, **axes) if result]
    logits = torch.full((2, LENGTH, max(rank for rank, *_ in found) + 1, found[0][1].shape[-1]), torch.nan)
    for rank, columns, positions in found:
        logits[:, positions, rank] = columns
    logits = logits.flatten(2)[..., :VOCAB]
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "phi3-longrope", "qwen3-yarn", "olmo2", "gpt_neox"])
@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(name, tmp_path):
    write_peer(name, tmp_path)
    model, tokens = loaded(HFModel(tmp_path)), tokens_of()
    whole, caches = model(tokens), model.caches(2, LENGTH)
    parts = [model(tokens[:, a:b], caches=caches) for a, b in ((0, 11), (11, 12), (12, 20), (20, LENGTH))]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5 * max(1.0, whole.abs().max())
