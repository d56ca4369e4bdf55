"""The bench: its optimizer, its schedule, and the README's table."""

import pytest
import torch
from conftest import ROOT, noise_split
from torch import nn

import utils
from tools.notebook import fill_readme


@pytest.fixture(scope="module")
def bench():
    from offline.training import bench

    return bench


def test_orthogonal_steps_bring_all_singular_values_near_one(bench):
    gradient = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    step = bench.orthogonal(gradient)
    assert step.shape == gradient.shape
    values = torch.linalg.svdvals(step.flatten(1))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.98


def test_muon_moves_against_the_gradient_and_decays_the_weight(bench):
    weight = nn.Parameter(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    optimizer = bench.Muon([weight], lr=0.1, momentum=0.0, weight_decay=0.5)
    weight.grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * bench.orthogonal(weight.grad)
    assert torch.allclose(weight, expected, atol=1e-6)


def test_every_weight_has_one_optimizer(bench):
    model = nn.Sequential(bench.notebook.base_trunk(), bench.notebook.task_head())
    groups = [
        group for one in bench.optimizers(model, bench.ShortRecipe()) for group in one.param_groups
    ]
    ids = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))


def test_the_rate_rises_to_its_peak_and_falls_to_zero(bench):
    rates = [bench.rate(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1, abs=0.02) and rates.index(max(rates)) in (29, 30)
    assert 0 < rates[0] < 0.1 and 0 <= rates[-1] < 0.01


def test_a_short_training_makes_color_images_gray_and_learns(bench):
    images = noise_split(utils, 64, channels=3)
    model = bench.short_training(images, bench.ShortRecipe(side=18, batch_size=32), 2.0, seed=0)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_the_readme_shows_the_table_of_the_bench(bench):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = bench.table(bench.load_results())
    assert fill_readme(readme, bench.BENCH_START, table, bench.BENCH_END) == readme
