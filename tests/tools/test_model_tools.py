"""generate and evaluate on a checkpoint and on its export, and the export in transformers."""

import json
import math

import numpy as np
import pytest
import torch
from runs import LLAMA, NO_DROPOUT, ROOT, SMALL, tool, train

from trivium.data.indexed import IndexedDataset
from trivium.interop.pretrained import load_pretrained

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a folder with text, a tokenizer, data, a llama and a gpt2 run, the former exported."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [f"number {i} comes before number {i + 1}, and é after e." for i in range(300)]
    text = folder / "text.txt"
    text.write_text("\n".join(lines))
    tokenizer = folder / "tokenizer"
    run_tool("train_tokenizer", f"--input {text} --vocab-size 300 --output {tokenizer}")
    named = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
    prefix = folder / "data"
    run_tool(
        "preprocess_data",
        f"--input {text} --output-prefix {prefix} {named} --append-eod --workers 1",
    )
    flags = SMALL.replace("--tokenizer-type NullTokenizer --vocab-size 96", named)
    flags += f"{NO_DROPOUT} --data-path {prefix}_text_document --split 100,0,0 --eval-iters 0"
    flags += " --train-iters 40 --lr 1e-2"
    train(f"{flags}{LLAMA} --save {folder}/llama --save-hf {folder}/hf")
    train(f"{flags} --max-position-embeddings 64 --save {folder}/gpt2")
    return folder


def run_tool(name: str, arguments: str) -> str:
    """Run a tool that must succeed; return what it prints."""
    result = tool(name, *arguments.split())
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_export_equals_transformers_in_logits_and_text(trained):
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        trained / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    ids = tokenizer("number 17 comes before", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = peer(ids).logits
        for source in ("llama", "hf"):
            model = load_pretrained(trained / source, device=CPU, dtype=torch.float32).model
            found = model(ids)[..., : model.vocab_size]
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    greedy = peer.generate(ids, max_new_tokens=12, do_sample=False)[0]
    text = tokenizer.decode(greedy, skip_special_tokens=True)
    for source in ("llama", "hf"):
        how = ("--prompt", "number 17 comes before", "--max-new-tokens", 12, "--temperature", 0)
        result = tool("generate", "--load", trained / source, *how)
        assert result.stdout == text + "\n", result.stderr


def test_generation_repeats_with_its_seed_and_stops_at_the_models_end(trained):
    def text(seed: int) -> str:
        drawn = "--max-new-tokens 500 --top-k 20 --top-p 0.9"
        load = f"--load {trained / 'gpt2'}"
        return run_tool("generate", f"{load} --prompt number {drawn} --seed {seed}")

    assert text(1) == text(1) != text(2)


def test_evaluate_sums_every_prediction_once(trained):
    """Against window after window by hand: all but the first token are predicted."""
    prefix = trained / "data_text_document"
    dataset = IndexedDataset(str(prefix))
    documents = [dataset.get(i) for i in range(dataset.num_sequences)]
    tokens = np.concatenate(documents).astype(np.int64)
    total, count = loss_by_hand(trained / "llama", tokens, 50)
    assert count == len(tokens) - 1 and count % 50 != 0
    for source, data in (
        ("llama", f"--data-path {prefix}"),
        ("hf", f"--data-path {prefix}"),
        ("hf", f"--input {trained / 'text.txt'}"),
    ):
        how = f"--load {trained / source} {data} --seq-length 50 --json"
        found = json.loads(run_tool("evaluate", how))
        assert list(found) == ["lm_loss", "ppl", "tokens"] and found["tokens"] == count
        assert found["lm_loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["ppl"] == pytest.approx(math.exp(total / count), rel=1e-4)


def loss_by_hand(folder, tokens: np.ndarray, length: int) -> tuple[float, int]:
    """Return the sum of all losses and their number, one window after the other."""
    model = load_pretrained(folder, device=CPU, dtype=torch.float32).model
    total = 0.0
    count = 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            window = torch.from_numpy(tokens[start : start + length + 1])[None]
            logits = model(window[:, :-1])[0, :, : model.vocab_size]
            losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
            total += losses.sum().item()
            count += losses.numel()
    return total, count


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ("generate --load nowhere --prompt a", 2, "--load nowhere: no such folder"),
        (
            "generate --load . --prompt a --temperature -1",
            2,
            "--temperature -1.0 must not be negative",
        ),
        ("evaluate --load . --data-path x", 2, "--seq-length"),
        (
            f"evaluate --load {ROOT / 'docs'} --data-path x --seq-length 8",
            1,
            "holds no published checkpoint",
        ),
    ],
)
def test_bad_arguments_get_one_line(arguments, status, expected):
    result = tool(*arguments.split())
    assert result.returncode == status, result.stderr
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_help_shows_an_example(name):
    assert f"python tools/{name}.py --load" in tool(name, "--help").stdout
