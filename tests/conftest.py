"""Fixtures: clean settings, the notebook's own definitions, the development data."""

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
sys.path.insert(0, str(ROOT))

import utils
from tools.notebook import load_definitions

matplotlib.use("Agg")
# Idle OpenMP threads spin; on a small or busy machine one thread is faster and steadier.
torch.set_num_threads(1)

# No setting of the developer's shell reaches a test, and no processor chooses its arithmetic.
for setting in [name for name in os.environ if name.startswith("A3_")]:
    del os.environ[setting]
os.environ["A3_PRECISION"] = "fp32"


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test writes into the project or finds what another one wrote."""
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("A3_DATA_ROOT", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def nb() -> types.ModuleType:
    """The notebook's own functions and classes."""
    return load_definitions()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data beside the clone; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


def code_cell(source, *tags, outputs=(), count=None):
    """A cell of a notebook; `count` tells when it was executed."""
    about = {"metadata": {"tags": list(tags)}, "execution_count": count}
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), **about)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_split(count=32, size=28, channels=1, seed=0):
    """Random images, labeled 0 to 9 in turn."""
    images = torch.randint(0, 256, (count, channels, size, size), generator=seeded(seed))
    return utils.Split(images.to(torch.uint8), torch.arange(count) % 10)
