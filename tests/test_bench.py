"""The bench: its networks, its optimizer, its schedule, its records and the README's table."""

import pytest
import torch
from conftest import ROOT, noise_split
from torch import nn

import utils


@pytest.fixture(scope="module")
def bench():
    from offline.training import bench

    return bench


def run_record(machine="a", arithmetic="fp32, AVX2", threads=2, seconds_are="measured"):
    """A stored run without its short trainings."""
    starter = {"epochs": 20, "seconds": 900.0, "test_acc": 99.3, "seconds_are": seconds_are}
    data = {"MNIST": {"starter": starter}}
    return {"machine": machine, "arithmetic": arithmetic, "threads": threads, "data": data}


@pytest.fixture
def mnist():
    return utils.DigitData("MNIST", noise_split(utils, 64), noise_split(utils, 64), real=True)


def test_the_starter_has_the_notebooks_network(bench):
    torch.manual_seed(0)
    starter = bench.starter_network().eval()
    torch.manual_seed(0)
    ours = nn.Sequential(bench.notebook.base_trunk(), bench.notebook.task_head()).eval()
    images = torch.randn(4, 1, 28, 28)
    assert torch.allclose(starter(images), ours(images), atol=1e-5)


def test_the_starter_pools_contiguous_images_behind_its_relu(bench, monkeypatch):
    starter = bench.starter_network()
    kinds = [type(layer) for layer in starter[:4]]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    monkeypatch.setattr(bench, "starter_network", lambda: starter)
    pooled = []
    starter[3].register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    bench.starter_training(noise_split(utils, 64), epochs=1)
    assert pooled and all(images.is_contiguous() for images in pooled)


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


@pytest.mark.parametrize(
    "other", [{"machine": "b"}, {"arithmetic": "bf16, AVX512"}, {"threads": 1}]
)
def test_a_run_of_another_kind_stands_beside(bench, other):
    first, new = run_record(), run_record(**other)
    assert bench.with_record([first], new) == [first, new]


def test_a_run_replaces_the_record_of_its_kind_in_its_place(bench):
    old, other = run_record(seconds_are="extrapolated"), run_record(machine="b")
    new = run_record()
    assert bench.with_record([old, other], new) == [new, other]


def test_a_measured_starter_stays_on_its_own_kind(bench, mnist, monkeypatch):
    monkeypatch.delattr(bench, "starter_training")  # nothing is timed
    record = run_record()
    found = bench.starter_for(mnist, [run_record(machine="b"), record], bench.kind_of(record))
    assert found is record["data"]["MNIST"]["starter"]


def test_a_starter_of_another_kind_gives_its_accuracy_only(bench, mnist):
    kind = bench.kind_of(run_record(threads=1))
    estimate = bench.starter_for(mnist, [run_record()], kind)
    assert estimate["test_acc"] == 99.3
    assert estimate["seconds"] != 900.0 and estimate["seconds_are"] == "extrapolated"


def test_estimates_alone_ask_for_the_whole_starter(bench, mnist):
    estimate = run_record(seconds_are="extrapolated")
    with pytest.raises(SystemExit, match="--full"):
        bench.starter_for(mnist, [estimate], bench.kind_of(estimate))


def test_the_readme_shows_the_first_record(bench):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    records = bench.load_records()
    assert bench.with_table(readme, [*records, run_record(machine="b")]) == readme


def test_every_record_has_a_kind_of_its_own(bench):
    kinds = [bench.kind_of(record) for record in bench.load_records()]
    assert kinds and len(set(kinds)) == len(kinds)
