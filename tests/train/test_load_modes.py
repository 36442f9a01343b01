"""Each --load-mode takes over what its row in the table says, and nothing else.

Its state is compared with that of the run that wrote the checkpoint, and of one that begins.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import LLAMA, NO_DROPOUT, SMALL, exact, rows_of, train, write_data

import pretrain_gpt
from trivium.checkpoint.manifest import CheckpointError
from trivium.config import ConfigError, flags, resolve
from trivium.launch import Process
from trivium.logs import get_logger
from trivium.optim.schedule import learning_rate
from trivium.train import loop, run
from trivium.train.load_modes import MODES
from trivium.train.resume import RunState
from trivium.train.schedule import Progress

RUN = (
    f"{SMALL}{LLAMA}{NO_DROPOUT} --eval-interval 4 --eval-iters 1 --split 80,20,0 --fp16 "
    "--initial-loss-scale 65536 --loss-scale-window 5"
)
SAVED = 8


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> str:
    return f"{RUN} --data-path {write_data(tmp_path_factory.mktemp('data') / 'small')}"


@pytest.fixture(scope="module")
def saved(arguments, tmp_path_factory) -> Path:
    """A run of 20 iterations, saved after 4, 8, ... of them."""
    folder = tmp_path_factory.mktemp("saved")
    train(f"{arguments} --save {folder} --save-interval 4")
    return folder


@dataclass
class Begun:
    """A run as it is before its first step."""

    progress: Progress
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    steps: int
    loss_scale: dict
    log: list[str]


def begin(arguments: str, monkeypatch) -> Begun:
    """pretrain_gpt.py's own main up to the loop."""
    seen: list[Begun] = []

    def look(trainer, data, state: RunState, reporter, progress: Progress) -> Progress:
        optimizer = trainer.optimizer
        tensors = [
            {piece.name: piece.tensor.clone() for piece in pieces()}
            for pieces in (optimizer.weight_pieces, optimizer.moment_pieces)
        ]
        rounded = [bucket.own_weights.float() - bucket.masters for bucket in optimizer.buckets]
        assert all(difference.abs().max() < 1e-2 for difference in rounded), (
            "the working weights are those of the masters"
        )
        seen.append(
            Begun(progress, *tensors, optimizer.steps.item(), trainer.scaler.state(), lines)
        )
        return progress

    lines: list[str] = []
    honest = get_logger().info
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run", look)
        patch.setattr(get_logger(), "info", lambda line: (lines.append(line), honest(line)))
        pretrain_gpt.main(arguments.split(), Process())
    return seen[0]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


TABLE = {  # weights, moments and loss scale, iteration, data
    "continue": (True, True, True, True),
    "model_only": (True, False, False, False),
    "model_data": (True, False, False, True),
    "model_opt_data": (True, True, False, True),
    "optimizer_only": (False, True, False, False),
    "transfer": (True, True, False, False),
    "transfer_with_lr": (True, True, True, False),
    "cooldown --cooldown-iters 3": (True, True, True, True),
    "continue --no-load-optim": (True, False, True, True),
    "transfer --no-load-optim": (True, False, False, False),
    "--finetune": (True, False, False, False),
}


@pytest.mark.parametrize(("mode", "expected"), TABLE.items(), ids=TABLE)
def test_a_mode_restores_what_the_table_says_and_nothing_else(
    arguments, saved, monkeypatch, mode, expected
):
    asked = mode if mode.startswith("--") else f"--load-mode {mode}"
    fresh = begin(arguments, monkeypatch)
    whole = begin(f"{arguments} --load {saved} --ckpt-step {SAVED}", monkeypatch)
    found = begin(f"{arguments} --load {saved} --ckpt-step {SAVED} {asked}", monkeypatch)
    assert (
        not same(fresh.weights, whole.weights)
        and not same(fresh.moments, whole.moments)
        and fresh.loss_scale != whole.loss_scale
    )
    weights, moments, schedule, data = (whole if restored else fresh for restored in expected)
    assert same(found.weights, weights.weights) and same(found.moments, moments.moments)
    assert (found.steps, found.loss_scale) == (moments.steps, moments.loss_scale)
    assert (
        whole.progress == Progress(SAVED, SAVED * 8, SAVED * 8 * 32)
        and fresh.progress == Progress()
    )
    assert found.progress == Progress(
        schedule.progress.iteration, data.progress.consumed_samples, data.progress.consumed_tokens
    )
    told = [
        line.split()[-1]
        for line in found.log
        if line.startswith("   ") and line.endswith((" restored", " fresh"))
    ]
    words = {True: "restored", False: "fresh"}
    assert told == [words[expected[i]] for i in (0, 1, 1, 2, 3)]


def test_every_mode_of_the_flag_is_in_the_table():
    (modes,) = (
        f.metadata["choices"]
        for f in flags.fields(type(resolve(flags.parse([]).config, 1).checkpoint))
        if f.name == "load_mode"
    )
    assert (
        set(modes) == set(MODES) == {mode.split()[0] for mode in TABLE if not mode.startswith("--")}
    )


def test_a_run_goes_on_in_the_modes_that_keep_the_place(arguments, saved, tmp_path):
    """transfer_with_lr: the schedule goes on at iteration 9, the samples start again."""
    train(
        f"{arguments} --load {saved} --ckpt-step {SAVED} --load-mode transfer_with_lr "
        f"--save {tmp_path}"
    )
    whole, found = (rows_of(folder / "metrics.jsonl") for folder in (saved, tmp_path))
    assert [(row["iteration"], row["learning_rate"]) for row in found] == [
        (row["iteration"], row["learning_rate"]) for row in whole[SAVED:]
    ]
    assert [row["consumed_samples"] for row in found] == [
        row["consumed_samples"] for row in whole[: 20 - SAVED]
    ]


# --- cooldown ---


def test_a_cooldown_goes_from_the_saved_rate_to_the_lowest_on_the_same_data(
    arguments, saved, tmp_path
):
    """Its first update is that of the run that goes on.

    Fewer iterations need fewer epochs of the data, and yet the order stays.
    """
    cooldown = (
        f"--load {saved} --ckpt-step {SAVED} --load-mode cooldown --cooldown-iters 4 "
        "--min-lr 1e-4 --lr-wsd-decay-style linear"
    )
    train(f"{arguments} {cooldown} --save {tmp_path}")
    whole, found = (rows_of(folder / "metrics.jsonl") for folder in (saved, tmp_path))
    assert [row["iteration"] for row in found] == [9, 10, 11, 12]
    assert exact(found[:1]) == exact(whole[SAVED : SAVED + 1])
    rate = whole[SAVED]["learning_rate"]
    assert [row["learning_rate"] for row in found] == pytest.approx(
        [rate - (rate - 1e-4) * i / 4 for i in range(4)]
    )


def test_a_cooldown_that_was_stopped_goes_on_with_the_configuration_saved_beside_it(
    arguments, saved, tmp_path
):
    cooldown = (
        f"{arguments} --load {saved} --ckpt-step {SAVED} --load-mode cooldown --cooldown-iters 6"
    )
    train(f"{cooldown} --save {tmp_path}/whole")
    train(f"{cooldown} --save {tmp_path}/parts --exit-interval 11")
    train(
        f"--config {tmp_path}/parts/iter_0000011/config.yaml --load {tmp_path}/parts "
        "--exit-interval 100"
    )
    whole, found = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert exact(found) == exact(whole) and len(found) == 6


def test_a_cooldown_from_another_iteration_than_was_planned_is_an_error(arguments, saved, tmp_path):
    """The newest does not verify; the older would have another rate and another end."""
    for n in (4, 8):
        (tmp_path / f"iter_000000{n}").mkdir()
        for path in (saved / f"iter_000000{n}").iterdir():
            (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "iter_0000008" / "shard_00000.safetensors").open("r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(
        CheckpointError,
        match=r"planned from iteration 8 of .*, which does not verify; --ckpt-step 4 cools down",
    ):
        train(f"{arguments} --load {tmp_path} --load-mode cooldown --cooldown-iters 3")


def test_the_rate_is_that_of_the_saved_schedule_whatever_the_flags_now_say(
    arguments, saved, monkeypatch
):
    schedule = resolve(flags.parse(arguments.split()).config, 1).optimizer
    config = run.checked(
        flags.parse(
            (
                f"{arguments} --lr 1 --lr-decay-style constant --load {saved} --ckpt-step 4 "
                "--load-mode cooldown --cooldown-iters 7"
            ).split()
        ).config,
        1,
    )
    assert (
        config.optimizer.lr == learning_rate(schedule, 4)
        and config.batch.train_iters == 11 == config.optimizer.lr_decay_iters
    )


# --- what cannot be ---


def problems_of(arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        run.checked(flags.parse(arguments.split()).config, 1)
    return "\n".join(error.value.problems)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("--load-mode contnue --load {}", "did you mean continue?"),
        ("--load-mode transfer", "--load-mode transfer needs --load FOLDER"),
        (
            "--load {} --finetune --load-mode transfer",
            "--finetune is --load-mode model_only, not transfer",
        ),
        (
            "--load {} --finetune --load-mode continue",
            "--finetune is --load-mode model_only, not continue",
        ),
        (
            "--load {} --no-load-optim --load-mode optimizer_only",
            "--no-load-optim leaves out all that --load-mode optimizer_only loads",
        ),
        ("--load {} --load-mode cooldown", "--load-mode cooldown needs --cooldown-iters N"),
        ("--load {} --load-mode cooldown --cooldown-iters 0", "--cooldown-iters 0 must be above 0"),
        ("--load {} --cooldown-iters 5", "--cooldown-iters 5 needs --load-mode cooldown"),
        (
            "--load {} --load-mode cooldown --cooldown-iters 5 --min-lr 0.004 --ckpt-step 16",
            "below --min-lr 0.004; choose an earlier one",
        ),
        (
            "--load {} --load-mode cooldown --cooldown-iters 5",
            "iter_0000020 is 0.0, at its end; choose an earlier one by --ckpt-step",
        ),
        (
            "--load {} --load-mode cooldown --cooldown-iters 5 --ckpt-step 5",
            "has no iteration 5; published: 4, 8, 12, 16, 20",
        ),
        (
            "--load {} --save {} --load-mode transfer",
            "--load-mode transfer: --load and --save are both",
        ),
        ("--load {} --save {} --finetune", "--finetune: --load and --save are both"),
    ],
)
def test_contradictions_are_configuration_errors(arguments, saved, asked, problem):
    assert problem in problems_of(f"{arguments} {asked.replace('{}', str(saved))}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        "model: {num_layers: many}",
        "a: &a [*a]",
        "!!python/object/apply:os.mkdir [unpickled]",
    ],
)
def test_a_configuration_that_is_none_is_one_line(arguments, saved, tmp_path, text):
    for path in (saved / "iter_0000008").iterdir():
        (tmp_path / "iter_0000008").mkdir(exist_ok=True)
        (tmp_path / "iter_0000008" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "iter_0000008" / "config.yaml").write_text(text)
    for asked in ("", "--load-mode cooldown --cooldown-iters 3"):
        with pytest.raises(
            (CheckpointError, ConfigError), match=r"config\.yaml|is of another model"
        ):
            train(f"{arguments} --load {tmp_path} {asked}")


def test_another_seed_is_said(arguments, saved, monkeypatch):
    notes = [
        line
        for line in begin(f"{arguments} --load {saved} --seed 77", monkeypatch).log
        if "--seed" in line
    ]
    assert len(notes) == 1 and "--seed 1234" in notes[0] and "77" in notes[0]
    assert not [
        line for line in begin(f"{arguments} --load {saved}", monkeypatch).log if "--seed" in line
    ]


def test_no_load_rng_is_accepted_and_explained(arguments, saved, monkeypatch):
    begun = begin(f"{arguments} --load {saved} --no-load-rng", monkeypatch)
    assert [
        line
        for line in begun.log
        if "random state" in line and "--no-load-rng changes nothing" in line
    ]


def test_keep_best_needs_losses_to_compare(arguments, tmp_path):
    best = f"{arguments} --save {tmp_path} --save-keep-best 2"
    assert (
        "--save-keep-best 2 needs --save-interval, a multiple of --eval-interval 4"
        in problems_of(best)
    )
    assert (
        "--save-interval 6 is not a multiple of --eval-interval 4; save every 4, 8"
        in problems_of(f"{best} --save-interval 6")
    )
    assert "--eval-iters 0 measures none" in problems_of(f"{best} --save-interval 8 --eval-iters 0")
    assert "there is no validation data" in problems_of(f"{best} --save-interval 8 --split 100,0,0")
    assert "--save-keep-best 2 needs --save FOLDER" in problems_of(
        f"{arguments} --save-keep-best 2 --save-interval 8"
    )


def test_the_namespace_of_non_persistent_flags_is_refused_with_the_one_that_is_there(arguments):
    with pytest.raises(ConfigError, match="use --non-persistent-save-interval alone"):
        flags.parse("--non-persistent-ckpt-type global".split())
    assert (
        SimpleNamespace(
            **vars(flags.parse("--non-persistent-save-interval 5".split()).config.checkpoint)
        ).non_persistent_save_interval
        == 5
    )
