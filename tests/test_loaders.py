"""Question 1: which images and labels a training gets, in which order, and which it never gets."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_split, seeded
from torch.overrides import TorchFunctionMode

import utils
from tools import notebook


def marked(count, shift=0, size=18):
    """Images whose pixels all hold the image's number; the label is its last digit + shift."""
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    labels = (torch.arange(count) + shift) % 10
    return utils.Split(images.expand(count, 1, size, size).contiguous(), labels)


def marks(images):
    """The numbers of the images of a batch."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long()


def rows(split):
    """Every image of a split as bytes."""
    return [image.numpy().tobytes() for image in split.images]


@pytest.mark.parametrize(("size", "steps"), [(200, 3), (65, 9), (30, 2)])
def test_batches_are_full_and_show_every_image_equally_often_with_its_label(nb, size, steps):
    loader = nb.Loader(
        marked(size), nb.BASELINE, 64, utils.Plan("x", epochs=9, steps_per_epoch=steps)
    )
    batches = list(loader.epoch(3))
    assert [len(images) for images, _ in batches] == [64] * steps
    for images, labels in batches:
        assert torch.equal(labels, marks(images) % 10)
    counts = torch.bincount(torch.cat([marks(images) for images, _ in batches]), minlength=size)
    assert counts.max() - counts.min() <= 1


def test_order_is_random_the_same_again_and_another_in_each_pass_epoch_and_seed(nb):
    def orders(seed, epoch):
        plan = utils.Plan("x", epochs=9, steps_per_epoch=2, seed=seed)
        batches = nb.Loader(marked(99), nb.BASELINE, 99, plan).epoch(epoch)
        return [marks(images) for images, _ in batches]

    first, second = orders(0, 0)
    assert torch.equal(first, orders(0, 0)[0])
    for other in [torch.arange(99), second, orders(0, 1)[0], orders(1, 0)[0]]:
        assert (first == other).sum() < 10


def test_a_loader_augments_by_its_recipe_and_only_by_it_and_each_batch_anew(nb):
    split, index = noise_split(40), torch.tensor([7, 3, 31])
    plan = utils.Plan("x", epochs=2, steps_per_epoch=2)
    plain, labels = nb.Loader(split, nb.BASELINE, 8, plan).batch(index, seeded())
    assert torch.equal(plain, utils.to_float(split.images[index]))
    assert labels.tolist() == [7, 3, 1]
    recipe = nb.Recipe(warp=(10, 0.1, 0.1, 0.1), invert=True)
    augmented, _ = nb.Loader(split, recipe, 8, plan).batch(index, seeded())
    assert torch.equal(augmented, nb.augment(plain, seeded(), recipe))
    loader = nb.Loader(split.take([0] * 64), replace(recipe, invert=False), 64, plan)
    batches = [images for number in (0, 1) for images, _ in loader.epoch(number)]
    for number, images in enumerate(batches):
        assert not any(torch.equal(images, other) for other in batches[:number])


class CopiesToTheDevice(TorchFunctionMode):
    """Notes each copy from the CPU to the device 'meta', and whether it makes the CPU wait."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and args[0].device != result.device:
            self.waits.append(not (kwargs or {}).get("non_blocking"))
        return result


def test_no_batch_waits_for_a_gpu(nb, monkeypatch):
    monkeypatch.setattr(nb, "device", torch.device("meta"))
    plan = utils.Plan("x", epochs=2, steps_per_epoch=2)
    everything_on = replace(nb.HOUSE_NUMBERS, warp=(10, 0.1, 0.1, 0.1), erase=4, tones=True)
    for recipe in (nb.BASELINE, everything_on):
        loader = nb.Loader(noise_split(16), recipe, 8, plan)
        with CopiesToTheDevice() as copies:
            for images, _ in loader.epoch(0):
                assert images.device.type == "meta"
        assert copies.waits
        assert not any(copies.waits)


@pytest.fixture
def handed(monkeypatch):
    """Calls a training function; returns its model, and the batches, loss_fn and plan for fit."""

    def call(train, *arguments):
        seen = []
        monkeypatch.setattr(utils, "fit", lambda loop, model, *others: seen.extend(others))
        model, _ = train(*arguments)
        return model, *seen

    return call


RECIPE = {"lr": 3e-3, "schedule": "onecycle", "weight_decay": 0.2, "smoothing": 0.1}


def assert_follows(plan, loss_fn, smoothing):
    assert (plan.lr, plan.schedule, plan.weight_decay) == (3e-3, "onecycle", 0.2)
    assert (plan.epochs, plan.steps_per_epoch, plan.seed) == (7, 5, 4)
    assert loss_fn.keywords["smoothing"] == smoothing


def test_a_single_task_training_follows_its_recipe_and_only_watches_the_test_set(nb, handed):
    recipe = nb.Recipe(**RECIPE, batch_size=32)
    plan = utils.Plan("x", epochs=7, steps_per_epoch=5, seed=4)
    model, batches, loss_fn, done = handed(nb.train_single, marked(90), marked(20), recipe, plan)
    assert_follows(done, loss_fn, smoothing=0.1)
    assert [len(labels) for _, labels in batches(0)] == [32] * 5
    assert done.evaluate(model) == nb.evaluate_split(model, marked(20))
    *_, done = handed(nb.train_single, marked(90), None, recipe, plan)
    assert done.evaluate is None


def test_multi_task_batches_are_64_and_64_each_half_with_its_own_labels_and_order(nb, handed):
    recipes = (nb.Recipe(smoothing=0.3), nb.Recipe(**RECIPE))
    tasks = nb.TwoTasks((marked(200), marked(200, shift=3)), None, recipes, "mixed")
    plan = utils.Plan("x", epochs=7, steps_per_epoch=5, seed=4)
    _, batches, loss_fn, done = handed(nb.train_multi, tasks, plan)
    assert_follows(done, loss_fn, smoothing=[0.3, 0.1])
    assert done.evaluate is None
    epochs = [list(batches(number)) for number in (0, 1)]
    epochs.append(list(handed(nb.train_multi, tasks, replace(plan, seed=5))[1](0)))
    for (digits, digit_labels), (streets, street_labels) in epochs[0]:
        assert len(digits) == len(streets) == 64
        assert torch.equal(digit_labels, marks(digits) % 10)
        assert torch.equal(street_labels, (marks(streets) + 3) % 10)
    orders = [marks(images) for epoch in epochs for images, _ in epoch[0]]
    for number, order in enumerate(orders):  # of each half, epoch and seed its own
        assert all((order == other).sum() < 10 for other in orders[:number])


def test_each_half_has_the_augmentation_of_its_own_recipe(nb, handed):
    recipes = (nb.BASELINE, nb.Recipe(tones=True))
    tasks = nb.TwoTasks((marked(90), marked(90)), None, recipes, "mixed")
    batches = handed(nb.train_multi, tasks, utils.Plan("x", 1, 1))[1]
    (digits, _), (streets, _) = next(batches(0))
    assert len(digits.unique()) > 10
    assert streets.max() < -0.98  # a flat image becomes its darkest tone


def shuffled(count):
    return noise_split(count).take(np.random.RandomState(9).permutation(count))


def test_a_subset_is_the_first_of_each_digit_in_the_seeds_permutation(nb):
    train = shuffled(600)
    subset = nb.balanced_subset(train, 500, seed=4)
    order = np.random.RandomState(4).permutation(600)
    expected = []
    for digit in range(10):
        expected += [i for i in order if train.labels[i] == digit][:50]
    assert rows(subset) == rows(train.take(expected))
    assert torch.equal(subset.labels, torch.arange(10).repeat_interleave(50))
    assert rows(subset) != rows(nb.balanced_subset(train, 500, seed=5))
    with pytest.raises(ValueError, match="need 70 of each digit"):
        nb.balanced_subset(train, 700, seed=0)


@pytest.mark.parametrize(("count", "held"), [(20, 20), (1000, 100)])
def test_validation_images_are_not_trained_on_and_none_is_lost(nb, count, held):
    whole = shuffled(300)
    fit_on, held_out = nb.train_val_split(whole, count)
    assert (len(fit_on), len(held_out)) == (300 - held, held)
    assert Counter(rows(fit_on)) + Counter(rows(held_out)) == Counter(rows(whole))
    labels = dict(zip(rows(whole), whole.labels.tolist(), strict=True))
    for part in (fit_on, held_out):
        assert [labels[row] for row in rows(part)] == part.labels.tolist()
    assert rows(held_out) != rows(whole)[:held]  # at random


def test_few_samples_train_all_three_models_on_the_same_samples(nb):
    splits = (shuffled(200), noise_split(300, seed=5))
    tests = (marked(40), marked(30))
    recipes = (nb.TUNED, nb.HOUSE_NUMBERS)
    plan = utils.Plan("few", epochs=3, steps_per_epoch=2, seed=4)
    setting = nb.TwoTasks(splits, tests, recipes, "per domain")
    few = nb.few_samples(setting, 50, seed=4, watched=True)
    trainings = nb.three_trainings(few, plan, ("x", "y"))
    both, both_plan = trainings["two heads"].args
    assert both == few
    assert replace(few, train=splits) == setting
    assert nb.few_samples(setting, 50, seed=4, watched=False).test is None
    assert replace(both_plan, name="few") == plan
    for number, role in enumerate(("handwritten", "street")):
        train, test, recipe, own_plan = trainings[role].args
        expected = nb.balanced_subset(splits[number], 50, seed=4)
        assert rows(train) == rows(both.train[number]) == rows(expected)
        assert torch.equal(train.labels, both.train[number].labels)
        assert test is None
        assert recipe is recipes[number]
        assert replace(own_plan, name="few") == plan


def test_a_recipe_is_validated_on_held_out_images_and_without_the_test_set(nb, monkeypatch):
    class Guess(torch.nn.Linear):
        def forward(self, images):
            return F.one_hot(marks(images) % 10, 10).float()

    seen = []
    monkeypatch.setattr(nb, "train_single", lambda *all_of: (Guess(1, 1), seen.extend(all_of)))
    plan = utils.Plan("x", epochs=1, steps_per_epoch=1)
    fit_on, held_out = marked(60), marked(30, shift=1)
    held_out = utils.Split(held_out.images, torch.cat([marked(24).labels, held_out.labels[24:]]))
    assert nb.validation_accuracy(fit_on, held_out, nb.STRONG, plan) == pytest.approx(80)
    assert seen == [fit_on, None, nb.STRONG, plan]


@pytest.mark.parametrize("step", ["(b) recipes", "(c) sharing", "(d) recipes", "(e)"])
def test_the_cells_that_choose_read_no_test_images(step):
    cells = notebook.read(notebook.NOTEBOOK).cells
    (source,) = [cell.source for cell in cells if f'title="1 {step}"' in cell.source]
    assert ".test" not in source
    assert "held" in source
