"""A wheel holds what it should and works from anywhere, with a compiler and without."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("core", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def copy_sources(target: Path) -> None:
    """Copy the sources, so that a build leaves nothing in the checkout."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    target.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=ignore)
        else:
            shutil.copy(path, target / name)


def build_wheel(folder: Path, **environment: str) -> tuple[Path, list[str]]:
    """Build a wheel; return where it is unpacked, and the names of its files."""
    pytest.importorskip("pybind11")
    source = folder / "source"
    copy_sources(source)
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(source)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("trivium*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
        return folder / "unpacked", archive.namelist()


# An editable install finds `trivium._native` in the checkout even when `trivium` itself came from
# elsewhere.
WITHOUT_THE_CHECKOUT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')]
"""


def python(code: str, cwd: Path, path: Path | str) -> str:
    """Run code in a process that finds modules on `path` first, and no others of ours."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_CHECKOUT + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[Path, list[str]]:
    """Build a wheel with the native module."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_engine_the_kernels_and_the_native_module(wheel):
    _, names = wheel
    expected = {"trivium/__init__.py", "trivium/ops/ops.py", "trivium/kernels/rms_norm.py"}
    assert expected <= set(names)
    assert [name for name in names if name.startswith("trivium/_native") and name.endswith(".so")]
    core = ROOT / "core"
    sources = {f"trivium/{path.relative_to(core).as_posix()}" for path in core.rglob("*.py")}
    assert sources <= set(names)


def test_wheel_installs_no_name_but_its_own(wheel):
    _, names = wheel
    assert {name.split("/")[0].split("-")[0] for name in names} == {"trivium"}


def test_unpacked_wheel_works_from_another_folder(wheel, tmp_path):
    unpacked, _ = wheel
    choice = "trivium.ops.select_ops('native', torch.device('cpu'), torch.float32).kernels"
    code = f"import trivium.ops, torch; print(trivium.__file__, {choice})"
    file, kernels = python(code, tmp_path, unpacked).split()
    assert Path(file) == unpacked / "trivium" / "__init__.py"
    assert kernels == "native"


def test_kernels_of_hugging_face_is_found_from_the_checkout():
    pytest.importorskip("kernels")
    code = "from kernels import get_kernel; import kernels; print(kernels.__file__)"
    file = python(code, ROOT, "")
    assert ROOT / "kernels" not in Path(file).parents


def test_install_without_a_compiler_goes_on_without_the_native_module(tmp_path):
    unpacked, names = build_wheel(tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert not [name for name in names if name.endswith(".so")]
    chosen = "select_ops('auto', torch.device('cpu'), torch.float32)"
    code = f"import trivium.ops as ops, torch; print(ops.{chosen}.kernels)"
    assert python(code, tmp_path, unpacked) == "torch"
