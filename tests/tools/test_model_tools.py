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
    """A folder with text, a tokenizer, data, and a llama and a gpt2 run, the former exported."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(
        "\n".join(f"number {i} comes before number {i + 1}, and é after e." for i in range(300))
    )
    assert (
        tool(
            "train_tokenizer",
            "--input",
            folder / "text.txt",
            "--vocab-size",
            300,
            "--output",
            folder / "tokenizer",
        ).returncode
        == 0
    )
    tokenizer = (
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        folder / "tokenizer",
    )
    result = tool(
        "preprocess_data",
        "--input",
        folder / "text.txt",
        "--output-prefix",
        folder / "data",
        *tokenizer,
        "--append-eod",
        "--workers",
        1,
    )
    assert result.returncode == 0, result.stderr
    flags = SMALL.replace(
        "--tokenizer-type NullTokenizer --vocab-size 96", " ".join(map(str, tokenizer))
    )
    flags += f"{NO_DROPOUT} --data-path {folder}/data_text_document --split 100,0,0 --eval-iters 0 --train-iters 40 --lr 1e-2"
    train(f"{flags}{LLAMA} --save {folder}/llama --save-hf {folder}/hf")
    train(f"{flags} --max-position-embeddings 64 --save {folder}/gpt2")
    return folder


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
    for source in ("llama", "hf"):
        result = tool(
            "generate",
            "--load",
            trained / source,
            "--prompt",
            "number 17 comes before",
            "--max-new-tokens",
            12,
            "--temperature",
            0,
        )
        assert result.stdout == tokenizer.decode(greedy, skip_special_tokens=True) + "\n", (
            result.stderr
        )


def test_generation_repeats_with_its_seed_and_stops_at_the_models_end(trained):
    def text(*more) -> str:
        result = tool(
            "generate",
            "--load",
            trained / "gpt2",
            "--prompt",
            "number",
            "--max-new-tokens",
            500,
            "--top-k",
            20,
            "--top-p",
            0.9,
            *more,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)


def test_evaluate_sums_every_prediction_once(trained):
    """Against window after window by hand: all but the first token are predicted."""
    prefix = trained / "data_text_document"
    dataset = IndexedDataset(str(prefix))
    tokens = np.concatenate([dataset.get(i) for i in range(dataset.num_sequences)]).astype(np.int64)
    model = load_pretrained(trained / "llama", device=CPU, dtype=torch.float32).model
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 50):
            window = torch.from_numpy(tokens[start : start + 51])[None]
            logits = model(window[:, :-1])[..., : model.vocab_size]
            total += torch.nn.functional.cross_entropy(
                logits[0], window[0, 1:], reduction="sum"
            ).item()
            count += window.shape[1] - 1
    assert count == len(tokens) - 1 and count % 50 != 0
    results = []
    for source, data in (
        ("llama", ("--data-path", prefix)),
        ("hf", ("--data-path", prefix)),
        ("hf", ("--input", trained / "text.txt")),
    ):
        result = tool("evaluate", "--load", trained / source, *data, "--seq-length", 50, "--json")
        assert result.returncode == 0, result.stderr
        results.append(json.loads(result.stdout))
    for found in results:
        assert list(found) == ["lm_loss", "ppl", "tokens"] and found["tokens"] == count
        assert found["lm_loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["ppl"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("generate", "--load", "nowhere", "--prompt", "a"), 2, "--load nowhere: no such folder"),
        (
            ("generate", "--load", ".", "--prompt", "a", "--temperature", "-1"),
            2,
            "--temperature -1.0 must not be negative",
        ),
        (("evaluate", "--load", ".", "--data-path", "x"), 2, "--seq-length"),
        (
            ("evaluate", "--load", ROOT / "docs", "--data-path", "x", "--seq-length", 8),
            1,
            "holds no published checkpoint",
        ),
    ],
)
def test_bad_arguments_get_one_line(arguments, status, expected):
    result = tool(*arguments)
    assert (
        result.returncode == status and result.stderr.count("\n") == 1 and expected in result.stderr
    ), result.stderr


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_help_shows_an_example(name):
    assert f"python tools/{name}.py --load" in tool(name, "--help").stdout
