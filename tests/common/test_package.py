"""The package as it is shipped: the report, the stub, what is said where something is missing."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

import lect11ext
from bench.readme import BEGIN, END, README, table
from lect11ext import functional
from lect11ext._load import _C
from tests.helpers import Tagged, Watch

pytestmark = pytest.mark.cpu

PACKAGE = Path(lect11ext.__file__).parent
SETUP = Path(__file__).resolve().parents[2] / "setup.py"
CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lect11ext::"))

# Runs setup.py (argument 1) with a folder for what it builds (argument 2) where torch cannot be found.
SETUP_WITHOUT_TORCH = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Absent())
_, setup, folder = sys.argv
sys.argv = [setup, "build_ext", "--build-lib", folder, "--build-temp", folder]
runpy.run_path(setup, run_name="__main__")
"""


def run(*arguments: str | Path, cwd: Path, capability: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python with the CPU capability forced, or the best where it is empty."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "LECT11EXT_CPU_CAPABILITY": capability}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def report(capability: str = "") -> dict[str, Any]:
    done = run("-m", "lect11ext", "--json", cwd=PACKAGE.parent, capability=capability)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_every_source_is_built() -> None:
    # A kernel that is not listed is missed where CUDA is, when the module is loaded.
    root = SETUP.parent
    listed = re.findall(r"csrc/\S+?\.(?:cpp|cu)\b", (root / "CMakeLists.txt").read_text())
    sources = [str(path.relative_to(root)) for suffix in ("cpp", "cu") for path in root.glob(f"csrc/**/*.{suffix}")]
    assert sorted(listed) == sorted(sources)


def test_the_report_names_every_op_and_its_backends() -> None:
    facts = report()
    assert facts["torch"] == torch.__version__
    assert facts["build"] == _C.build_info()
    assert facts["best_cpu_capability"] == _C.best_cpu_capability()
    assert OPS
    assert [f"lect11ext::{name}" for name in facts["ops"]] == OPS
    for name, backends in facts["ops"].items():
        assert {"CPU", "Meta"} <= set(backends), name
        assert ("CUDA" in backends) <= _C.build_info()["cuda"], name
    assert {"Autograd", "vmap"} <= set(facts["ops"]["lstm_cell"])


def test_the_report_reads_well() -> None:
    done = run("-m", "lect11ext", cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    for word in (torch.__version__, _C.best_cpu_capability(), *(op.removeprefix("lect11ext::") for op in OPS)):
        assert word in done.stdout
    assert _C.build_info()["cuda"] != ("this is a CPU-only build" in done.stdout)
    assert f"compiled for {_C.build_info()['cpu_builds']}" in done.stdout


def test_the_report_may_be_cut_short() -> None:
    command = f"{sys.executable} -m lect11ext | head -1"
    done = subprocess.run(command, shell=True, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lect11ext") and not done.stderr


def test_the_stub_lists_the_module() -> None:
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stub = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert set(stub) == public
    for name in public:  # pybind11 writes one "arg0: …" a parameter into the docstring's signature
        signature = str(getattr(_C, name).__doc__).partition("->")[0]
        assert len(stub[name].args.posonlyargs) == signature.count(": ", signature.index("(")), name
        assert not stub[name].args.args, name


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (False, ["there is no compiled module in", "source folder, which hides the installed package", "make demo"]),
        (True, ["lect11ext's compiled module does not load with torch", "pip install --no-build-isolation"]),
    ],
)
def test_without_a_module_that_loads_the_import_says_what_to_do(tmp_path: Path, built: bool, words: list[str]) -> None:
    shutil.copytree(PACKAGE, tmp_path / "lect11ext", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    if built:  # of another torch, or cut off
        (tmp_path / "lect11ext" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    # The copy comes first on the path of -c; -S keeps out the finder of an editable install, which knows the module.
    done = run("-S", "-c", f"import sys; sys.path += {sys.path!r}; import lect11ext", cwd=tmp_path)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert all(word in message for word in words), message


def test_a_module_of_another_minor_version_of_torch_is_refused() -> None:
    code = "import torch; torch.__version__ = '2.999.0'; import lect11ext"
    done = run("-c", code, cwd=PACKAGE.parent)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert f"was built against torch {_C.build_info()['torch']} and this is torch 2.999.0; build it again" in message


def test_the_package_names_the_torch_that_it_was_built_against() -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    # Not the egg-info that a build for another torch may have left in the source folder.
    installed = next(metadata.distributions(name="lect11ext", path=[sysconfig.get_path("purelib")]), None)
    if installed is None:
        pytest.skip("built in place, and not installed")
    assert re.fullmatch(rf"\d+\.\d+\.\d+\+torch{re.escape(minor)}(cu\d+)?", installed.version)
    assert f"torch=={minor}.*" in (installed.requires or [])


def test_without_torch_the_build_stops_with_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = run("-c", SETUP_WITHOUT_TORCH, SETUP, tmp_path, cwd=SETUP.parent)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("lect11ext: torch was not found; install it first")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_capability_can_be_forced(name: str) -> None:
    best = CAPABILITIES.index(_C.best_cpu_capability())
    if CAPABILITIES.index(name) <= best:
        assert report(name)["cpu_capability"] == name
    else:
        done = run("-m", "lect11ext", capability=name, cwd=PACKAGE.parent)
        assert done.returncode != 0
        assert f"LECT11EXT_CPU_CAPABILITY '{name}' is beyond this machine, whose best is" in done.stderr


def test_an_unknown_capability_is_refused() -> None:
    done = run("-m", "lect11ext", capability="sse9", cwd=PACKAGE.parent)
    assert done.returncode != 0
    expected = "must be one of default, avx2, avx512, avx512_bf16, amx, but got 'sse9'"
    assert f"ValueError: LECT11EXT_CPU_CAPABILITY {expected}" in done.stderr
    with pytest.raises(ValueError, match=f"CPU capability {expected}"):
        _C.set_cpu_capability("sse9")


def test_subclasses_and_function_modes_see_the_call() -> None:
    x, h = torch.randn(3, 5), torch.randn(3, 4)
    lstm, gru = [torch.randn(16, 5), torch.randn(16, 4)], [torch.randn(12, 5), torch.randn(12, 4)]
    assert type(functional.lstm_cell(x.as_subclass(Tagged), (h, h), *lstm)[0]) is Tagged
    assert type(functional.gru_cell(x, h.as_subclass(Tagged), *gru)) is Tagged
    assert type(functional.gaussian_rsample_kl(x.as_subclass(Tagged), x)[0]) is Tagged
    with Watch() as watch:
        functional.lstm_cell(x, (h, h), *lstm)
        functional.gaussian_rsample_kl(x, x)
    assert "lect11ext.lstm_cell" in watch.seen and "lect11ext.gaussian_rsample_kl" in watch.seen


AUTOENCODERS = ["corruption", "hashing", "penalties", "sparse_code", "variational"]
EXAMPLES = ["attention", "recurrent.cells", "recurrent.layers", *(f"autoencoder.{name}" for name in AUTOENCODERS)]
OWN = ["functional.autoencoder.jacobian", "functional.autoencoder.reconstruction", "nn.autoencoder.stacked"]


@pytest.mark.parametrize(
    "name",
    ["convert", "functional.random", "functional.kernel", "functional._attention_weights", *OWN]
    + [f"{place}.{e}" for place in ("functional", "nn") for e in EXAMPLES],
)
def test_examples_of_the_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lect11ext.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_table_of_speed_is_of_the_committed_results() -> None:
    assert BEGIN + table() + END in README.read_text()
