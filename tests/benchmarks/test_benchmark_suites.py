"""The benchmark measures what it says and writes what it prints."""

import argparse
import json

import benchmark
import pytest
import torch

import benchmarks.checkpoint as checkpoints
import benchmarks.generate as generation
from benchmarks import models, scaling, train
from benchmarks.candidate import parse_config
from trivium import ops

SMALL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32"
    " --max-position-embeddings 32 --vocab-size 511"
    " --micro-batch-size 4 --global-batch-size 4 --lr 1e-3"
)
SMALL_GPT = f"{models.GPT} {SMALL}"
SMALL_LLAMA = f"{models.LLAMA} {SMALL} --ffn-hidden-size 176"
CPU = torch.device("cpu")


def test_every_candidate_of_the_checkpoint_suite_saves_and_loads_the_same_state(
    tmp_path, monkeypatch
):
    """All do the same work: after each load every tensor is what it was before the saves."""
    monkeypatch.setattr(checkpoints, "MODEL", SMALL_LLAMA)
    work = tmp_path / "work"
    with checkpoints.one_rank(tmp_path):
        run = checkpoints.build_run()
        before = {name: tensor.clone() for name, tensor in run.tensors.items()}
        assert any(name.startswith("optim.") and tensor.any() for name, tensor in before.items())
        for save in checkpoints.saves(run, work).values():
            times = save()
            assert 0 < times.stall <= times.total
        for load in checkpoints.loads(run, work).values():
            for tensor in run.tensors.values():
                tensor.fill_(-1)
            load()
            assert all(torch.equal(run.tensors[name], tensor) for name, tensor in before.items())


def test_the_file_holds_what_is_printed(tmp_path, monkeypatch, capsys):
    peaks = {"fp32": 1e11, "bf16": 1e10}
    monkeypatch.setattr(train, "SHAPES", {"gpt": SMALL_GPT})
    monkeypatch.setattr(train, "shape_flags", lambda shape, device: SMALL_GPT)
    monkeypatch.setattr(train, "matrix_peaks", lambda device, seconds: dict(peaks))
    path = tmp_path / "results.json"
    benchmark.main(f"--suite train --rounds 1 --steps 2 --out {path}".split())
    out = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["machine"] and results["train"]["peaks"] == peaks
    model = "gpt: 2 layers, 64 wide, 4 heads, feed-forward 256, vocabulary 512"
    assert f"{model}, 4 sequences of 32 tokens" in out
    for name, row in results["train"]["gpt"].items():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert row["updates"] == 2 and row["agrees"] and len(row["losses"]) == 3
        words = line.split()
        assert f"{row['milliseconds']:.1f}" in words
        assert f"{row['tokens_per_second']:.0f}" in words
        assert f"{row['mfu_full']:.1%}" in words
        assert f"{row['losses'][-1]:.4f}" in words


@pytest.mark.parametrize(
    ("given", "expected"),
    [("train,checkpoint", ["train", "checkpoint"]), ("all", list(benchmark.SUITES))],
)
def test_suites_are_named_with_commas(given, expected):
    assert benchmark.suites(given) == expected


def test_an_unknown_suite_is_refused_with_the_names_there_are():
    message = "'trian' is no suite; choose from train, ops"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        benchmark.suites("train,trian")


def test_both_engines_generate_the_same_tokens(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(generation, "NEW", 8)
    config = parse_config(SMALL_LLAMA)
    engines, absent = generation.build_engines(config, CPU, torch.float32, with_peers=True)
    found = generation.compare(engines, torch.arange(12).view(2, 6), rounds=1)
    expected = ["Trivium", "transformers"]
    if ops.select_ops("auto", CPU, torch.float32).implementations["block_step"] == "native":
        expected.insert(1, "Trivium, op by op")
    assert not absent and list(found) == expected
    assert all(row["same_tokens"] and row["tokens_per_second"] > 0 for row in found.values())


def test_scaling_tells_the_ratio_and_what_memory_is_too_little_for(monkeypatch, capsys):
    options = argparse.Namespace(rounds=1, steps=1, peers=True)
    shapes = {"tiny": scaling.shape_flags(scaling.Size(1, 64, 4, 512), 2, 16)}
    found = scaling.compare("sizes", shapes, options)["tiny"]
    # one layer of 12 x 64^2, two norms and the last of 2 x 64, 512 words and 16 positions of 64
    assert found["parameters"] == 12 * 64**2 + 6 * 64 + (512 + 16) * 64
    for shape, peer in (("gpt", "PyTorch"), ("llama", "transformers")):
        pair = found[shape]
        assert pair["Trivium"]["deviation"] == 0
        if "left_out" not in pair[peer]:
            assert pair[peer]["deviation"] < 1e-5
            ours = pair["Trivium"]["tokens_per_second"]
            assert pair["trivium_is_faster"] == ours / pair[peer]["tokens_per_second"]
    monkeypatch.setattr(scaling, "missing_memory", lambda parameters, engines: 2e9)
    found = scaling.compare("sizes", shapes, options)["tiny"]
    assert found["left_out"] == "2.0 GB of memory too little"
    assert "tiny" in capsys.readouterr().out
