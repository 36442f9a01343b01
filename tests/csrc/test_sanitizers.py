"""The C++ kernels by themselves.

Under the sanitizers, in every instruction set, and compiled for other processors.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [
    str(path) for path in sorted((ROOT / "csrc").rglob("*.cpp")) if not path.name.startswith("bind")
]
DRIVER = str(Path(__file__).with_name("kernels.cpp"))
COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


def compiled(folder: Path, *flags: str, compiler: str = COMPILER) -> Path:
    """The driver with every kernel, as many files at a time as there are cores."""
    program, command = (
        folder / "kernels",
        [
            compiler,
            "-std=c++17",
            "-fno-math-errno",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'csrc'}",
            *flags,
        ],
    )

    def run(*arguments: str) -> None:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    objects = {source: str(folder / f"{Path(source).stem}.o") for source in (DRIVER, *SOURCES)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run("-c", source, "-o", objects[source]), objects))
    run(*objects.values(), "-o", str(program), "-ldl", "-pthread")
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    # Undefined behaviour ends the program too; by default it is only told.
    return compiled(
        tmp_path_factory.mktemp("sanitized"),
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    )


@pytest.mark.parametrize("simd", ["plain", "avx2", "widest"])
def test_no_kernel_touches_memory_that_is_not_its_own(program, simd):
    done = subprocess.run(
        [program],
        env=os.environ | {"TRIVIUM_SIMD": simd},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


def test_the_sanitizers_are_awake(tmp_path):
    """One element too many is seen."""
    source = tmp_path / "over.cpp"
    source.write_text(
        '#include "cpu/squared_norm.h"\n'
        "int main() {\n"
        "    float* x = new float[10]();\n"
        "    return trivium::squared_norm(x, 11, 1) != 0;\n"
        "}\n"
    )
    flags = ["-std=c++17", "-fsanitize=address", f"-I{ROOT / 'csrc'}"]
    needed = [path for path in SOURCES if Path(path).stem in ("squared_norm", "parallel", "simd")]
    subprocess.run(
        [COMPILER, *flags, *needed, str(source), "-o", str(tmp_path / "over"), "-ldl", "-pthread"],
        check=True,
    )
    done = subprocess.run([tmp_path / "over"], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++"])
def test_the_kernels_build_and_run_on_arm(tmp_path, compiler):
    if shutil.which(compiler) is None or shutil.which("qemu-aarch64") is None:
        pytest.skip(f"{compiler} and qemu-aarch64 are not installed")
    program = compiled(tmp_path, "-O2", "-static", compiler=compiler)
    done = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]
