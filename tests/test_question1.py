"""Question 1 (a) to (d): models, recipes, mixed batches, gradients, subsets, comparisons."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from torch import nn

import utils

CPU = torch.device("cpu")
KINDS = ("mixed", "per domain", "separate passes")


def split(count, size=32, seed=0):
    return noise_split(utils, count, size, seed=seed)


def rows(part):
    """Every image of a split as bytes."""
    return [image.numpy().tobytes() for image in part.images]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- models ----


def starter_trunk():
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def test_base_cnn_is_the_starters(nb):
    ours, starter = nb.base_trunk(), starter_trunk()
    assert repr(ours) == repr(starter)  # the same layers in the same order
    starter.load_state_dict(ours.state_dict())
    for size in (18, 28, 32):
        images = torch.randn(4, 1, size, size)
        assert torch.equal(ours(images), starter(images)) and ours(images).shape == (4, 64)
    convolutions = 32 * 25 + 32 + 64 * 32 * 25 + 64 + 64 * 64 * 9 + 64
    expected = convolutions + 2 * (32 + 64 + 64) + 64 * 64 + 64 + 64 * 10 + 10
    assert sum(p.numel() for p in nb.classifier().parameters()) == expected


def test_head_has_one_hidden_layer(nb):
    assert [type(layer) for layer in nb.task_head()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert nb.classifier()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [0, 1])
def test_one_tasks_gradient_leaves_the_other_head_and_reaches_the_trunk(nb, kind, task):
    model = nb.TwoHeads(kind, [nb.Recipe(), nb.Recipe()])
    scores = model(torch.randn(8, 1, 32, 32), torch.randn(8, 1, 32, 32))
    assert [s.shape for s in scores] == [(8, 10), (8, 10)]
    F.cross_entropy(scores[task], torch.arange(8)).backward()
    assert all(p.grad is None for p in model.heads[1 - task].parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.heads[task].parameters())
    assert model.trunk[0].weight.grad.abs().sum() > 0


def trained_two_heads(nb, kind):
    """A two-head model whose two domains have clearly different statistics."""
    torch.manual_seed(1)
    model = nb.TwoHeads(kind, [nb.Recipe(), replace(nb.Recipe(), standardize=True)])
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
    with torch.no_grad():
        for _ in range(20):
            model(2 * torch.randn(8, 1, 32, 32) + 1, 0.1 * torch.randn(8, 1, 32, 32) - 1)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_of_one_task_is_its_part_of_the_joint_model(nb, kind):
    """With per-domain statistics each task has the batch norms of its own domain."""
    model = trained_two_heads(nb, kind)
    halves = torch.randn(4, 1, 32, 32), torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        for number, scores in enumerate(model(*halves)):
            alone = model.task(number)
            assert not alone[0].training
            assert torch.allclose(scores, alone(halves[number]), atol=1e-5)
            others = model.task(1 - number)(halves[number])
            assert not torch.allclose(scores, others, atol=1e-2)
    with pytest.raises(ValueError, match="batch_norm"):
        nb.TwoHeads("none", [nb.Recipe()] * 2)


def test_domain_batch_norm_keeps_statistics_per_domain(nb):
    layer = nb.DomainBatchNorm2d(3)
    halves = torch.randn(6, 3, 4, 4) + 5, 3 * torch.randn(6, 3, 4, 4) - 5
    joined = layer(torch.cat(halves))
    for norm, half, out in zip(layer.norms, halves, joined.chunk(2), strict=True):
        reference = nn.BatchNorm2d(3)
        assert torch.allclose(reference(half), out, atol=1e-6)
        assert torch.allclose(reference.running_mean, norm.running_mean)
        assert torch.allclose(reference.running_var, norm.running_var)
    domains = [m for m in nb.TwoHeads("per domain", [nb.Recipe()] * 2).modules()
               if isinstance(m, nb.DomainBatchNorm2d)]  # fmt: skip
    assert [d.norms[0].num_features for d in domains] == [32, 64, 64]


@pytest.mark.parametrize("kind", ["mixed", "separate passes"])
def test_statistics_of_one_pass_and_of_two(nb, kind):
    """Mixed: one update by both halves together. Separate passes: one update by each half."""
    model = nb.TwoHeads(kind, [nb.Recipe()] * 2)
    halves = torch.randn(8, 1, 32, 32), torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        model(*halves)
        convolved = model.trunk[0](torch.cat(halves))
    norm = model.trunk[1]
    assert norm.num_batches_tracked == (1 if kind == "mixed" else 2)
    if kind == "mixed":
        assert torch.allclose(norm.running_mean, 0.1 * convolved.mean((0, 2, 3)), atol=1e-6)


# ---- gray, padded ----


def test_gray_uses_the_itu_601_weights_as_pillow_does(nb):
    images = noise_split(utils, 40, 32, channels=3)
    gray = nb.gray(images)
    assert gray.images.shape == (40, 1, 32, 32) and gray.images.dtype == torch.uint8
    for color, ours in zip(images.images[:5], gray.images[:5], strict=True):
        pillow = np.asarray(Image.fromarray(color.permute(1, 2, 0).numpy()).convert("L"))
        assert np.abs(pillow.astype(int) - ours[0].numpy()).max() <= 1
    assert nb.gray(split(40, 28)).images.shape == (40, 1, 28, 28)


def test_padding_keeps_the_image_in_the_middle(nb):
    part = split(40, 28)
    padded = utils.DigitData("toy", part, part, real=False).map(nb.padded).test
    assert torch.equal(padded.images[:, :, 2:30, 2:30], part.images)
    assert int(padded.images.sum()) == int(part.images.sum())
    assert padded.counts() == [4] * 10
    with pytest.raises(ValueError, match="size"):
        nb.padded(part, 20)


# ---- recipes and preprocessing ----


def test_each_recipe_adds_to_the_one_before_and_none_changes_the_network(nb):
    recipes = [vars(recipe) for recipe in nb.RECIPES.values()]
    assert list(nb.RECIPES)[0] == "suggested" and recipes[0] == vars(nb.Recipe())
    assert nb.Recipe().lr == 1e-3 and nb.Recipe().schedule == "constant"
    assert not any(list(vars(nb.Recipe()).values())[2:])  # plain: nothing else is on
    for before, after in pairwise(recipes):
        assert before != after
        assert all(after[field] for field in after if before[field])  # nothing is taken away


@pytest.mark.parametrize("size", [28, 32])
def test_preprocessing_sizes_and_statistics(nb, size):
    images = 5 + 3 * torch.rand(4, 1, size, size)
    assert torch.equal(nb.preprocessing(nb.Recipe())(images), images)
    small = nb.preprocessing(replace(nb.Recipe(), side=24))(images)
    assert small.shape == (4, 1, 24, 24) and abs(small.mean() - images.mean()) < 0.02
    level = torch.full_like(images, 0.3)
    assert torch.allclose(
        nb.preprocessing(replace(nb.Recipe(), side=24))(level), level[..., :24, :24]
    )
    standard = nb.preprocessing(replace(nb.Recipe(), side=24, standardize=True))
    for mode in (standard.train(), standard.eval()):
        out = mode(images)
        assert torch.allclose(out.mean((1, 2, 3)), torch.zeros(4), atol=1e-5)
        assert torch.allclose(out.std((1, 2, 3), correction=0), torch.ones(4), atol=1e-3)
    assert not list(standard.parameters())


def test_both_halves_enter_at_the_size_of_their_recipes(nb):
    for name in list(nb.RECIPES):
        recipe = nb.RECIPES[name]
        model = nb.TwoHeads("mixed", [recipe, recipe])
        scores = model(torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32))
        assert [s.shape for s in scores] == [(2, 10), (2, 10)]
        side = recipe.side or 32
        assert model.preprocessing[0](torch.rand(2, 1, 28, 28)).shape[-1] == (recipe.side or 28)
        assert model.preprocessing[1](torch.rand(2, 1, 32, 32)).shape[-1] == side


# ---- augmentation ----


def blob(size=33):
    """A smooth image without symmetry, in -1..1, dark at its border."""
    image = np.zeros((size, size), np.float32)
    middle = size // 2
    image[middle - 9 : middle + 3, middle - 1 : middle + 3] = 1
    image[middle : middle + 3, middle - 1 : middle + 9] = 1
    image = ndimage.gaussian_filter(image, 1.5)
    return torch.from_numpy(2 * image / image.max() - 1)[None, None]


def transformed(image, matrix, shift=(0.0, 0.0)):
    """Reference: output(p) = input(matrix (p - middle) + middle + shift), p = (x, y) in pixels."""
    array = image[0, 0].numpy()
    middle = (np.array(array.shape) - 1) / 2
    flipped = np.asarray(matrix)[::-1, ::-1]  # SciPy has (row, column)
    offset = middle - flipped @ middle + np.asarray(shift)[::-1]
    return torch.from_numpy(ndimage.affine_transform(array, flipped, offset, order=1, cval=-1.0))


def draws(seed, bound):
    """The first uniform number that a generator of this seed gives, between -bound and bound."""
    return (torch.rand(1, generator=seeded(seed)).item() * 2 - 1) * bound


OFF = {"degrees": 0.0, "shift": 0.0, "zoom": 0.0, "shear": 0.0}


@pytest.mark.parametrize("seed", [1, 2, 3, 5])
def test_affine_really_rotates(nb, seed):
    """By the angle that was drawn, in its direction, without stretching."""
    image, angle = blob(), draws(seed, math.radians(60))
    assert abs(angle) > 0.1
    moved = nb.random_affine(image, seeded(seed), **OFF | {"degrees": 60})[0, 0]
    cos, sin = math.cos(angle), math.sin(angle)
    expected = transformed(image, [[cos, -sin], [sin, cos]])
    assert (moved - expected).abs().max() < 0.02
    assert (moved - transformed(image, [[cos, sin], [-sin, cos]])).abs().max() > 0.5
    assert (moved + 1).sum() == pytest.approx((image + 1).sum().item(), rel=0.02)  # same area


def test_affine_shifts_zooms_and_shears_within_their_bounds(nb):
    image = blob().expand(400, 1, 33, 33)
    grid = torch.arange(33.0) - 16

    def moments(**bounds):
        mass = nb.random_affine(image, seeded(), **OFF | bounds)[:, 0] + 1
        mass = mass / mass.sum((1, 2), keepdim=True)
        x, y = (mass.sum(1) * grid).sum(1), (mass.sum(2) * grid).sum(1)
        dx, dy = grid[None, None, :] - x[:, None, None], grid[None, :, None] - y[:, None, None]
        return [x, y] + [(mass * a * b).sum((1, 2)) for a, b in ((dx, dx), (dy, dy), (dx, dy))]

    x, y, xx, yy, xy = moments()  # nothing moves
    assert all(part.std() < 1e-4 for part in (x, y, xx, yy, xy))
    for place, still in zip(moments(shift=0.1)[:2], (x, y), strict=True):  # 0.1 of 33 pixels
        moved = place - still
        assert moved.abs().max() <= 3.35 and moved.max() > 3 and moved.min() < -3
        assert abs(moved.mean()) < 0.3
    new = moments(zoom=0.2)
    for spread, still in ((new[2], xx), (new[3], yy)):
        scale = (still / spread).sqrt()  # the grid is scaled, so the image by the inverse
        assert scale.max() < 1.23 and scale.min() > 0.79
        assert scale.max() > 1.15 and scale.min() < 0.85
    assert torch.corrcoef(torch.stack([new[2], new[3]]))[0, 1].abs() < 0.2  # independent
    new = moments(shear=0.2)
    assert torch.allclose(new[3], yy, rtol=0.03)  # y stays
    slope = (new[4] - xy) / yy  # x moves in proportion to y
    assert slope.abs().max() < 0.22 and slope.max() > 0.15 and slope.min() < -0.15


def test_affine_refuses_bad_input_and_keeps_the_range(nb):
    image = blob()
    for bad in ({"zoom": 1.0}, {"zoom": -0.1}, {"degrees": -1.0}, {"shift": math.nan},
                {"shear": math.inf}):  # fmt: skip
        with pytest.raises(ValueError, match=list(bad)[0]):
            nb.random_affine(image, seeded(), **OFF | bad)
    for images in (image.to(torch.uint8), image[0]):
        with pytest.raises(ValueError, match="images"):
            nb.random_affine(images, seeded())
    color = torch.rand(5, 3, 20, 24)
    moved = nb.random_affine(color, seeded(), degrees=30, shift=0.3, zoom=0.3, shear=0.3)
    assert moved.shape == color.shape
    assert color.min() - 1e-5 <= moved.min() and moved.max() <= color.max() + 1e-5
    again = nb.random_affine(color, seeded(), degrees=30, shift=0.3, zoom=0.3, shear=0.3)
    assert torch.equal(moved, again)
    assert not torch.equal(moved, nb.random_affine(color, seeded(1)))


@pytest.mark.parametrize("size", [1, 4, 8])
def test_erase_paints_one_square_in_the_images_mean(nb, size):
    images = torch.randn(1000, 1, 10, 12)
    erased = nb.random_erase(images, seeded(), size)
    changed = erased != images
    means = images.mean((1, 2, 3), keepdim=True).expand_as(images)
    assert torch.equal(erased[changed], means[changed])
    areas = changed.sum((1, 2, 3))
    assert areas.max() == size * size and areas.min() >= (size // 2) ** 2 and areas.min() > 0
    for one in changed[:, 0]:
        down, right = one.any(1).nonzero(), one.any(0).nonzero()
        height, width = (int(part.max() - part.min()) + 1 for part in (down, right))
        assert max(height, width) <= size and one.sum() == height * width
    assert changed.any(0).float().mean() > 0.99  # anywhere
    with pytest.raises(ValueError, match="size"):
        nb.random_erase(images, seeded(), 0)


def test_half_of_the_images_become_negatives(nb):
    images = torch.rand(1000, 1, 4, 4) + 0.1
    changed = nb.random_negative(images, seeded())
    assert torch.equal(changed.abs(), images)
    signs = changed.sign().mean((1, 2, 3))
    assert set(signs.tolist()) == {-1.0, 1.0} and 400 < (signs < 0).sum() < 600


def test_tones_are_bent_both_ways_and_edges_blurred_or_sharpened(nb):
    image = torch.zeros(1, 1, 20, 30)
    image[..., :10], image[..., 20:] = -0.8, 0.8  # three flat parts: dark, middle, bright
    changed = nb.random_tones(image.expand(400, 1, 20, 30).contiguous(), seeded())
    flat = changed[:, 0, 10, [5, 15, 25]]  # away from edges only the gamma acts
    assert changed.min() >= -1 and changed.max() <= 1
    gamma = ((flat[:, 1] + 1) / 2).log2().neg()
    assert 0.58 < gamma.min() < 0.65 and 1.55 < gamma.max() < 1.7
    assert 0.4 < (gamma < 1).float().mean() < 0.6  # as often brighter as darker
    edge = (changed[:, 0, 10, 10] - flat[:, 1]) / (flat[:, 1] - flat[:, 0])
    assert edge.min() < -0.05 and edge.max() > 0.05
    assert torch.equal(changed[:9], nb.random_tones(image.expand(400, 1, 20, 30), seeded())[:9])


def test_a_recipes_changes_are_all_applied_and_nothing_else(nb):
    images = torch.rand(64, 1, 28, 28) * 2 - 1
    assert nb.augment(nb.Recipe(), images, seeded()) is images
    for change in ({"affine": (10, 0.1, 0.1, 0.1)}, {"erase": 6}, {"negatives": True},
                   {"tones": True}):  # fmt: skip
        changed = nb.augment(replace(nb.Recipe(), **change), images, seeded())
        assert changed.shape == images.shape and not torch.equal(changed, images)
    recipe = replace(nb.Recipe(), affine=(10, 0.2, 0.0, 0.0))
    expected = nb.random_affine(images, seeded(), degrees=10, shift=0.2, zoom=0, shear=0)
    assert torch.equal(nb.augment(recipe, images, seeded()), expected)


# ---- batches ----


def marked(count):
    """A split whose first pixel is the image's number, and its label the last digit of that."""
    images = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    return utils.Split(images, torch.arange(count) % 10)


def marks(images):
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long()


def test_floats_are_the_starters_normalization(nb):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.allclose(utils.to_float(pixels), (pixels / 255 - 0.5) / 0.5, atol=1e-6)
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    with pytest.raises(ValueError, match="uint8"):
        utils.to_float(pixels.float())


@pytest.mark.parametrize("size, steps", [(200, 3), (200, 4), (100, 5), (64, 4), (65, 9), (30, 2)])
def test_batches_are_full_shuffled_and_see_every_image_equally_often(nb, size, steps):
    loader = nb.Loader(marked(size), 64, device=CPU)
    batches = list(nb.one_epoch(loader, steps, epoch=3))
    assert len(batches) == steps and all(len(x) == len(y) == 64 for x, y in batches)
    for images, labels in batches:  # labels stay with their images
        assert labels.dtype == torch.int64 and torch.equal(labels, marks(images) % 10)
    seen = torch.cat([marks(images) for images, _ in batches])
    counts = torch.bincount(seen, minlength=size)
    assert counts.max() - counts.min() <= 1 and counts.sum() == 64 * steps
    assert not torch.equal(seen, seen.sort().values)
    again = torch.cat([marks(images) for images, _ in nb.one_epoch(loader, steps, epoch=3)])
    other = torch.cat([marks(images) for images, _ in nb.one_epoch(loader, steps, epoch=4)])
    assert torch.equal(seen, again) and not torch.equal(seen, other)


def watched_batches(monkeypatch, nb, call):
    """What `call` hands to utils.fit: its keyword arguments and the batches of epoch 0."""

    class Stop(Exception):
        pass

    seen = []

    def fit(train_epoch, model, batches, loss_fn, **options):
        seen.append((model, list(batches(0)), loss_fn, options))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(utils, "fit", fit)
        with pytest.raises(Stop):
            call()
    return seen[0]


def test_multi_task_batches_are_64_and_64_and_each_half_has_its_own_labels(nb, monkeypatch):
    street = marked(200)
    street = utils.Split(255 - street.images, (street.labels + 3) % 10)  # told from the digits
    recipes = {"one": replace(nb.Recipe(), smoothing=0.1),
               "two": replace(nb.Recipe(), lr=2e-3, smoothing=0.2, weight_decay=0.3,
                              schedule="onecycle")}  # fmt: skip
    for name, recipe in recipes.items():
        monkeypatch.setitem(nb.RECIPES, name, recipe)
    model, batches, loss, options = watched_batches(
        monkeypatch, nb,
        lambda: nb.train_multi([marked(200), street], None, ["one", "two"], epochs=7, steps=5,
                               run="x", batch_norm="per domain", seed=4),
    )  # fmt: skip
    assert isinstance(model, nb.TwoHeads) and model.batch_norm == "per domain"
    assert len(batches) == options["steps_per_epoch"] == 5 and options["epochs"] == 7
    orders = []
    for (digits, digit_labels), (streets, street_labels) in batches:
        assert len(digits) == len(digit_labels) == len(streets) == len(street_labels) == 64
        assert torch.equal(digit_labels, marks(digits) % 10)
        street_marks = 255 - marks(streets)
        assert torch.equal(street_labels, (street_marks + 3) % 10)
        orders.append((marks(digits), street_marks))
    assert not torch.equal(*orders[0])  # the two halves are in orders of their own
    assert loss.keywords["smoothing"] == (0.1, 0.2)
    assert (options["lr"], options["weight_decay"], options["schedule"]) == (2e-3, 0.3, "onecycle")
    assert options["seed"] == 4 and options["evaluate"] is None


def test_single_task_training_uses_its_recipe(nb, monkeypatch):
    recipe = replace(nb.Recipe(), lr=3e-3, schedule="onecycle", weight_decay=0.2, smoothing=0.1,
                     tones=True, side=20)  # fmt: skip
    monkeypatch.setitem(nb.RECIPES, "tried", recipe)
    model, batches, loss, options = watched_batches(
        monkeypatch, nb,
        lambda: nb.train_single(marked(250), marked(10), "tried", epochs=2, run="x", seed=3),
    )  # fmt: skip
    assert len(batches) == 1 and len(batches[0][1]) == 128  # 250 images fill one batch of 128
    assert model[0].side == 20 and loss.keywords["smoothing"] == 0.1
    assert {name: options[name] for name in ("lr", "schedule", "weight_decay", "seed")} == {
        "lr": 3e-3, "schedule": "onecycle", "weight_decay": 0.2, "seed": 3}  # fmt: skip
    assert set(options["evaluate"](model)) == {"test_cross_entropy", "test_acc"}


def test_loaders_of_trainings_augment_by_their_recipe(nb):
    recipe = replace(nb.Recipe(), affine=(10, 0.1, 0.1, 0.1), negatives=True)
    index = torch.arange(20)
    plain, _ = nb.make_loader(split(40), nb.Recipe(), 8, 0).batch(index, seeded())
    assert torch.equal(plain, utils.to_float(split(40).images[:20]))
    augmented, labels = nb.make_loader(split(40), recipe, 8, 0).batch(index, seeded())
    assert torch.equal(augmented, nb.augment(recipe, plain, seeded()))
    assert not torch.equal(augmented, plain) and torch.equal(labels, split(40).labels[:20])


# ---- losses ----


def test_classification_loss_equals_torchs(nb):
    logits, labels = torch.randn(6, 10, requires_grad=True), torch.arange(6)
    for smoothing in (0.0, 0.1):
        target = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
        loss, figures = nb.classification_loss(nn.Identity(), (logits, labels), smoothing)
        assert torch.allclose(loss, expected) and loss.requires_grad
        assert torch.allclose(figures["cross_entropy"], F.cross_entropy(logits, labels))
        assert figures["acc"] == 100 * (logits.argmax(1) == labels).float().mean()
        assert not any(value.requires_grad for value in figures.values())


def test_multi_task_loss_is_the_mean_of_both(nb):
    one, two = torch.randn(6, 10), torch.randn(6, 10)
    labels = torch.arange(6), torch.arange(6).flip(0)
    loss, figures = nb.multi_task_loss(
        lambda *halves: halves, ((one, labels[0]), (two, labels[1])), (0.1, 0.0)
    )
    parts = [F.cross_entropy(one, labels[0], label_smoothing=0.1), F.cross_entropy(two, labels[1])]
    assert torch.allclose(loss, sum(parts) / 2)
    for role, logits, own in (("handwritten", one, labels[0]), ("street", two, labels[1])):
        assert torch.allclose(figures[f"cross_entropy_{role}"], F.cross_entropy(logits, own))
        assert figures[f"acc_{role}"] == 100 * (logits.argmax(1) == own).float().mean()


# ---- the small trainings ----


def patterns(count, seed):
    """Images of ten fixed patterns with noise, and their labels: easy to learn."""
    known = torch.randint(0, 2, (10, 1, 18, 18), generator=seeded(seed)) * 200
    noise = torch.randint(0, 56, (count, 1, 18, 18), generator=seeded(seed + 100))
    labels = torch.arange(count) % 10
    return utils.Split((known[labels] + noise).to(torch.uint8), labels)


def test_a_single_task_training_learns_and_is_measured(nb):
    data = patterns(384, seed=0)
    train, test = data.take(torch.arange(256)), data.take(torch.arange(256, 384))
    model, history = nb.train_single(train, test, "one-cycle", epochs=3, run="x", batch_size=16)
    assert history[-1]["test_acc"] == nb.test_accuracy(model, test) > 95
    direct = F.cross_entropy(utils.predict(model, test), test.labels).item()
    assert history[-1]["test_cross_entropy"] == pytest.approx(direct, abs=1e-6)
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_a_multi_task_training_learns_both_and_watches_both(nb):
    parts = [patterns(384, seed) for seed in range(2)]
    train = [part.take(torch.arange(256)) for part in parts]
    test = [part.take(torch.arange(256, 384)) for part in parts]
    model, history = nb.train_multi(
        train, test, ["one-cycle", "one-cycle"], epochs=4, steps=8, run="x",
        batch_norm="per domain",
    )  # fmt: skip
    for number, role in enumerate(("handwritten", "street")):
        accuracy = nb.test_accuracy(model.task(number), test[number])
        assert nb.of_task(history, role)[-1]["test_acc"] == accuracy > 90
        assert nb.test_accuracy(model.task(1 - number), test[number]) < 60


def test_few_samples_single_and_multi_see_the_same_images_and_all_of_them(nb, monkeypatch):
    data = [
        utils.DigitData(f"toy {n}", split(200, seed=n), split(50, seed=9 + n), False)
        for n in range(2)
    ]
    seen = {}

    def train_single(train, test, name, **options):
        seen["single", name] = train, test, options
        return "model", "history"

    def train_multi(train, test, names, **options):
        seen["multi"] = train, test, options

        class Model:
            def task(self, number):
                return f"task {number}"

        return Model(), "history"

    def test_accuracy(model, part):
        seen.setdefault("scored", []).append((model, rows(part)))
        return 50.0

    space = nb.few_samples.__globals__
    for name, spy in [("train_single", train_single), ("train_multi", train_multi),
                      ("test_accuracy", test_accuracy)]:  # fmt: skip
        monkeypatch.setitem(space, name, spy)
    options = {"epochs": 3, "steps": 2, "batch_norm": "mixed"}
    for kind in ("multi", "0", "1"):
        nb.few_samples(data, 50, 4, kind, ["first", "second"], **options)
    multi = seen["multi"][0]
    assert [len(part) for part in multi] == [50, 50] and seen["multi"][1] is None
    for number, name in enumerate(("first", "second")):
        single = seen["single", name]
        assert rows(single[0]) == rows(multi[number])
        assert rows(single[0]) == rows(nb.balanced_subset(data[number].train, 50, 4))
        assert single[2]["seed"] == seen["multi"][2]["seed"] == 4
        assert single[2]["epochs"] == 3 and single[2]["steps"] == 2
    assert seen["scored"] == [
        ("task 0", rows(data[0].test)), ("task 1", rows(data[1].test)),
        ("model", rows(data[0].test)), ("model", rows(data[1].test)),
    ]  # fmt: skip


# ---- subsets and model selection ----


def test_subsets_are_those_of_the_testbed_balanced_and_without_repetition(nb):
    train = split(600)
    train = train.take(np.random.RandomState(9).permutation(600))
    subset = nb.balanced_subset(train, 500, seed=4)
    assert subset.counts() == [50] * 10 and len(subset) == 500
    assert len(set(rows(subset))) == 500 and set(rows(subset)) <= set(rows(train))
    whole = dict(zip(rows(train), train.labels.tolist(), strict=True))
    assert [whole[row] for row in rows(subset)] == subset.labels.tolist()
    assert torch.equal(subset.images, nb.balanced_subset(train, 500, seed=4).images)
    assert Counter(rows(subset)) != Counter(rows(nb.balanced_subset(train, 500, seed=5)))
    picked, order = [], np.random.RandomState(4).permutation(600)
    for digit in range(10):  # the first 50 of each digit in the seed's permutation
        picked += [i for i in order if train.labels[i] == digit][:50]
    assert rows(subset) == rows(train.take(picked))


@settings(max_examples=50, deadline=None)
@given(st.integers(-20, 60), st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1))
def test_subsets_are_balanced_or_refused(nb, size, seed, digits):
    labels = torch.tensor(digits * 3)
    part = utils.Split(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels)
    if size < 10 or size % 10 or min(part.counts()) < size // 10:
        with pytest.raises(ValueError, match="size|every digit"):
            nb.balanced_subset(part, size, seed)
    else:
        assert nb.balanced_subset(part, size, seed).counts() == [size // 10] * 10


def test_what_is_held_back_is_not_trained_on(nb):
    whole = split(300)
    fit_on, held_out = nb.hold_back(whole)
    assert len(held_out) == 100 and len(fit_on) == 200
    assert Counter(rows(fit_on)) + Counter(rows(held_out)) == Counter(rows(whole))
    labels = dict(zip(rows(whole), whole.labels.tolist(), strict=True))
    for part in (fit_on, held_out):
        assert [labels[row] for row in rows(part)] == part.labels.tolist()


def test_training_and_test_images_are_trimmed_and_resampled_alike(nb):
    """Training images before the training, test images in the model: the same numbers."""
    recipe = replace(nb.Recipe(), side=24, trim=0.25)
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    images[0, :, :, 4:28] = torch.arange(0, 240, 10, dtype=torch.uint8)
    images[1, :, :, :4], images[1, :, :, 28:] = 255, 255  # outside of the middle 24 columns
    split = utils.Split(images, torch.tensor([0, 1]))
    before = nb.resampled(split, recipe).images
    (inside,) = nb.preprocessing(recipe)
    within = inside(images.float())
    assert before.shape == (2, 1, 24, 24) and before[1].max() == 0
    assert (before.float() - within).abs().max() <= 0.5
    assert within[0, 0, 5].tolist() == pytest.approx(range(0, 240, 10), abs=1e-3)
    assert torch.equal(inside(before.float()), before.float())  # not twice


def test_a_recipe_is_validated_without_the_test_set(nb, monkeypatch):
    seen = {}

    def train_single(train, test, name, **options):
        seen.update(train=train, test=test, name=name, options=options)
        return "model", None

    space = nb.validated.__globals__
    monkeypatch.setitem(space, "train_single", train_single)
    monkeypatch.setitem(space, "test_accuracy", lambda model, part: (model, part))
    fit_on, held_out = nb.hold_back(split(90))
    assert nb.validated(fit_on, held_out, "bold", epochs=3) == ("model", held_out)
    assert seen["train"] is fit_on and seen["test"] is None and seen["name"] == "bold"
    assert seen["options"]["epochs"] == 3


def test_the_best_of_each_role_is_chosen(nb):
    scores = {("a", "x"): 1.0, ("b", "x"): 5.0, ("a", "y"): 3.0, ("b", "y"): 4.0, ("a", "z"): 2.0}
    assert nb.best_by_role(scores) == {"a": "y", "b": "x"}


def test_no_selection_in_the_notebook_reads_a_test_set(nb):
    """The cells that choose (recipe, batch norm, variant) use no test split before they chose."""
    from conftest import ROOT, nbformat

    text = (ROOT / "assignment3.ipynb").read_text(encoding="utf-8")
    cells = [c.source for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "code"]
    choosing = [c for c in cells if "chosen = best_by_role" in c or "norm_scores = " in c]
    assert len(choosing) >= 2
    for source in choosing:
        before = source.split("best_by_role")[0].split("batch_norm = max")[0]
        assert "held" in before and ".test" not in before


# ---- comparisons ----


def test_paired_interval_is_scipys_t_interval(nb):
    differences = [0.5, -0.2, 0.9, 0.4, 0.1]
    mean, half = nb.paired_interval(differences)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(differences), scale=stats.sem(differences))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    test = stats.ttest_rel(differences, [0.0] * 5)
    assert (abs(mean) > half) == (test.pvalue < 0.05)
    with pytest.raises(ValueError, match="differences"):
        nb.paired_interval([1.0])


@settings(max_examples=100, deadline=None)
@given(st.floats(-5, 5), st.floats(0, 5))
def test_words_for_a_difference_agree_with_its_numbers(nb, mean, half):
    words = nb.difference_words("ours", mean, half, "theirs")
    assert f"{nb.signed(mean)} ± {half:.2f} points" in words and "-" not in nb.signed(mean)
    assert "ours" in words and "theirs" in words
    better, worse = ("better" in words or "above" in words), ("worse" in words or "below" in words)
    assert better == (mean > half) and worse == (-mean > half)


def test_confident_mistakes_are_wrong_and_sorted(nb):
    labels = torch.tensor([0, 1, 2, 3])
    part = utils.Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), labels)
    logits = torch.zeros(4, 10)
    logits[0, 0], logits[1, 5], logits[2, 6], logits[3, 3] = 3, 1, 2, 9
    index, guess, probability = nb.confident_mistakes(lambda x: logits, part, 5)
    assert index.tolist() == [2, 1] and guess.tolist() == [6, 5]
    assert torch.allclose(probability, logits.softmax(1).max(1).values[[2, 1]])
    assert len(nb.confident_mistakes(lambda x: logits, part, 1)[0]) == 1


def test_curves_show_errors_of_both_parts_on_one_axes_per_data_set(nb, monkeypatch):
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(
        utils, "save_figure", lambda figure, name, caption, **_: kept.append(figure)
    )
    history = [
        {"epoch": n, "seconds": 1, "train_cross_entropy": 1 / n, "train_acc": 90.0 + n,
         "test_cross_entropy": 2 / n, "test_acc": 80.0 + n} for n in (1, 2, 3)
    ]  # fmt: skip
    panels = {"MNIST": {"suggested": history, "ours": history}, "SVHN": {"ours": history}}
    nb.plot_curves(panels, "x", "A caption.")
    (figure,) = kept
    rows_of_axes = np.array(figure.axes).reshape(2, 2)
    assert [row[0].get_title() for row in rows_of_axes] == ["MNIST", "SVHN"]
    lines = rows_of_axes[1, 1].lines[:2]
    assert sorted(list(line.get_ydata()) for line in lines) == [[9, 8, 7], [19, 18, 17]]
    styles = {line.get_linestyle() for line in lines}
    assert len(styles) == 2  # training and test differ in gray too
    plt.close(figure)


def test_comparing_twice_gives_the_same_numbers(nb, monkeypatch, tmp_path):
    pair = [
        utils.DigitData(f"toy {n}", split(200, seed=n), split(50, seed=9), False) for n in (0, 1)
    ]
    call = partial(nb.few_samples, pair, 50, 0, "multi", ["bold", "negatives"], epochs=2, steps=2,
                   batch_norm="mixed", watch=True)  # fmt: skip
    first, history = call()
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "again"))
    torch.manual_seed(77)
    assert call()[0] == first and len(nb.of_task(history, "street")) == 2
