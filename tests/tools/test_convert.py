"""convert_checkpoint: Hugging Face folders in and out with what belongs to them.

Also a checkpoint made smaller, and --load of a folder in training.
"""

import argparse
import json
import pickle
import re
import runpy
import shutil
import sys
from unittest import mock

import pytest
import torch
from interop.families import write_peer
from runs import NO_DROPOUT, ROOT, SMALL, TP, rows_of, tool, train
from safetensors.torch import load_file, save_file

from trivium.checkpoint.load import open_checkpoint
from trivium.checkpoint.manifest import CheckpointError
from trivium.checkpoint.shards import checksum
from trivium.config import ConfigError
from trivium.interop.pretrained import load_pretrained
from trivium.mesh import Axis

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
RUN = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 "
    "--mock-data --tokenizer-type NullTokenizer --num-workers 0"
)
RUN += " --device cpu --eval-iters 0 --log-interval 1"


def convert(source, target, load, save, *more):
    return tool(
        "convert_checkpoint",
        "--from",
        source,
        "--to",
        target,
        "--load",
        load,
        "--save",
        save,
        *more,
    )


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """A folder in bf16, with a tokenizer and a generation config."""
    folder = tmp_path_factory.mktemp("olmo") / "hf"
    write_peer("olmo2", folder, torch.bfloat16)
    (folder / "text.txt").write_text("number 1 comes before number 2. " * 50)
    assert (
        tool(
            "train_tokenizer",
            "--input",
            folder / "text.txt",
            "--vocab-size",
            60,
            "--type",
            "char",
            "--output",
            folder / "tok",
        ).returncode
        == 0
    )
    for path in (folder / "tok").iterdir():
        shutil.move(path, folder / path.name)
    shutil.rmtree(folder / "tok")
    (folder / "text.txt").unlink()
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 3, "eos_token_id": [4, 5], "temperature": 0.7})
    )
    return folder


def test_there_and_back_with_tokenizer_and_generation_config(olmo, tmp_path):
    result = convert("hf", "trivium", olmo, tmp_path / "run", "--verify")
    assert result.returncode == 0 and "largest difference of logits" in result.stdout, result.stderr
    checkpoint = open_checkpoint(tmp_path / "run", world=Axis("world"), device=CPU)
    assert checkpoint.iteration == 0 and {
        checkpoint.dtype(name) for name in checkpoint.names()
    } == {torch.bfloat16}
    result = convert("trivium", "hf", tmp_path / "run", tmp_path / "back", "--verify")
    assert result.returncode == 0, result.stderr
    before, after = (
        load_file(olmo / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype
        for key in before
    )
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
        olmo / "tokenizer.json"
    ).read_bytes()
    assert (
        json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.7
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"], config["torch_dtype"]) == (
        "olmo2",
        [4, 5],
        "bfloat16",
    )
    text = [
        tool(
            "generate", "--load", tmp_path / name, "--prompt", "number", "--max-new-tokens", 5
        ).stdout
        for name in ("run", "back")
    ]
    assert text[0] == text[1] and text[0].startswith("number")


def test_a_smaller_checkpoint_holds_the_same_weights(tmp_path):
    train(
        f"{SMALL}{NO_DROPOUT} --mock-data --eval-iters 0 --train-iters 2 --lr-warmup-iters 0 "
        f"--save {tmp_path}/run"
    )
    result = convert(
        "trivium", "trivium", tmp_path / "run", tmp_path / "small", "--dtype", "bf16", "--no-optim"
    )
    assert result.returncode == 0, result.stderr
    whole, small = (
        open_checkpoint(tmp_path / name, world=Axis("world"), device=CPU)
        for name in ("run", "small")
    )
    assert small.iteration == 2 and set(small.names()) == {
        name for name in whole.names() if not name.startswith("optim.")
    }
    assert all(torch.equal(small.read(name), whole.read(name).bfloat16()) for name in small.names())
    assert (
        convert(
            "trivium", "trivium", tmp_path / "run", tmp_path / "other", "--dtype", "bf16"
        ).returncode
        == 0
    )
    kept = open_checkpoint(tmp_path / "other", world=Axis("world"), device=CPU)
    moments = [name for name in whole.names() if name.startswith("optim.")]
    assert moments and all(torch.equal(kept.read(name), whole.read(name)) for name in moments)


def test_training_goes_on_from_a_folder_under_any_layout(tmp_path):
    """The same first losses on one process and on two that share the layers.

    What comes out is of the same family.
    """
    write_peer("gemma3", tmp_path / "hf")
    lines = f"{RUN} --hf-config {tmp_path}/hf --load {tmp_path}/hf --save-hf {tmp_path}/out"
    train(f"{lines} --save {tmp_path}/one")
    train(f"{lines} --save {tmp_path}/two {TP} 2 --sequence-parallel", 2)
    one, two = (
        [row["lm_loss"] for row in rows_of(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert peer.config.model_type == "gemma3_text"
    model = load_pretrained(tmp_path / "two", device=CPU, dtype=torch.float32).model
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        expected = peer(tokens).logits
        assert (model(tokens)[..., :97] - expected).abs().max() <= 1e-5 * max(
            1, expected.abs().max()
        )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            "--hf-config {} --num-layers 3 --load {}",
            "--num-layers 4 there, 3 here; give --hf-config /",
        ),
        ("--hf-config {} --load {} --load-mode transfer", "--load-mode transfer: "),
        ("--hf-config {} --load {} --ckpt-step 3", "--ckpt-step 3: "),
        ("--hf-config {} --window-size 4,4 --load {}", "--window-size 4,4 is not W,0"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_a_problem_of_the_configuration(more, expected, tmp_path):
    write_peer("qwen3", tmp_path / "hf")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        train(f"{RUN} {more.format(tmp_path / 'hf', tmp_path / 'hf')}")


def test_a_vocabulary_that_does_not_fit_names_the_flag(tmp_path):
    write_peer("qwen3", tmp_path / "hf")
    with pytest.raises(ValueError, match="give --vocab-size 97 in place of the tokenizer's 51"):
        train(f"{RUN} --hf-config {tmp_path}/hf --load {tmp_path}/hf --vocab-size 50")


def broken(folder, what: str) -> None:
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    if what == "a tensor too many":
        tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(2)
    elif what == "a tensor too few":
        del tensors["model.norm.weight"]
    elif what == "another shape":
        tensors["model.norm.weight"] = torch.zeros(5)
    elif what == "whole numbers":
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.uint16)
    else:
        config |= {
            "mixture": {"model_type": "mixtral"},
            "unknown": {"model_type": "bert"},
            "scaling": {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        }[what]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(config | ({"rope_parameters": None} if what == "scaling" else {}))
    )


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("a tensor too many", "holds model.layers.0.mlp.experts.0.up_proj.weight, which a llama"),
        ("a tensor too few", "has no tensor model.norm.weight"),
        ("another shape", "model.norm.weight is [5], config.json makes it [32]"),
        ("whole numbers", "model.norm.weight"),
        ("mixture", "mixture of experts, which is not available in this version"),
        ("unknown", "'bert' is none of llama, gpt2"),
        ("scaling", "rope_type 'dynamic' is none of"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_line(what, expected, tmp_path):
    write_peer("llama2", tmp_path / "hf")
    broken(tmp_path / "hf", what)
    result = convert("hf", "trivium", tmp_path / "hf", tmp_path / "run")
    assert (
        result.returncode == 1 and result.stderr.count("\n") <= 2 and expected in result.stderr
    ), result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("hf", "hf", ".", "x"), "nothing to convert"),
        (("hf", "trivium", "nowhere", "x"), "--load nowhere: no such folder"),
        (("trivium", "trivium", ".", "x", "--verify"), "--verify is for"),
        (("trivium", "hf", ".", "x", "--no-optim"), "--no-optim is for"),
        (("trivium", "hf", ".", "."), "is --load; name another folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, expected):
    result = convert(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and expected in result.stderr


def test_a_model_of_no_family_names_what_differs(tmp_path):
    flags = (
        f"{SMALL}{NO_DROPOUT} --squared-relu --disable-bias-linear --mock-data --eval-iters 0 "
        "--train-iters 1 --lr-warmup-iters 0"
    )
    train(f"{flags} --save {tmp_path}/run")
    result = convert("trivium", "hf", tmp_path / "run", tmp_path / "out")
    assert (
        result.returncode == 2
        and "nearest gpt2: --disable-bias-linear False there, True here" in result.stderr
    ), result.stderr
    result = convert(
        "trivium", "hf", tmp_path / "run", tmp_path / "out", "--hf-model-type", "olmo2"
    )
    assert (
        result.returncode == 2
        and "this family of Hugging Face's; nearest olmo2: activation 'relu2'" in result.stderr
    ), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class NanoModel(torch.nn.Module):
    """nanoGPT's model, as its model.py computes it (Karpathy 2022), with names of its own."""

    def __init__(self, args: dict):
        super().__init__()
        self.heads = args["n_head"]
        width, bias = args["n_embd"], args["bias"]
        blocks = [self.block(width, bias) for _ in range(args["n_layer"])]
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(args["vocab_size"], width),
                "wpe": torch.nn.Embedding(args["block_size"], width),
                "h": torch.nn.ModuleList(blocks),
                "ln_f": torch.nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = torch.nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    @staticmethod
    def block(width: int, bias: bool) -> torch.nn.ModuleDict:
        def linear(columns: int, rows: int) -> torch.nn.Linear:
            return torch.nn.Linear(columns, rows, bias=bias)

        attention = {"c_attn": linear(width, 3 * width), "c_proj": linear(width, width)}
        mlp = {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}
        return torch.nn.ModuleDict(
            {
                "ln_1": torch.nn.LayerNorm(width, bias=bias),
                "ln_2": torch.nn.LayerNorm(width, bias=bias),
                "attn": torch.nn.ModuleDict(attention),
                "mlp": torch.nn.ModuleDict(mlp),
            }
        )

    def forward(self, tokens):
        t = self.transformer
        x = t["wte"](tokens) + t["wpe"](torch.arange(tokens.shape[1]))
        for block in t["h"]:
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, -1)
            )
            mixed = (
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .flatten(2)
            )
            x = x + block["attn"]["c_proj"](mixed)
            x = x + block["mlp"]["c_proj"](
                torch.nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x)))
            )
        return self.lm_head(t["ln_f"](x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_computes_the_same_logits(bias, tmp_path):
    args = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 16,
        "bias": bias,
        "vocab_size": 50,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    peer = NanoModel(args)
    state = {f"_orig_mod.{name}": tensor for name, tensor in peer.state_dict().items()}
    saved = {
        "model": state,
        "model_args": args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.0),
        "config": {"dataset": "x"},
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    result = convert("nanogpt", "trivium", tmp_path, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    model = load_pretrained(tmp_path / "run", device=CPU, dtype=torch.float32).model
    tokens = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        expected = peer(tokens)
        assert (model(tokens)[..., :50] - expected).abs().max() <= 1e-5 * max(
            1, expected.abs().max()
        )


class Trap:
    def __reduce__(self):
        return print, ("code was run",)


def test_a_nanogpt_checkpoint_that_holds_code_is_refused(tmp_path, capfd):
    torch.save({"model": {}, "model_args": Trap()}, tmp_path / "ckpt.pt")
    result = convert("nanogpt", "trivium", tmp_path, tmp_path / "run")
    assert (
        result.returncode == 1
        and result.stderr.count("\n") == 1
        and "cannot be read as plain values" in result.stderr
    )
    assert "code was run" not in capfd.readouterr().out + result.stdout


@pytest.mark.parametrize("where", [".metadata", "common.pt"])
def test_a_megatron_checkpoint_that_holds_code_runs_nothing(where, tmp_path, capfd):
    """A class or function that a pickle names becomes an object that does nothing."""
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    for name in (".metadata", "common.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap() if name == where else {"args": None}))
    result = convert("megatron", "trivium", tmp_path, tmp_path / "run")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "code was run" not in capfd.readouterr().out + result.stdout


def test_a_megatron_checkpoint_in_another_format_says_what_to_do(tmp_path):
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    result = convert("megatron", "trivium", tmp_path, tmp_path / "run")
    assert result.returncode == 1 and "only --ckpt-format torch_dist can be read" in result.stderr


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_that_is_in_use_is_refused_and_left_alone(olmo, tmp_path):
    write_peer("llama2", tmp_path / "other")
    assert convert("hf", "trivium", olmo, tmp_path / "run").returncode == 0
    before = files(tmp_path / "run")
    result = convert("hf", "trivium", tmp_path / "other", tmp_path / "run")
    assert (
        result.returncode == 1
        and "holds iter_0000000 already; name another folder" in result.stderr
    )
    assert files(tmp_path / "run") == before
    result = convert(
        "trivium", "hf", tmp_path / "run", tmp_path / "other"
    )  # somebody's model, not an export of ours
    assert (
        result.returncode == 1
        and "model.safetensors, which no export of ours wrote" in result.stderr
    )
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("mine")
    assert convert("trivium", "hf", tmp_path / "run", tmp_path / "out").returncode == 1
    assert (tmp_path / "out.tmp" / "precious").read_text() == "mine"


def test_a_conversion_that_fails_leaves_nothing(olmo, tmp_path):
    shutil.copytree(olmo, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    assert (
        convert("hf", "trivium", tmp_path / "hf", tmp_path / "run").returncode == 2
        and not (tmp_path / "run").exists()
    )


def test_a_tokenizer_that_lies_in_the_folder_is_not_lost(olmo, tmp_path):
    """A folder named as ours would be may be anybody's."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("mine")
    result = convert("hf", "trivium", olmo, tmp_path / "run")
    assert result.returncode == 1 and "holds tokenizer already" in result.stderr
    assert files(tmp_path / "run") == {"tokenizer/tokenizer.json": b"mine"}


def test_every_tensor_keeps_its_own_dtype_and_verify_allows_for_rounding(tmp_path):
    write_peer("qwen2", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    mixed = {
        name: tensor if tensor.dim() == 1 else tensor.bfloat16() for name, tensor in tensors.items()
    }
    save_file(mixed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    for source, target, load, save in (
        ("hf", "trivium", "hf", "run"),
        ("trivium", "hf", "run", "back"),
    ):
        result = convert(source, target, tmp_path / load, tmp_path / save, "--verify")
        assert result.returncode == 0, result.stderr
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(
        back[name].dtype == mixed[name].dtype and torch.equal(back[name], mixed[name])
        for name in mixed
    )
    result = convert(
        "hf", "trivium", tmp_path / "hf", tmp_path / "half", "--dtype", "fp16", "--verify"
    )
    assert result.returncode == 0, result.stderr
    assert (
        convert("trivium", "hf", tmp_path / "half", tmp_path / "half_hf", "--verify").returncode
        == 0
    )
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "half_hf" / "model.safetensors").values()
    } == {torch.float16}


def test_verify_notices_one_wrong_row(olmo, tmp_path):
    """Two rows of one projection exchanged on the way."""
    assert convert("hf", "trivium", olmo, tmp_path / "run").returncode == 0
    shard = tmp_path / "run" / "iter_0000000" / "shard_00000.safetensors"
    tensors = load_file(shard)
    (key,) = (key for key in tensors if key.startswith("layers.1.mlp.down.weight"))
    tensors[key][[3, 4]] = tensors[key][[4, 3]]
    manifest = tmp_path / "run" / "iter_0000000" / "manifest.json"
    old, new = (checksum(tensor) for tensor in (load_file(shard)[key], tensors[key]))
    save_file(tensors, shard)
    manifest.write_text(manifest.read_text().replace(old, new))
    with pytest.raises(ValueError, match="differ by more than rounding"):
        verify(olmo, tmp_path / "run")


def verify(hf, ours) -> None:
    path = [str(ROOT / "tools"), *sys.path]
    with mock.patch.object(sys, "path", path):
        module = runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))
    module["_verify"](hf, ours, argparse.Namespace(source="trivium", ckpt_step=None))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--load {hf} --num-layers 4", "its shape is given by --hf-config"),
        (
            "--load {hf} --hf-config {hf} --save run --save-hf {hf}",
            "would replace what --load reads",
        ),
        (
            "--load {hf} --hf-config {hf} --save {hf}",
            "holds a config.json: it is a Hugging Face folder",
        ),
    ],
)
def test_training_that_would_lose_the_folder_or_has_no_shape_is_refused(more, expected, tmp_path):
    write_peer("qwen2", tmp_path / "hf")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        train(f"{RUN} --vocab-size 96 {more.format(hf=tmp_path / 'hf')}")


def test_weights_without_optimizer_state_say_how_to_be_loaded(olmo, tmp_path):
    assert convert("hf", "trivium", olmo, tmp_path / "run").returncode == 0
    line = f"{RUN} --hf-config {olmo} --load {tmp_path}/run --vocab-size 96"
    with pytest.raises(
        CheckpointError, match="holds no optimizer state; give --load-mode model_only"
    ):
        train(line)
    train(f"{line} --load-mode model_only --train-iters 1")
