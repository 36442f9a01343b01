"""The numbers that docs/design.md gives of a step, measured again."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from trace_step import trace_step

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES = 26
MOST_FRAMES = 12


def test_a_step_enters_few_files_and_reaches_a_product_in_few_calls():
    """And docs/design.md, in its tour, lists the files and the calls as they are."""
    trace = trace_step()
    assert len(trace.files) <= MOST_FILES, trace.files
    assert len(trace.chain) <= MOST_FRAMES, trace.chain
    page = (ROOT / "docs" / "design.md").read_text()
    count = re.search(r"enters (\d+) files", page)
    depth = re.search(r"(\d+) calls deep", page)
    assert count and int(count[1]) == len(trace.files)
    assert depth and int(depth[1]) == len(trace.chain)
    assert not [file for file in trace.files if f"`{file}`" not in page]
