"""Every recipe is a valid configuration for the machine it is meant for."""

from pathlib import Path

import pytest
import yaml

from trivium.config import flags, resolve
from trivium.config.validate import validate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("tiny_cpu", 1),
        ("tiny_cpu", 2),
        ("gpt2_124m", 8),
        ("gpt2_124m", 1),
        ("llama_1b", 8),
        ("llama_1b", 64),
    ],
)
def test_recipe_is_valid(name, processes, tmp_path):
    given = f"--mock-data --tokenizer-model {tmp_path} --save {tmp_path} --micro-batch-size 2"
    arguments = f"--config {EXAMPLES / f'{name}.yaml'} {given}"
    config = resolve(flags.parse(arguments.split()).config, processes)
    assert validate(config, processes) == []


def test_every_recipe_is_covered_and_explains_itself():
    found = {path.stem: path.read_text() for path in EXAMPLES.glob("*.yaml")}
    assert set(found) == {"tiny_cpu", "gpt2_124m", "llama_1b"}
    for name, text in found.items():
        assert text.startswith("# ")
        assert f"--config examples/{name}.yaml" in text
        assert "preset" in yaml.safe_load(text)
