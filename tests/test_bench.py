"""The bench: its networks, its optimizers, its records and the README's table."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, noise_split, seeded
from torch import nn

import utils


@pytest.fixture(scope="module")
def bench():
    from offline.training import bench

    return bench


def run_record(machine="a", threads=2):
    """A stored run without its short trainings."""
    starter = {
        "epochs": 20,
        "seconds": 900.0,
        "test_acc": 99.3,
        "test_images": 64,
        "seconds_are": "measured",
    }
    conditions = {
        "processor": "p",
        "machine": machine,
        "arithmetic": "fp32, AVX2",
        "threads": threads,
    }
    return conditions | {"data": {"MNIST": {"starter": starter}}}


def test_a_step_is_about_the_nearest_orthogonal_one(bench):
    gradient = torch.randn(8, 4, 5, 5, generator=seeded())
    step = bench.orthogonal(gradient)
    assert step.shape == gradient.shape
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.98


def test_every_weight_has_one_optimizer(bench):
    model = nn.Sequential(bench.definitions.base_trunk(), bench.definitions.task_head())
    ids = []
    for optimizer in bench.optimizers(model, bench.ShortRecipe()):
        for group in optimizer.param_groups:
            ids += map(id, group["params"])
    assert sorted(ids) == sorted(map(id, model.parameters()))


def test_a_starter_under_other_conditions_gives_its_accuracy_only(bench):
    split = noise_split(64)
    mnist = utils.DigitData("MNIST", split, split, real=True)
    records = [run_record(machine="b"), run_record()]
    measured = bench.starter_for(mnist, records, bench.conditions_of(records[1]))
    assert measured is records[1]["data"]["MNIST"]["starter"]
    estimate = bench.starter_for(mnist, records, bench.conditions_of(run_record(threads=1)))
    assert estimate["test_acc"] == 99.3
    assert estimate["seconds"] != 900.0 and estimate["seconds_are"] == "extrapolated"
    fewer = replace(mnist, test=split.first(10))
    with pytest.raises(SystemExit, match="judged by 10 test images"):
        bench.starter_for(fewer, records, bench.conditions_of(records[1]))


def test_the_readme_shows_the_records_of_the_first_ones_machine(bench):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    records = bench.load_records()
    assert bench.with_table(readme, [*records, run_record(machine="b")]) == readme


def test_muon_moves_against_the_gradient_and_decays_the_weight(bench):
    weight = nn.Parameter(torch.randn(4, 2, 3, 3, generator=seeded(0)))
    before = weight.detach().clone()
    optimizer = bench.Muon([weight], lr=0.1, momentum=0.0, weight_decay=0.5)
    weight.grad = torch.randn(4, 2, 3, 3, generator=seeded(1))
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * bench.orthogonal(weight.grad)
    assert torch.allclose(weight, expected, atol=1e-6)


def test_a_short_training_makes_color_images_gray(bench):
    images = noise_split(64, channels=3)
    model = bench.short_training(images, bench.ShortRecipe(side=18, batch_size=32), 2.0, seed=0)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_after_the_first_epoch_a_share_of_the_images_is_hard(bench):
    order = torch.arange(1_000)
    is_hard = order % 10 == 3
    mixed = bench.with_hard_images(order, is_hard, 0.5, seeded())
    replaced = mixed != order
    assert is_hard[mixed[replaced]].all()
    assert 400 < replaced.sum() < 500  # half of the places, and some had a hard image before
    counts = torch.bincount(mixed, minlength=1_000)[is_hard]
    assert counts.min() >= 4 and counts.max() <= 7  # every hard image comes as often


def test_images_are_hard_by_their_loss_in_the_first_epoch(bench, monkeypatch):
    found = []

    def with_hard_images(order, is_hard, share, generator):
        found.append(is_hard.clone())
        return order

    monkeypatch.setattr(bench, "with_hard_images", with_hard_images)
    labels = torch.zeros(64, dtype=torch.int64)
    labels[::4] = 5  # rare, so hard
    images = utils.Split(noise_split(64).images, labels)
    recipe = bench.ShortRecipe(side=18, batch_size=32, hard_share=0.5)
    bench.short_training(images, recipe, 1.0, seed=0)
    assert found == []
    bench.short_training(images, recipe, 2.0, seed=0)
    (is_hard,) = found
    assert is_hard[labels == 5].float().mean() > is_hard[labels == 0].float().mean()


def test_the_quick_gray_is_the_notebooks_to_one_level(bench):
    split = noise_split(64, channels=3)
    exact = bench.definitions.gray(split).images
    quick = bench.gray_bytes(split.images)
    assert quick.dtype == torch.uint8 and quick.shape == exact.shape
    assert (quick.int() - exact.int()).abs().max() <= 1


def test_the_quick_resampling_is_the_notebooks_to_one_level(bench):
    split = noise_split(64, size=32)
    exact = bench.definitions.resample_split(split, bench.definitions.Recipe(side=24)).images
    quick = bench.resized(split.images, 24)
    assert quick.dtype == torch.uint8 and quick.shape == exact.shape
    assert (quick.int() - exact.int()).abs().max() <= 1


def test_the_quick_trunk_gives_the_numbers_of_the_notebooks(bench):
    trunk = bench.definitions.base_trunk()
    quick = bench.quick_trunk()
    for layer, own in zip(trunk, (*quick[:2], quick[3], quick[2], *quick[4:]), strict=True):
        own.load_state_dict(layer.state_dict())
    images = torch.randn(8, 1, 24, 24, generator=seeded())
    assert torch.equal(quick(images), trunk(images))
