"""A SAVE folder with two iterations, a fresh copy for each test to damage."""

import shutil
from pathlib import Path

import cases
import pytest


@pytest.fixture(scope="session")
def two_published(tmp_path_factory) -> Path:
    save_dir = tmp_path_factory.mktemp("published")
    cases.write(save_dir, 100, 1)
    cases.write(save_dir, 200, 2)
    return save_dir


@pytest.fixture
def save_dir(two_published, tmp_path) -> Path:
    return Path(shutil.copytree(two_published, tmp_path / "save"))
