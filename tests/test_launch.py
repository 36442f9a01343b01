"""Which process this is, under each launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SMALL, rows_of

from trivium import flags
from trivium.config import ConfigError, resolve
from trivium.launch import Place, choose_device, first_host, plan_mesh, read_environment, set_rendezvous

ROOT = Path(__file__).resolve().parents[1]
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "123456"}


def test_torchrun_srun_and_plain_python_are_told_apart():
    assert read_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    assert read_environment(SRUN) == Place(5, 16, 1)
    assert read_environment(SRUN | {"RANK": "0", "WORLD_SIZE": "2"}) == Place(0, 2, 0)  # torchrun inside of srun
    assert read_environment({}) == Place(0, 1, 0)


def test_a_batch_script_is_one_process_whatever_the_job_will_start():
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}) == Place(0, 1, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-010,17],login1", "gpu003"), ("a,b", "a"), ("node7", "node7"), ("n[1,5-6]-ib", "n1-ib"), ("rack-1-gpu[12]", "rack-1-gpu12")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_srun_gets_a_meeting_point_and_a_given_one_stays():
    env = dict(SRUN)
    set_rendezvous(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu003", str(20000 + 123456 % 20000))
    env = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    set_rendezvous(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "1")


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ("", {"dp": 16, "copies": 16}),
        ("--use-distributed-optimizer", {"dp": 16, "shards": 16}),
        ("--data-parallel-sharding-strategy optim_grads --num-distributed-optimizer-instances 4", {"dp": 16, "shards": 4, "copies": 4}),
        (
            "--tensor-model-parallel-size 4 --context-parallel-size 2 --use-distributed-optimizer --preset tiny",  # 2 key-value heads
            {"tp": 4, "cp": 2, "dp": 2, "shards": 4, "kv": 2},
        ),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --preset tiny", {"tp": 2, "pp": 4, "dp": 2, "copies": 2}),
    ],
)
def test_flags_become_the_axes_of_the_mesh(arguments, sizes):
    """Those that are not named have one rank."""
    config = resolve(flags.parse(f"--num-attention-heads 4 {arguments}".split()).config, 16)
    for rank in (0, 7, 15):
        mesh = plan_mesh(config, Place(rank, 16, 0))
        axes = ("tp", "cp", "dp", "pp", "ep", "shards", "copies", "kv")
        assert {name: getattr(mesh, name).size for name in axes} == dict.fromkeys(axes, 1) | sizes and mesh.rank == rank


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_an_error_with_a_remedy():
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"--device cuda, but .* use --device cpu"):
        choose_device("cuda", 0)


def test_a_reader_that_goes_away_does_not_end_the_program():
    command = f"{sys.executable} {ROOT}/pretrain_gpt.py --list-presets | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("tiny") and result.stderr == ""


def test_two_processes_with_sruns_variables_train_together(tmp_path):
    """As srun starts them, without torchrun: the variables are all there is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    arguments = f"{SMALL} --mock-data --eval-iters 0 --train-iters 3 --lr-warmup-iters 0 --metrics-jsonl {tmp_path}/m.jsonl".split()
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "pretrain_gpt.py", *arguments],
            env=os.environ | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [row["global_batch_size"] for row in rows_of(tmp_path / "m.jsonl")] == [8, 8, 8]
    assert outputs[0].count("training from iteration 0") == 1 and outputs[1] == ""
