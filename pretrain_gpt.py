"""Pretrain a GPT; `--help` lists the flags. The run itself is `pretrain` in core/train/run.py."""

import os
import sys

# Threads that wait asleep, set before torch starts any: beside other busy processes, spinning
# ones make a CPU run several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from trivium import launch, logs
from trivium.config import Config, flags, resolve
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.estimate.parameters import total_parameters
from trivium.interop.families import read_flags
from trivium.train.errors import failure_of, tell
from trivium.train.run import pretrain

PRESET = (
    "{name:15} {count:>15,} parameters with a vocabulary of {vocabulary:,}: "
    "{model.num_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads"
)


def main(argv: list[str], process: launch.Process) -> None:
    """Run what the command line asks for; errors are raised."""
    logs.setup(process.rank)
    request = flags.parse(argv, read_flags)
    if request.list_presets:
        list_presets()
    else:
        pretrain(request.config, process, without_effect=request.without_effect)


def list_presets() -> None:
    """Log every preset, with the parameters its shape has at its published vocabulary."""
    for name, values in PRESETS.items():
        model = resolve(Config.of(values | {"seq_length": 1024}), 1).model
        vocabulary = published_vocabulary(name)
        count = total_parameters(model, vocabulary)
        line = PRESET.format(name=name, count=count, vocabulary=vocabulary, model=model)
        logs.get_logger().info(line)


def cli(argv: list[str]) -> int:
    """Run, and return the exit status; an error that a user can mend is one clear message."""
    process = launch.read_environment()
    try:
        main(argv, process)
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error, process)
        if failure is None:
            raise
        return tell(failure, "pretrain_gpt.py", process)
    return 0


if __name__ == "__main__":
    launch.leave(cli(sys.argv[1:]), launch.read_environment())
