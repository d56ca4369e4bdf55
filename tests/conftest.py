"""Fixtures and what several tests use: settings, the notebook's definitions, small data."""

import os
import sys
import types
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
CPU = torch.device("cpu")
NOWHERE = "http://127.0.0.1:9"  # no server listens there
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


@pytest.fixture
def small_svhn(monkeypatch):
    """Its two splits: SVHN has 40 and 20 images, `real` is asked for, and no address answers."""
    sizes = {"MNIST": {"train": 12, "test": 5}, "SVHN": {"train": 40, "test": 20}}
    monkeypatch.setattr(utils, "SIZES", sizes)
    monkeypatch.setattr(utils, "RENDERED_SIZES", {"train": 60, "test": 30})
    monkeypatch.setattr(utils, "SVHN_TRAIN_COUNTS", [4] * 10)
    monkeypatch.setattr(utils, "SVHN_URL", NOWHERE)
    monkeypatch.setattr(utils, "MNIST_URL", NOWHERE)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("A3_DATA", "real")
    return noise_split(40, 32, 3), noise_split(20, 32, 3, seed=1)


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


def patterns(count, seed, channels=1, size=18):
    """Noisy images of ten coarse patterns of the seed, and their labels: easy to learn."""
    generator = seeded(seed)
    coarse = torch.randint(0, 2, (10, channels, 6, 6), generator=generator) * 200.0
    known = F.interpolate(coarse, (size, size))
    noise = torch.randint(0, 56, (count, channels, size, size), generator=generator)
    labels = torch.arange(count) % 10
    return utils.Split((known[labels] + noise).to(torch.uint8), labels)


class Draws(nn.Module):
    """Images that tell what the generator was given."""

    def forward(self, z, c, truncation):
        return truncation * z[:, :3, None, None].expand(-1, -1, 32, 32)


DRAWS = utils.ImageGenerator(Draws(), "draws", "draws", ["one", "two"], 3, 32)
