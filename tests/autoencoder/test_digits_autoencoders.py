"""The example of the autoencoders: every system trains, measures and is drawn; some of what it says can be checked."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("autoencoder_systems")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits_autoencoders")


def test_prints_and_draws(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--output", str(tmp_path), "--steps", "2"])
    printed = capsys.readouterr().out
    for name in ("linear", "sparse", "contractive", "denoising", "variational", "hashing", "stacked"):
        assert name in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.png" for name in ("tangents", "denoising", "field", "generated")
    }
    assert all(f"wrote {path}" in printed for path in tmp_path.iterdir())


def test_no_image_is_in_both_parts(systems: ModuleType) -> None:
    digits = systems.load(1, 3)
    assert len(digits.held_out) == len(digits.held_out_labels) == systems.HELD_OUT
    assert len(digits.training) == len(digits.training_labels) == 1797 - systems.HELD_OUT
    # The dataset holds no image twice.
    assert len(torch.cat([digits.held_out, digits.training]).unique(dim=0)) == 1797


@pytest.mark.parametrize("name", ["sparse", "contractive", "denoising", "variational", "hashing", "stacked"])
def test_runs_agree(systems: ModuleType, name: str) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(getattr(systems, name)(systems.load(3, 1)))
    assert runs[0] == runs[1]
    assert all(math.isfinite(row.value) and math.isfinite(row.other) for row in runs[0])


def test_linear_autoencoder_is_pca(systems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "LINEAR_UNITS", (2,))
    torch.manual_seed(0)
    error, angle = systems.undercomplete(systems.load(300, 0))
    assert error.value == pytest.approx(error.other, rel=1e-5)
    assert angle.value < 0.1  # degrees


def test_penalties_do_what_they_are_for(systems: ModuleType) -> None:
    digits = systems.load(100, 0)
    sparse = {(row.system, row.measure): row for row in systems.sparse(digits)}
    active = [row for (_, measure), row in sparse.items() if measure.startswith("active")]
    assert len(active) == 2 and all(row.value < row.other for row in active)
    assert active[1].value <= systems.ACTIVE
    norm = next(row for row in systems.contractive(digits) if "∂h/∂x" in row.measure)
    assert norm.value < norm.other


def test_neighbours_are_counted(systems: ModuleType) -> None:
    digits = systems.load(1, 0)
    same = torch.stack([(digits.training_labels == y).nonzero()[:4, 0] for y in digits.held_out_labels])
    other = torch.stack([(digits.training_labels != y).nonzero()[:4, 0] for y in digits.held_out_labels])
    assert systems.precision(same, digits) == 1
    assert systems.precision(torch.cat([same, other], 1), digits) == 0.5
