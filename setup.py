"""Builds the extension by driving CMakeLists.txt, the only build description, with Ninja."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
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


setup(ext_modules=[Extension("lect11ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
