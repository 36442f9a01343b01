"""docs/checkpoints.md describes the format well enough to read it: its own reader does, with json
and numpy alone."""

import re
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

from trivium.testing import run_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def write_on_ranks(mesh, save_dir: Path) -> None:
    cases.write(save_dir, 100, 5, mesh)


def the_reader() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_reader_of_the_page_reads_every_tensor(tmp_path, ranks):
    run_ranks(ranks, write_on_ranks, tmp_path, tp=ranks)
    names: dict = {}
    exec(the_reader(), names)
    for name, dtype in cases.DTYPES.items():
        found = names["read_tensor"](tmp_path / "iter_0000100", name)
        expected = cases.whole(name, 5)
        assert np.array_equal(
            found, (expected.float() if dtype == torch.bfloat16 else expected).numpy()
        ), name


def test_it_needs_neither_torch_nor_us():
    imported = "sorted({'torch', 'trivium', 'safetensors'} & set(sys.modules))"
    command = f"{the_reader()}\nimport sys; print({imported})"
    assert (
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_it_sees_a_flipped_bit(tmp_path):
    cases.write(tmp_path, 100, 5)
    shard = tmp_path / "iter_0000100" / "shard_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    names: dict = {}
    exec(the_reader(), names)
    with pytest.raises(AssertionError, match="is damaged"):
        for name in cases.DTYPES:
            names["read_tensor"](tmp_path / "iter_0000100", name)
