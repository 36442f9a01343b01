"""docs/training.md shows a run as a Python call that works as it stands."""

import os
import re
import subprocess
import sys

from runs import ROOT, rows_of

PAGE = ROOT / "docs" / "training.md"


def test_the_call_of_the_page_trains(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "20 iterations, 160 samples"
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 20
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
