"""Fixtures: the project's modules, and the notebook's own definitions as a namespace."""

import os
import sys
import types
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RUNS = os.environ.get("A3_RUNS")  # where `make test` has the notebook's own run
SHARED = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
matplotlib.use("Agg")

# Idle OpenMP threads spin; on a small or busy machine one thread is faster and steadier.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_switches(monkeypatch, tmp_path):
    """No switch of the developer's shell reaches a test, and no test writes into the project."""
    for name in [name for name in os.environ if name.startswith("A3_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("A3_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("A3_PROGRESS", str(tmp_path / "progress.log"))
    (tmp_path / "progress.log").touch()


def definition_cells() -> list[str]:
    """The code of the notebook's cells tagged `definitions`."""
    text = (ROOT / "assignment3.ipynb").read_text(encoding="utf-8")
    cells = nbformat.reads(text, as_version=4).cells
    return [cell.source for cell in cells if "definitions" in cell.metadata.get("tags", [])]


def definitions() -> types.SimpleNamespace:
    """What these cells define, executed in order."""
    names = {"FULL": False, "device": torch.device("cpu"), "__name__": "notebook_definitions"}
    for number, code in enumerate(definition_cells()):
        exec(compile(code, f"definitions {number}", "exec"), names)
    return types.SimpleNamespace(**{k: v for k, v in names.items() if not k.startswith("__")})


@pytest.fixture(scope="session")
def nb() -> types.SimpleNamespace:
    """The notebook's own functions and classes."""
    return definitions()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data beside the clone; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


def noise_split(utils, count=32, size=28, channels=1, seed=0):
    """Random images, labeled 0 to 9 in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return utils.Split(images.to(torch.uint8), torch.arange(count) % 10)
