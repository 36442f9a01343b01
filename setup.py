"""Install core/ as `trivium`, kernels/triton/ as `trivium.kernels`, csrc/ as `trivium._native`.

The native module needs only a C++17 compiler: no torch headers, no CUDA. It is optional: without a
compiler the install succeeds, and the numpy and PyTorch references run in its place, with a notice
at start-up.
"""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))

ParallelCompile("MAX_JOBS").install()

native = Pybind11Extension(
    "trivium._native",
    SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    cxx_std=17,
    # No -march: the CPU kernels choose their instruction set at run time.
    # -fno-math-errno: a square root that may set errno is not vectorised.
    extra_compile_args=["-O3", "-fno-math-errno"],
    optional=True,
)

setup(
    packages=["trivium", *(f"trivium.{name}" for name in find_packages("core")), "trivium.kernels"],
    package_dir={"trivium": "core", "trivium.kernels": "kernels/triton"},
    ext_modules=[native],
)
