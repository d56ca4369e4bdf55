"""Question 1 (b) to (d): models, mixed batches, gradients, subsets, paired comparison."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.io import loadmat
from torch import nn

import utils

CPU = torch.device("cpu")


def split(count, size=32, seed=0, mark=False):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, size, size), generator=generator).to(torch.uint8)
    if mark:
        images[:, 0, 0, 0] = torch.arange(count) % 256
    return utils.Split(images, torch.arange(count) % 10)


def test_base_cnn_computes_what_the_starter_defines(nb):
    torch.manual_seed(0)
    ours = nb.base_trunk()
    starter = nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    starter.load_state_dict(ours.state_dict())
    for size in (28, 32):
        images = torch.randn(8, 1, size, size)
        left, right = ours(images), starter(images)
        assert torch.equal(left, right) and left.shape == (8, 64)
        for model, features in ((ours, left), (starter, right)):
            model.zero_grad()
            features.square().sum().backward()
        for one, two in zip(ours.parameters(), starter.parameters(), strict=True):
            assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-5)


def test_head_has_one_hidden_layer(nb):
    assert [type(layer) for layer in nb.task_head()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert nb.classifier()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("kind", ["mixed", "per domain", "separate passes"])
@pytest.mark.parametrize("task", [0, 1])
def test_one_tasks_gradient_leaves_the_other_head_and_reaches_the_trunk(nb, kind, task):
    model = nb.TwoHeads(kind)
    scores = model(torch.randn(8, 1, 32, 32), torch.randn(8, 1, 32, 32))
    F.cross_entropy(scores[task], torch.arange(8)).backward()
    assert all(p.grad is None for p in model.heads[1 - task].parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.heads[task].parameters())
    assert model.trunk[0].weight.grad.abs().sum() > 0


def test_each_recipe_adds_one_thing_to_the_one_before(nb):
    recipes = [vars(recipe) for recipe in nb.RECIPES.values()]
    for before, after in pairwise(recipes):
        changed = {field for field in after if after[field] != before[field]}
        assert len(changed) == 1 or changed == {"lr", "schedule"}


@pytest.mark.parametrize(("shrink", "trim"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", [28, 32])
def test_pictures_enter_small_and_without_their_sides(nb, shrink, trim, size):
    enter = nb.entrance(replace(nb.RECIPES["suggested"], shrink=shrink, trim=trim))
    images = torch.rand(2, 1, size, size)
    framed = enter(images)
    assert framed.shape[2:] == ((24, 24) if shrink else (size, size))
    level = torch.full_like(images, 0.3)
    assert torch.allclose(enter(level), torch.full_like(framed, 0.3))
    images[..., : size // 8] = images[..., -(size // 8) :] = 9.0
    assert torch.equal(enter(images), framed) == trim
    images[..., size // 8] = 9.0  # the first column that stays
    assert not torch.equal(enter(images), framed)


def test_standardised_pictures_have_mean_0_and_deviation_1_after_framing(nb):
    images = nb.entrance(nb.RECIPES["negatives"])(5 + 3 * torch.rand(4, 1, 32, 32))
    assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(images.std((1, 2, 3), correction=0), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("recipes", [("suggested", "shrink"), ("trim", "warp"), ("warp", "warp")])
@pytest.mark.parametrize("kind", ["mixed", "per domain", "separate passes"])
def test_halves_are_of_one_size_when_only_one_recipe_shrinks(nb, recipes, kind):
    model = nb.TwoHeads(kind, recipes)
    halves = torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32)
    side = 24 if any(nb.RECIPES[recipe].shrink for recipe in recipes) else 32
    for enter, half in zip(model.entrances, halves, strict=True):
        assert enter(half).shape == (4, 1, side, side)
    assert [scores.shape for scores in model(*halves)] == [(4, 10), (4, 10)]


def test_losses_smooth_labels_and_weigh_tasks(nb):
    logits, labels = torch.randn(6, 10), torch.arange(6)
    target = 0.9 * F.one_hot(labels, 10) + 0.01
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    loss, figures = nb.classification_loss(lambda images: images, (logits, labels), smoothing=0.1)
    assert torch.allclose(loss, expected)
    assert figures["acc"] == 100 * (logits.argmax(1) == labels).float().mean()
    both, _ = nb.multi_task_loss(
        lambda *halves: halves, ((logits, labels), (-logits, labels)), smoothing=(0.1, 0.0)
    )
    other = F.cross_entropy(-logits, labels)
    assert torch.allclose(both, (expected + other) / 2)
    both, _ = nb.multi_task_loss(
        lambda *halves: halves,
        ((logits, labels), (-logits, labels)),
        smoothing=(0.1, 0.0),
        weights=(3, 1),
    )
    assert torch.allclose(both, (3 * expected + other) / 4)


def test_two_heads_put_each_half_through_its_own_head(nb):
    model = nb.TwoHeads("mixed").eval()
    digits, streets = torch.randn(4, 1, 32, 32), torch.randn(4, 1, 32, 32)
    for number, scores in enumerate(model(digits, streets)):
        alone = model.task(number)((digits, streets)[number])
        assert torch.allclose(scores, alone, atol=1e-5)
    with pytest.raises(ValueError, match="batch_norm"):
        nb.TwoHeads("none")


def test_domain_batch_norm_keeps_statistics_per_domain(nb):
    layer = nb.DomainBatchNorm2d(3)
    halves = torch.randn(6, 3, 4, 4) + 5, 3 * torch.randn(6, 3, 4, 4) - 5
    joined = layer(torch.cat(halves))
    for norm, half, out in zip(layer.norms, halves, joined.chunk(2), strict=True):
        reference = nn.BatchNorm2d(3)
        assert torch.allclose(reference(half), out, atol=1e-6)
        assert torch.allclose(reference.running_mean, norm.running_mean)
    model = nb.TwoHeads("per domain").eval()
    assert not any(isinstance(m, nb.DomainBatchNorm2d) for m in model.task(0).modules())


def test_joint_choice_is_the_greatest_sum_of_means_over_the_seeds(nb, monkeypatch):
    accuracies = {("a", 0): (90, 50), ("a", 1): (92, 50), ("b", 0): (80, 64), ("b", 1): (80, 60)}
    calls = []

    class Trained:
        def __init__(self, key):
            self.key = key

        def task(self, number):
            return accuracies[self.key][number], number

    def train_spy(train, test, *, seed, letter, run):
        assert test is None and run == "trial"
        calls.append((letter, seed, train))
        return Trained((letter, seed)), None

    def score_spy(task, held_out):
        assert held_out == ("digits", "streets")[task[1]]
        return task[0]

    monkeypatch.setitem(nb.choose_joint.__globals__, "train_multi", train_spy)
    monkeypatch.setitem(nb.choose_joint.__globals__, "test_accuracy", score_spy)
    best, scores = nb.choose_joint(
        ["pair 0", "pair 1"],
        ("digits", "streets"),
        {"first": {"letter": "a"}, "second": {"letter": "b"}},
        run="trial",
    )
    assert best == "second"  # 80 + 62 against 91 + 50
    assert scores == {
        "handwritten": {"first": 91, "second": 80},
        "street": {"first": 50, "second": 62},
    }
    assert calls == [(c, seed, f"pair {seed}") for c in "ab" for seed in (0, 1)]


@pytest.mark.parametrize("sizes", [(300, 70), (70, 300), (64, 64), (65, 1000), (30, 100)])
def test_mixed_batches_are_64_and_64_and_see_every_sample_equally_often(nb, sizes):
    splits = [split(n, size=16) for n in sizes]
    for part in splits:  # the label is the picture's number: count them
        object.__setattr__(part, "labels", torch.arange(len(part)))
    steps = -(-max(sizes) // 64)
    loaders = [utils.Loader(part, 64, seed=n, device=CPU) for n, part in enumerate(splits)]
    batches = list(nb.paired_batches(*loaders, steps)(3))
    assert len(batches) == steps
    assert all(len(x) == len(y) == 64 for pair in batches for x, y in pair)
    for number, size in enumerate(sizes):
        seen = torch.bincount(torch.cat([pair[number][1] for pair in batches]), minlength=size)
        assert seen.max() - seen.min() <= 1 and seen.sum() == 64 * steps


def test_pictures_stay_with_their_labels_in_mixed_batches(nb):
    part = split(100, mark=True)
    for images, labels in nb.one_epoch(utils.Loader(part, 64, device=CPU), 3, epoch=0):
        marks = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(labels, marks % 10)


def test_subsets_are_balanced_repeatable_and_disjoint_from_test(nb):
    train, test = split(600, mark=True), split(100, seed=1)
    subset = nb.balanced_subset(train, 500, seed=4)
    assert subset.counts() == [50] * 10 and len(subset) == 500
    rows = [bytes(image.numpy().tobytes()) for image in subset.images]
    assert len(set(rows)) == 500  # without repetition
    assert not set(rows) & {bytes(image.numpy().tobytes()) for image in test.images}
    assert torch.equal(subset.images, nb.balanced_subset(train, 500, seed=4).images)
    assert not torch.equal(subset.images, nb.balanced_subset(train, 500, seed=5).images)


@pytest.mark.parametrize("size", [0, 5, 25, -10, 700])
def test_subset_refuses_sizes_it_cannot_balance(nb, size):
    with pytest.raises(ValueError, match="size"):
        nb.balanced_subset(split(600), size, seed=0)


def test_subset_refuses_a_missing_class(nb):
    whole = split(200)
    without_nines = whole.take(torch.where(whole.labels != 9)[0])
    with pytest.raises(ValueError, match="every digit"):
        nb.balanced_subset(without_nines, 50, seed=0)


def test_paired_interval_is_the_t_interval(nb):
    differences = [0.5, -0.2, 0.9, 0.4, 0.1]
    mean, half = nb.paired_interval(differences)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(differences), scale=stats.sem(differences))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    with pytest.raises(ValueError, match="differences"):
        nb.paired_interval([1.0])


def test_comparison_takes_any_pair_and_gives_the_same_numbers_twice(nb, monkeypatch, tmp_path):
    pair = [
        utils.DigitData(f"toy {n}", split(200, seed=n), split(50, seed=9), False) for n in (0, 1)
    ]
    options = {
        "recipes": ("warp", "negatives"),  # one shrinks and trims, one does not
        "epochs": 2, "steps": 2, "batch_norm": "mixed",
    }  # fmt: skip
    first, histories = nb.compare_on_few(pair, 50, 0, watch=True, **options)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "again"))
    second, _ = nb.compare_on_few(pair, 50, 0, watch=True, **options)
    assert first == second
    assert set(histories) == {"single 0", "single 1", "multi"}
    assert len(histories["multi"].of_task("street").column("test_acc")) == 2


def test_comparison_takes_real_crops_that_cannot_be_balanced(nb, shared):
    stored = loadmat(shared / "SVHN_subset" / "train_first601.mat")
    images = torch.from_numpy(stored["X"].transpose(3, 2, 0, 1).copy())
    crops = utils.Split(images, torch.from_numpy(stored["y"].astype("int64").ravel() % 10)).gray()
    order = np.random.RandomState(0).permutation(len(crops))
    real = utils.DigitData("SVHN", crops.take(order[:500]), crops.take(order[500:]), True)
    assert min(real.train.counts()) < 50
    pair = [utils.DigitData("toy", split(600), split(50, seed=9), False), real]
    accuracies, _ = nb.compare_on_few(
        pair, 500, 0, recipes=("bold", "negatives"), epochs=1, steps=2, batch_norm="per domain"
    )
    assert all(0 <= value <= 100 for kind in accuracies.values() for value in kind)


def test_a_training_set_of_just_the_size_is_taken_whole(nb, monkeypatch):
    whole = split(200).take(torch.arange(200) % 7)  # digits 7 to 9 are missing
    seen = []

    def train_spy(train, *_, **__):
        seen.append(train)
        raise InterruptedError

    monkeypatch.setitem(nb.compare_on_few.__globals__, "train_single", train_spy)
    pair = [utils.DigitData("toy", whole, split(50), False)] * 2
    options = {"recipes": ("warp", "warp"), "epochs": 1, "steps": 1, "batch_norm": "mixed"}
    with pytest.raises(InterruptedError):
        nb.compare_on_few(pair, 200, 0, **options)
    assert torch.equal(seen[0].images, whole.images)
    with pytest.raises(ValueError, match="every digit"):
        nb.compare_on_few(pair, 100, 0, **options)


def test_recipe_is_chosen_without_the_test_split(nb, monkeypatch):
    seen = []

    def train_spy(train, test, recipe, **_):
        assert test is None
        seen.append(train)
        return recipe, None

    def score_spy(model, split):
        seen.append(split)
        return {"one-cycle": 90.0}.get(model, 50.0)

    monkeypatch.setitem(nb.choose_recipe.__globals__, "train_single", train_spy)
    monkeypatch.setitem(nb.choose_recipe.__globals__, "test_accuracy", score_spy)
    data = utils.DigitData("toy", split(200), split(50, seed=7), False)
    best, scores = nb.choose_recipe(data, 60, list(nb.RECIPES), epochs=1)
    assert best == "one-cycle" and set(scores) == set(nb.RECIPES)
    test_rows = {bytes(image.numpy().tobytes()) for image in data.test.images}
    for part in seen:
        assert not test_rows & {bytes(image.numpy().tobytes()) for image in part.images}
    fitted, held = seen[0], seen[1]
    assert not {bytes(i.numpy().tobytes()) for i in fitted.images} & {
        bytes(i.numpy().tobytes()) for i in held.images
    }
