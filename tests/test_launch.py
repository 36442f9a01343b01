"""Which process this is, under each launcher."""

import os
import re
import subprocess
import sys

import pytest
import torch
from runs import ROOT, SMALL, free_port, rows_of, start_step

import pretrain_gpt
from trivium import launch, logs, ops
from trivium.config import ConfigError, flags, resolve
from trivium.launch import (
    Process,
    choose_device,
    first_host,
    missed_meeting,
    plan_mesh,
    read_environment,
    set_rendezvous,
    threads_of_a_process,
    untested_torch,
)
from trivium.train import run

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "123456",
}


def test_torchrun_srun_and_plain_python_are_told_apart():
    assert read_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Process(3, 8, 1)
    assert read_environment(SRUN) == Process(5, 16, 1)
    assert read_environment(SRUN | {"RANK": "0", "WORLD_SIZE": "2"}) == Process(
        0, 2, 0
    )  # torchrun inside of srun
    assert read_environment({}) == Process(0, 1, 0)


@pytest.mark.parametrize(
    ("env", "cores", "threads"),
    [
        ({}, 16, None),  # one process by hand: torch's own choice
        ({"OMP_NUM_THREADS": "4"}, 16, None),
        (
            {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"},
            16,
            8,
        ),  # torchrun's default
        ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "4"}, 16, None),
        ({"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, 2, 1),
        (
            {"LOCAL_WORLD_SIZE": "4"},
            10,
            2,
        ),  # another launcher, which leaves every process all cores
    ],
)
def test_processes_share_the_cores_of_their_machine(env, cores, threads):
    assert threads_of_a_process(env, cores) == threads


def test_a_batch_script_is_one_process_whatever_the_job_will_start():
    assert read_environment(
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}
    ) == Process(0, 1, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-010,17],login1", "gpu003"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("n[1,5-6]-ib", "n1-ib"),
        ("rack-1-gpu[12]", "rack-1-gpu12"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_srun_gets_a_meeting_point_and_a_given_one_stays():
    env = dict(SRUN)
    set_rendezvous(read_environment(env), env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu003", str(20000 + 123456 % 20000))
    env = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    set_rendezvous(read_environment(env), env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "1")


def test_several_processes_without_a_meeting_point_are_told_so():
    set_rendezvous(Process(), {})
    with pytest.raises(
        ConfigError, match="WORLD_SIZE is 2, but MASTER_PORT not set; start with torchrun"
    ):
        set_rendezvous(Process(0, 2), {"MASTER_ADDR": "localhost"})


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ("", {"dp": 16, "copies": 16}),
        ("--use-distributed-optimizer", {"dp": 16, "shards": 16}),
        (
            "--data-parallel-sharding-strategy optim_grads --num-distributed-optimizer-instances 4",
            {"dp": 16, "shards": 4, "copies": 4},
        ),
        (
            # 2 key-value heads
            "--tensor-model-parallel-size 4 --context-parallel-size 2 "
            "--use-distributed-optimizer --preset tiny",
            {"tp": 4, "cp": 2, "dp": 2, "shards": 4, "kv": 2},
        ),
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --preset tiny",
            {"tp": 2, "pp": 4, "dp": 2, "copies": 2},
        ),
    ],
)
def test_flags_become_the_axes_of_the_mesh(arguments, sizes):
    """Those that are not named have one rank."""
    config = resolve(flags.parse(f"--num-attention-heads 4 {arguments}".split()).config, 16)
    for rank in (0, 7, 15):
        mesh = plan_mesh(config, Process(rank, 16, 0))
        axes = ("tp", "cp", "dp", "pp", "ep", "shards", "copies", "kv")
        assert {name: getattr(mesh, name).size for name in axes} == dict.fromkeys(
            axes, 1
        ) | sizes and mesh.rank == rank


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_an_error_with_a_remedy():
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"--device cuda, but .* use --device cpu"):
        choose_device("cuda", 0)


def test_a_process_without_a_device_of_its_own_tells_it_itself(monkeypatch, capfd):
    """The first ranks have one: they cannot tell, and wait for this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert pretrain_gpt.cli(f"{SMALL} --mock-data --device auto".split()) == 2
    said = (
        "[rank 2] pretrain_gpt.py: "
        "--device auto: local rank 2 has no device of its own; start at most 2 processes on this "
        "node\n"
    )
    assert capfd.readouterr().err == said


def test_a_reader_that_goes_away_does_not_end_the_program():
    command = f"{sys.executable} {ROOT}/pretrain_gpt.py --list-presets | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.startswith("tiny") and result.stderr == ""


def test_two_processes_with_sruns_variables_train_together(tmp_path):
    arguments = (
        f"{SMALL} --mock-data --eval-iters 0 --train-iters 3 --lr-warmup-iters 0 "
        f"--metrics-jsonl {tmp_path}/m.jsonl"
    )
    ranks = start_step(arguments, stderr=subprocess.STDOUT)
    outputs = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [row["global_batch_size"] for row in rows_of(tmp_path / "m.jsonl")] == [8, 8, 8]
    assert outputs[0].count("training from iteration 0") == 1 and outputs[1] == ""


# --- what is refused, and when ---

IMPOSSIBLE = f"{SMALL} --mock-data --tensor-model-parallel-size 2 --global-batch-size 12".split()
REFUSAL = (
    "pretrain_gpt.py: 1 problem in the configuration\n"
    "  3 processes are not a multiple of --tensor-model-parallel-size 2 x "
    "--pipeline-model-parallel-size 1 x --context-parallel-size 1 = 2; "
    "start 2, 4, or change the sizes\n"
)


@pytest.fixture
def task_of_step(monkeypatch):
    """Makes this process one task of an srun step: call with its number and how many there are."""
    monkeypatch.delenv("RANK", raising=False)

    def become(task: int, tasks: int) -> None:
        step = {
            "SLURM_PROCID": task,
            "SLURM_LOCALID": task,
            "SLURM_STEP_NUM_TASKS": tasks,
            "SLURM_STEP_NODELIST": "localhost",
        }
        for name, value in step.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", free_port())

    return become


@pytest.mark.parametrize(("task", "said"), [(0, REFUSAL), (2, "")])
def test_an_impossible_number_of_tasks_is_refused_before_any_of_them_meets_another(
    task_of_step, monkeypatch, capfd, task, said
):
    """Each task alone: the others never come, and none is waited for. The first one tells."""
    task_of_step(task, 3)
    monkeypatch.setattr(launch, "LAST_TO_LEAVE", 0.0)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda *args, **kwargs: pytest.fail("a group was made"),
    )
    assert pretrain_gpt.cli(IMPOSSIBLE) == 2
    assert capfd.readouterr().err == said


def test_a_task_that_is_interrupted_while_the_first_one_tells_ends_quietly(
    task_of_step, monkeypatch, capfd
):
    task_of_step(2, 3)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.time, "sleep", interrupt)
    assert pretrain_gpt.cli(IMPOSSIBLE) == 2
    assert capfd.readouterr().err == ""


def test_torchrun_with_an_impossible_number_of_processes_ends_with_one_message():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        ROOT / "pretrain_gpt.py",
        *IMPOSSIBLE,
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (
        result.returncode != 0
        and result.stderr.count("not a multiple of") == 1
        and REFUSAL in result.stderr
    ), result.stderr
    assert "exitcode  : 2" in result.stderr, "torchrun's own report of rank 0"
    assert str(ROOT / "core") not in result.stderr


def test_a_task_that_waits_in_vain_for_the_others_says_where(task_of_step, capfd):
    task_of_step(0, 2)
    assert pretrain_gpt.cli(f"{SMALL} --mock-data --distributed-timeout-minutes 0.03".split()) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "pretrain_gpt.py: rank 0: the 2 processes did not all meet at "
        f"localhost:{os.environ['MASTER_PORT']}: Timed out after "
    )
    assert "1/2 clients joined; start all of them" in error and error.endswith(
        "raise --distributed-timeout-minutes"
    )


def test_other_errors_are_not_taken_for_a_missed_meeting():
    assert missed_meeting(RuntimeError("shape mismatch"), Process(0, 2)) is None
    assert missed_meeting(
        RuntimeError("Gloo connectFullMesh failed with Connect timeout"), Process(1, 2)
    ).startswith("rank 1: the 2 processes did not")


LEAVING = """
import atexit, sys, threading, time
atexit.register(print, "the loader ends its processes")
import torch.distributed as dist
from trivium.launch import Process, leave
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
threading.Thread(target=time.sleep, args=(600,)).start()
leave(3, Process(0, 2))
"""


def test_a_failed_process_leaves_at_once_and_tidily_whatever_its_threads_are_at(tmp_path):
    """The interpreter would wait for the thread, or abort.

    It stands for those of a transport with an operation under way.
    """
    command = [sys.executable, "-c", LEAVING, tmp_path / "store"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        3,
        "the loader ends its processes\n",
        "",
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0", "2.13.1+cpu", "built by hand"])
def test_a_tested_torch_is_not_mentioned(version):
    assert untested_torch(version) is None


@pytest.mark.parametrize("version", ["2.14.0", "2.14.0a0+git123", "3.0.1+cu130"])
def test_a_newer_torch_than_tested_is_named(version):
    warning = untested_torch(version)
    assert warning is not None
    assert version in warning and "newer than 2.13" in warning


def test_the_pinned_torch_is_the_newest_tested_one():
    pin = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert (int(pin[1]), int(pin[2])) == launch.TESTED_TORCH


@pytest.mark.parametrize(("rank", "times"), [(0, 1), (1, 0)])
def test_the_first_rank_alone_names_a_newer_torch(monkeypatch, capsys, rank, times):
    monkeypatch.setattr(launch, "TESTED_TORCH", (2, 9))
    config = resolve(flags.parse(f"{SMALL} --mock-data".split()).config, 1)
    logs.setup(rank)
    run.announce(config, Process(rank, 2, rank), (), ops.Ops(), torch.device("cpu"))
    assert capsys.readouterr().out.count("is newer than 2.9") == times
