"""Hugging Face folders: transformers loads what is written, and slices of others' are read.

Nothing foreign is destroyed.
"""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trivium.checkpoint.manifest import CheckpointError
from trivium.interop.hf_folder import HFFolder, Outgoing, write_folder

TENSORS = {
    "model.embed.weight": torch.arange(60.0).view(10, 6),
    "model.q.weight": -torch.arange(36.0).view(6, 6).t(),
    "model.norm.weight": torch.ones(6),
    "steps": torch.tensor(7),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lazily(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> list[Outgoing]:
    """Floating-point tensors in `dtype`."""
    return [
        Outgoing(
            name,
            tuple(tensor.shape),
            dtype if tensor.is_floating_point() else tensor.dtype,
            lambda tensor=tensor: tensor,
        )
        for name, tensor in tensors.items()
    ]


def export(folder: Path, tensors=TENSORS, dtype: torch.dtype = torch.float32, **options) -> None:
    write_folder(folder, lazily(tensors, dtype), {"model_type": "llama"}, **options)


def test_a_small_model_is_one_file(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    export(tmp_path / "out", tokenizer_files=[tokenizer], generation_config={"eos_token_id": 1})
    assert names(tmp_path / "out") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "producer": "trivium"}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == TENSORS.keys() and all(
        torch.equal(stored[name], TENSORS[name]) for name in TENSORS
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert names(tmp_path) == ["out", "tokenizer.json"]


def test_a_large_model_is_numbered_shards_and_an_index(tmp_path):
    export(tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=130)
    files = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert names(tmp_path / "out") == ["config.json", *files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * (60 + 36 + 6) + 8
    assert index["weight_map"] == {
        "model.embed.weight": files[0],
        "model.q.weight": files[1],
        "model.norm.weight": files[1],
        "steps": files[1],
    }
    found = HFFolder(tmp_path / "out")
    assert found.names() == sorted(TENSORS)
    assert found.read("steps").dtype == torch.int64 and found.read("steps") == 7
    assert all(
        torch.equal(found.read(name), TENSORS[name].bfloat16())
        for name in TENSORS
        if name != "steps"
    )


def test_one_tensor_is_held_at_a_time(tmp_path):
    """Each is asked for when the one before it is in its file: its memory may be used again."""
    memory = torch.empty(100)

    def fill(i: int) -> torch.Tensor:
        return memory.fill_(i)

    tensors = [Outgoing(f"t{i}", (100,), torch.float32, lambda i=i: fill(i)) for i in range(6)]
    write_folder(tmp_path / "out", tensors, {}, max_shard_bytes=800)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert [HFFolder(tmp_path / "out").read(f"t{i}")[99].item() for i in range(6)] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="gave 8 bytes"):
        write_folder(
            tmp_path / "out", [Outgoing("a", (3,), torch.float32, lambda: torch.zeros(2))], {}
        )
    assert names(tmp_path) == []


def test_slices_are_read_and_outlive_the_file(tmp_path):
    export(tmp_path / "out")
    found = HFFolder(tmp_path / "out")
    assert found.shape("model.embed.weight") == (10, 6) and found.shape("steps") == ()
    part = found.read("model.embed.weight", ((2, 5), (1, 4)))
    (tmp_path / "out" / "model.safetensors").write_bytes(b"\0" * 1000)
    assert torch.equal(part, TENSORS["model.embed.weight"][2:5, 1:4])


@pytest.mark.parametrize(
    "box", [((0, 11), (0, 6)), ((0, 10),), ((-1, 2), (0, 6)), ((3, 2), (0, 6))], ids=str
)
def test_a_box_outside_is_refused(tmp_path, box):
    export(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"not inside model.embed.weight, which is \[10, 6\]"):
        HFFolder(tmp_path / "out").read("model.embed.weight", box)


def test_transformers_loads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = transformers.LlamaConfig(**shape, vocab_size=32, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tensors = dict(model.state_dict())
    write_folder(tmp_path / "out", lazily(tensors), config.to_dict(), max_shard_bytes=4000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors.items())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_what_transformers_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "out", max_shard_size="4KB")
    found = HFFolder(tmp_path / "out")
    state = model.state_dict()
    assert (
        found.config["n_embd"] == 16
        and "transformer.wte.weight" in found.names()
        and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    )
    assert all(torch.equal(found.read(name), state[name]) for name in found.names())


# --- folders that are already there ---


def test_a_former_export_is_replaced_whole(tmp_path):
    export(tmp_path / "out", max_shard_bytes=100)
    export(tmp_path / "out", {"only": torch.zeros(2)})
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"] and HFFolder(
        tmp_path / "out"
    ).names() == ["only"]
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_and_absent_parents_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    export(tmp_path / "a" / "b" / "c")
    assert (
        names(tmp_path / "empty")
        == names(tmp_path / "a" / "b" / "c")
        == ["config.json", "model.safetensors"]
    )


@pytest.mark.parametrize(
    "foreign",
    ["thesis.tex", "pytorch_model.bin", "iter_0000100/", ".git/", "modeling.py", "vocab.txt/"],
)
def test_a_folder_with_other_content_is_refused_and_left_alone(tmp_path, foreign):
    """A name that ends in / is a folder, even where a tokenizer has a file of that name."""
    export(tmp_path / "out")
    (tmp_path / "out" / foreign).mkdir() if foreign.endswith("/") else (
        tmp_path / "out" / foreign
    ).write_text("mine")
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()
    }
    with pytest.raises(CheckpointError, match=re.escape(foreign.rstrip("/"))):
        export(tmp_path / "out", {"only": torch.zeros(2)})
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()
    } == before
    assert names(tmp_path) == ["out"]


def test_weights_without_a_config_are_no_former_export(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        export(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file"):
        export(tmp_path / "out" / "model.safetensors")


def test_a_failed_export_leaves_the_former_one_and_no_rest(tmp_path):
    export(tmp_path / "out")

    def fail() -> torch.Tensor:
        raise RuntimeError("lost the source")

    with pytest.raises(RuntimeError, match="lost the source"):
        write_folder(
            tmp_path / "out",
            [
                Outgoing("a", (1,), torch.float32, lambda: torch.zeros(1)),
                Outgoing("b", (1,), torch.float32, fail),
            ],
            {},
        )
    with pytest.raises(CheckpointError, match="no_such_tokenizer"):
        export(tmp_path / "out", tokenizer_files=[tmp_path / "no_such_tokenizer.json"])
    assert names(tmp_path) == ["out"] and HFFolder(tmp_path / "out").names() == sorted(TENSORS)


def test_an_export_killed_between_or_after_its_renames_is_taken_up(tmp_path):
    export(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.replaced.tmp")
    (tmp_path / "out.tmp").mkdir()
    export(tmp_path / "out", {"only": torch.zeros(2)})
    assert names(tmp_path) == ["out"] and HFFolder(tmp_path / "out").names() == ["only"]
    (tmp_path / "out.replaced.tmp").mkdir()
    (tmp_path / "out.replaced.tmp" / "half").write_text("deleted")
    export(tmp_path / "out")
    assert names(tmp_path) == ["out"] and HFFolder(tmp_path / "out").names() == sorted(TENSORS)


# --- folders that cannot be read ---


def broken(tmp_path: Path, what: str) -> Path:
    folder = tmp_path / "out"
    export(folder, max_shard_bytes=100)
    first, index = (
        folder / "model-00001-of-00003.safetensors",
        folder / "model.safetensors.index.json",
    )
    tree = json.loads(index.read_text())
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no shard":
        first.unlink()
    elif what == "pickled shard":
        first.write_bytes(pickle.dumps({"model.embed.weight": [0.0] * 60}))
    elif what == "truncated shard":
        first.write_bytes(first.read_bytes()[:-1])
    elif what == "outside":
        index.write_text(json.dumps({"weight_map": {"model.embed.weight": "../" + first.name}}))
    elif what == "wrong index":
        index.write_text(json.dumps({"weight_map": tree["weight_map"] | {"steps": first.name}}))
    elif what == "no map":
        index.write_text("{}")
    elif what == "pickle only":
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no config", r"config\.json is missing"),
        ("no shard", r"model-00001-of-00003\.safetensors is missing"),
        ("pickled shard", r"model-00001-of-00003\.safetensors cannot be read"),
        ("truncated shard", r"model-00001-of-00003\.safetensors cannot be read"),
        ("outside", "plain file names"),
        ("wrong index", r"names steps in model-00001-of-00003\.safetensors"),
        ("no map", "weight_map"),
        ("pickle only", r"pytorch_model\.bin is a pickle"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(tmp_path, what, reason):
    with pytest.raises(CheckpointError, match=reason):
        HFFolder(broken(tmp_path, what))


def test_a_missing_tensor_is_named(tmp_path):
    export(tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no tensor lm_head"):
        HFFolder(tmp_path / "out").read("lm_head")
