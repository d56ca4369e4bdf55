"""The bench: both ways train the same network; its records and the README's table."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, noise_split, seeded

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


def test_a_starter_under_other_conditions_gives_its_accuracy_only(bench):
    split = noise_split(64)
    mnist = utils.DigitData("MNIST", split, split, real=True)
    records = [run_record(machine="b"), run_record()]
    measured = bench.stored_or_extrapolated_starter(mnist, records, bench.conditions_of(records[1]))
    assert measured is records[1]["data"]["MNIST"]["starter"]
    estimate = bench.stored_or_extrapolated_starter(
        mnist, records, bench.conditions_of(run_record(threads=1))
    )
    assert estimate["test_acc"] == 99.3
    assert estimate["seconds"] != 900.0 and estimate["seconds_are"] == "extrapolated"
    fewer = replace(mnist, test=split.first(10))
    with pytest.raises(SystemExit, match="judged by 10 test images"):
        bench.stored_or_extrapolated_starter(fewer, records, bench.conditions_of(records[1]))


def test_the_readme_shows_the_records_of_the_first_ones_machine(bench):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    records = bench.load_records()
    assert bench.with_table(readme, [*records, run_record(machine="b")]) == readme


def test_a_short_training_makes_color_images_gray(bench):
    images = noise_split(64, channels=3)
    model = bench.short_training(images, bench.ShortRecipe(side=18, batch_size=32), 2.0, seed=0)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_a_training_that_grows_begins_with_small_images(bench, monkeypatch):
    sides = []

    def record_side(images, *_):
        sides.append(images.shape[-1])
        return images

    monkeypatch.setattr(bench.definitions, "augment", record_side)
    recipe = bench.ShortRecipe(side=24, grow=True, batch_size=32)
    bench.short_training(noise_split(320), recipe, 1.0, seed=0)
    assert sides == [18] * 3 + [24] * 7


def test_the_quick_trunk_gives_the_numbers_of_the_notebooks(bench):
    trunk = bench.definitions.base_trunk()
    quick = bench.quick_trunk()
    for layer, own in zip(trunk, (*quick[:2], quick[3], quick[2], *quick[4:]), strict=True):
        own.load_state_dict(layer.state_dict())
    images = torch.randn(8, 1, 24, 24, generator=seeded())
    assert torch.equal(quick(images), trunk(images))
