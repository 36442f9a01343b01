"""A run as a Python call: `from trivium import Config, pretrain`."""

import subprocess
import sys

import pytest
from runs import ROOT, SMALL, exact, rows_of, train, write_data

import trivium
from trivium import Config, ConfigError, Process, Progress, pretrain

SMALL_RUN = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 20,
    "lr": 5e-3,
    "lr_warmup_iters": 3,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 96,
    "num_workers": 0,
    "device": "cpu",
    "make_vocab_size_divisible_by": 16,
    "log_interval": 5,
    "eval_iters": 0,
    "split": "100,0,0",
}


def test_a_call_is_the_run_of_the_command_line(tmp_path):
    data = str(write_data(tmp_path / "data"))
    train(
        f"{SMALL} --eval-iters 0 --split 100,0,0 --data-path {data} "
        f"--metrics-jsonl {tmp_path}/command.jsonl"
    )
    call = {"data_path": (data,), "metrics_jsonl": f"{tmp_path}/call.jsonl"}
    progress = pretrain(Config.of(SMALL_RUN | call), Process())
    assert progress == Progress(20, 20 * 8, 20 * 8 * 32)
    command = rows_of(tmp_path / "command.jsonl")
    assert exact(rows_of(tmp_path / "call.jsonl")) == exact(command)


def test_a_wrong_configuration_is_an_error_with_all_problems():
    with pytest.raises(ConfigError) as error:
        pretrain(Config.of(SMALL_RUN | {"lr": None, "micro_batch_size": 3, "mock_data": True}))
    problems = "\n".join(error.value.problems)
    assert "--lr is missing" in problems and "--micro-batch-size 3" in problems


def test_every_name_of_the_api_is_there():
    for name in trivium.__all__:
        assert getattr(trivium, name).__name__ == name
        assert name in dir(trivium)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = trivium.pretrian


@pytest.mark.parametrize("statement", ["import trivium", "from trivium import Config, ConfigError"])
def test_it_loads_no_torch_before_a_run(statement):
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
