"""Two network namespaces train as two nodes.

When the network between them fails, both end and say why.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import NO_DROPOUT, SMALL, rows_of, train

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/two_nodes.sh"
RUN = f"{SMALL} --mock-data --eval-iters 0 --log-interval 1"
# Seconds that a collective may take. Processes that start on a busy machine must find each other
# within it, too.
TIMEOUT = 15
CUT = f"{RUN} --train-iters 100000 --distributed-timeout-minutes {TIMEOUT / 60}"
# Seconds from the last message to the end of torchrun on a busy machine; about 3 on an idle one.
ENDING = 40
TP_PP = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
PATH = f"{os.environ.get('PATH')}:/usr/sbin:/sbin"


def obstacle() -> str | None:
    """Why this machine cannot be two nodes."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip", path=PATH):
        return "there is no ip command"
    name = f"trivium{os.getpid()}"
    # `ip netns delete` takes the cable's ends along with the namespace.
    make = (
        f"ip netns add {name} && ip link add cable netns {name} type veth peer name other netns "
        f"{name}"
    )
    result = subprocess.run(
        ["sh", "-c", f"{make}; made=$?; ip netns delete {name}; exit $made"],
        capture_output=True,
        text=True,
        env={"PATH": PATH},
    )
    return (
        f"no network namespace can be made here: {result.stderr.strip()}"
        if result.returncode
        else None
    )


OBSTACLE = obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))


@contextmanager
def two_nodes(arguments: str, processes: int, errors: Path) -> Iterator[subprocess.Popen]:
    """Start the script, its stdout in a pipe, its stderr in the file `errors`.

    At the end neither it nor a namespace is left.
    """
    environment = os.environ | {"PATH": PATH, "PROCESSES": str(processes)}
    with errors.open("w") as stderr:
        script = subprocess.Popen(
            [SCRIPT, *arguments.split()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield script
    finally:
        script.send_signal(signal.SIGTERM)
        script.communicate(timeout=60)
        left = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, env={"PATH": PATH}
        ).stdout
        assert f"trivium{script.pid}-" not in left


def losses(path: Path) -> list[float]:
    return [row["lm_loss"] for row in rows_of(path)]


LAYOUTS = [
    pytest.param(1, "--pipeline-model-parallel-size 2", id="pp2 across"),
    pytest.param(2, TP_PP, id="tp2 within, pp2 across", marks=pytest.mark.soak),
    pytest.param(
        2,
        "--tensor-model-parallel-size 2 --use-distributed-optimizer",
        id="tp2 within, dp2 across",
        marks=pytest.mark.soak,
    ),
]


@pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
def test_two_nodes_train_as_one_process(tmp_path, processes, layout):
    """Compare six fp32 losses of about 4.5.

    Sums in another order differ by some 2^-24 = 6e-8 of them, which six updates do not raise
    above 1e-5.
    """
    run = f"{RUN}{NO_DROPOUT} --train-iters 6"
    with two_nodes(
        f"{run} {layout} --metrics-jsonl {tmp_path}/two.jsonl", processes, tmp_path / "errors"
    ) as script:
        printed = script.communicate(timeout=200)[0]
        assert script.returncode == 0, printed + (tmp_path / "errors").read_text()
    train(f"{run} --metrics-jsonl {tmp_path}/one.jsonl")
    assert len(losses(tmp_path / "two.jsonl")) == 6
    assert losses(tmp_path / "two.jsonl") == pytest.approx(losses(tmp_path / "one.jsonl"), rel=1e-5)
    assert "node 1" not in printed, "rank 0, on the first node, is the one that reports"


def fail_network(script: subprocess.Popen, way: str) -> None:
    """Once iteration 3 is done, run the command that the script printed for `way`."""
    command = None
    for line in script.stdout:
        if line.startswith(f"{way}: "):
            command = line.partition(": ")[2]
        if re.search(r"iteration +3/", line):
            break
    assert command, f"the script told no way {way}, or ended early"
    subprocess.run(["sh", "-ec", command], check=True, env={"PATH": PATH})


FAILURES = [
    pytest.param("to lose what it carries", 1, "--pipeline-model-parallel-size 2", id="lost, pp2"),
    pytest.param("to cut the cable", 1, "", id="cut, dp2", marks=pytest.mark.soak),
    pytest.param("to lose what it carries", 2, TP_PP, id="lost, tp2 x pp2", marks=pytest.mark.soak),
    pytest.param("to cut the cable", 2, TP_PP, id="cut, tp2 x pp2", marks=pytest.mark.soak),
]
# Chance decides what a step was at when the network failed: a message between stages, or a sum
# at its end.
OPERATION = (
    r"(all-reduce|all-gather|reduce-scatter|send to rank \d|receive from rank \d) over [a-z_]+ "
    r"\(ranks \d(, \d)+\) failed: "
)


@pytest.mark.parametrize(("way", "processes", "layout"), FAILURES)
def test_without_a_network_both_nodes_end_in_time_and_name_the_operation(
    tmp_path, way, processes, layout
):
    with two_nodes(f"{CUT} {layout}", processes, tmp_path / "errors") as script:
        fail_network(script, way)
        start = time.monotonic()
        script.communicate(timeout=TIMEOUT + ENDING)
        assert time.monotonic() - start > TIMEOUT - 1
    errors = (tmp_path / "errors").read_text()
    assert script.returncode == 1
    for node in (0, 1):
        assert f"two_nodes.sh: node {node} ended with exit status 1" in errors
        told = re.findall(rf"^node {node} \| .*pretrain_gpt.py: rank (\d+): (.*)", errors, re.M)
        assert 1 <= len(told) <= processes, errors
        ranks = [int(rank) for rank, _ in told]
        assert len(set(ranks)) == len(ranks) and set(ranks) <= set(
            range(node * processes, (node + 1) * processes)
        )
        assert all(re.match(OPERATION, message) for _, message in told), told
        assert any(
            re.search(
                f"(waiting {TIMEOUT}000ms|timeout).*raise --distributed-timeout-minutes$", said
            )
            for _, said in told
        ), told
    assert str(ROOT / "core") not in errors, "torchrun's own report is no more than that"
