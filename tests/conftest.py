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


def definitions() -> types.SimpleNamespace:
    """What the notebook's cells tagged `definitions` define, executed in order."""
    notebook = nbformat.read(ROOT / "assignment3.ipynb", as_version=4)
    names = {"PROFILE": "tiny", "FULL": False, "device": torch.device("cpu"), "SEEDS": range(2)}
    for cell in notebook.cells:
        if "definitions" in cell.metadata.get("tags", []):
            exec(compile(cell.source, cell.id, "exec"), names)
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
