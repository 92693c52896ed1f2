"""Drives CMakeLists.txt, the only build description, with Ninja, and says what it is built for."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
OLDEST_TORCH = "2.11"
GIB_PER_JOB = 3  # a file that includes torch/extension.h peaks near 2.5 GiB


def build_jobs() -> int:
    """As many jobs as cores, but no more than memory holds: builds that swap look hung."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        gib = 8.0
    return max(1, min(os.cpu_count() or 1, int(0.7 * gib / GIB_PER_JOB)))


def identity() -> tuple[str, str]:
    """The version, with what the module is compiled against (0.1.0+torch2.14cu130), and the torch that it then needs.

    torch keeps its C++ interface within a minor version only. CUDA is named where it was asked for: else
    CMake finds out, later, whether there is an nvcc.
    """
    try:
        import torch
    except ImportError:  # nothing can be compiled, but pip may read what a source folder is
        return VERSION, f"torch>={OLDEST_TORCH}"
    minor = ".".join(torch.__version__.split(".")[:2])
    cuda = "cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else ""
    asked = os.environ.get("LECT11EXT_CUDA") == "1"
    return f"{VERSION}+torch{minor}{cuda if asked else ''}", f"torch=={minor}.*"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError:
            sys.exit(
                "lect11ext: torch was not found; install it first (pip install 'torch>=2.11') and build with "
                "--no-build-isolation, so that the extension is compiled against the torch that will load it."
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tag = f"torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
        build = ROOT / "build" / tag.replace("+", "-")
        build.mkdir(parents=True, exist_ok=True)
        jobs = build_jobs()
        print(f"lect11ext: building in {build} with {jobs} jobs", flush=True)
        self.spawn(
            [
                "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DLECT11EXT_OUTPUT={output}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            ]
        )  # fmt: skip
        self.spawn(["cmake", "--build", str(build), "--parallel", str(jobs)])


version, torch_needed = identity()
setup(
    version=version,
    install_requires=[torch_needed, "numpy"],
    ext_modules=[Extension("lect11ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
