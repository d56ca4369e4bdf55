"""Question 1: what happens to the pixels before they reach a network."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import noise_split, seeded

import utils


def noise(count=64, size=24):
    return torch.rand(count, 1, size, size, generator=seeded(1)) * 2 - 1


def test_gray_has_the_rounded_itu_601_luma_of_each_image_and_its_label(nb):
    rgb = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30]]
    luma = torch.tensor([76, 150, 29, 255, 18])  # of 76.2, 149.7, 29.1, 255, 18.2
    labels = torch.arange(5).repeat(1000)
    colors = torch.tensor(rgb, dtype=torch.uint8)[labels].view(5000, 3, 1, 1)
    gray = nb.gray(utils.Split(colors, labels))
    assert (gray.images.shape, gray.images.dtype) == ((5000, 1, 1, 1), torch.uint8)
    assert torch.equal(gray.images.flatten().long(), luma[labels])
    assert torch.equal(gray.labels, labels)


def test_padding_puts_zeros_around_the_middle_and_keeps_the_labels(nb):
    split = noise_split(20, 28)
    padded = nb.pad_to(split)
    assert torch.equal(padded.images, F.pad(split.images, (2, 2, 2, 2)))
    assert torch.equal(padded.labels, split.labels)


def test_affine_is_torchs_grid_of_a_rotation_shift_zoom_and_shear_of_each_images_own(nb):
    """Shear first, then rotation, then zoom; a shift of 1 is half of torch's grid."""
    images, generator = noise(), seeded()
    limits = (math.radians(30), 0.3, 0.2, 0.2, 0.1, 0.1)  # in the order in which they are drawn
    numbers = [(2 * torch.rand(64, generator=generator) - 1) * limit for limit in limits]
    angle, slant, wide, tall, right, down = numbers
    zero, one = torch.zeros(64), torch.ones(64)

    def matrix(*values):
        return torch.stack(values, 1).view(64, 2, 2)

    rotation = matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    zoom, shear = matrix(1 + wide, zero, zero, 1 + tall), matrix(one, slant, zero, one)
    shift = 2 * torch.stack([right, down], 1)[:, :, None]
    theta = torch.cat([zoom @ rotation @ shear, shift], 2)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    moved = nb.random_affine(images, seeded(), (30, 0.1, 0.2, 0.3))
    assert torch.allclose(moved, expected, atol=1e-4)


@pytest.mark.parametrize("size", [1, 6])
def test_erase_paints_one_square_of_each_image_in_its_own_mean(nb, size):
    images = torch.randn(1000, 1, 10, 12, generator=seeded())
    erased = nb.random_erase(images, seeded(), size)
    changed = erased != images
    means = images.mean((1, 2, 3), keepdim=True).expand_as(images)
    assert torch.equal(erased[changed], means[changed])
    height, width = changed.any(3).sum((1, 2)), changed.any(2).sum((1, 2))
    assert torch.equal(changed.sum((1, 2, 3)), height * width)  # a full rectangle
    assert (int(height.max()), int(width.max())) == (size, size)
    assert min(height.min(), width.min()) >= max(1, size // 2)  # borders cut at most half
    assert len(changed.flatten(1).unique(dim=0)) > 50  # at a place of its own


def test_half_of_the_images_become_their_negatives(nb):
    images = torch.rand(1000, 1, 4, 4) + 0.1
    signs = nb.random_invert(images, seeded()) / images
    assert torch.equal(signs, signs[:, :, :1, :1].expand_as(signs))
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert 400 < (signs[:, 0, 0, 0] < 0).sum() < 600


def test_tones_are_bent_both_ways_and_edges_blurred_or_sharpened(nb):
    image = torch.zeros(1, 1, 20, 30)
    image[..., :10], image[..., 20:] = -0.8, 0.8  # three flat parts: dark, middle, bright
    changed = nb.random_tones(image.expand(400, 1, 20, 30), seeded())
    flat = changed[:, 0, 10, [5, 15, 25]]  # away from edges only the gamma acts
    assert changed.min() >= -1
    assert changed.max() <= 1
    gamma = ((flat[:, 1] + 1) / 2).log2().neg()
    assert 0.58 < gamma.min() < 0.65
    assert 1.55 < gamma.max() < 1.7
    assert 0.4 < (gamma < 1).float().mean() < 0.6  # as often brighter as darker
    edge = (changed[:, 0, 10, 10] - flat[:, 1]) / (flat[:, 1] - flat[:, 0])
    assert edge.min() < -0.05
    assert edge.max() > 0.05


def test_augment_applies_what_the_recipe_says_and_nothing_else(nb):
    images = noise()
    assert nb.augment(images, seeded(), nb.TUNED) is images
    generator = seeded()
    expected = nb.random_affine(images, generator, (15, 0.1, 0.2, 0.3))
    expected = nb.random_erase(expected, generator, 5)
    expected = nb.random_tones(expected, generator)
    expected = nb.random_invert(expected, generator)
    recipe = nb.Recipe(warp=(15, 0.1, 0.2, 0.3), erase=5, tones=True, invert=True)
    assert torch.equal(nb.augment(images, seeded(), recipe), expected)


def test_the_baseline_is_the_suggestion_and_nothing_else_is_on(nb):
    optimizer = {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.0, "batch_size": 128}
    suggested = nb.Recipe(**optimizer)
    assert next(iter(nb.RECIPES.values())) == suggested
    assert not any(list(vars(suggested).values())[4:])


def test_images_are_cropped_resampled_and_standardized_alike_in_training_and_in_use(nb):
    """Training images before the training, test images in the model: the same numbers."""
    recipe = nb.Recipe(side=24, crop_columns=0.25)
    images = noise_split(2, 32).images
    images[..., :4], images[..., 28:] = 255, 255  # what is cut off
    resample = nb.preprocessing(recipe)[0].eval()
    in_use = resample(images.float())
    expected = F.interpolate(images[..., 4:28].float(), (24, 24), mode="bilinear", antialias=True)
    assert torch.allclose(in_use, expected, atol=1e-3)
    before_training = nb.resample_split(utils.Split(images, torch.tensor([3, 7])), recipe)
    assert before_training.images.dtype == torch.uint8
    assert (before_training.images - in_use).abs().max() <= 0.501
    assert before_training.labels.tolist() == [3, 7]
    smaller = in_use[..., :18, :18]
    assert resample.train()(smaller) is smaller  # the loader has done it
    for mode in (True, False):  # each image enters with mean 0 and deviation 1
        entering = nb.preprocessing(recipe).train(mode)(images.float())
        assert torch.allclose(entering.mean((1, 2, 3)), torch.zeros(2), atol=1e-5)
        assert torch.allclose(entering.std((1, 2, 3), correction=0), torch.ones(2), atol=1e-3)
    assert nb.preprocessing(nb.BASELINE)(smaller) is smaller


def test_images_are_smaller_and_antialiased_in_the_first_part_of_a_training(nb):
    split = noise_split(1).take([0] * 8)
    loader = nb.Loader(split, nb.TUNED, 8, utils.Plan("x", epochs=2, steps_per_epoch=10))
    batches = [images for number in (0, 1) for images, _ in loader.epoch(number)]
    assert [images.shape[2] for images in batches] == 6 * [18] + 14 * [24]
    whole = utils.to_float(nb.resample_split(split, nb.TUNED).images)
    smaller = F.interpolate(whole, (18, 18), mode="bilinear", antialias=True)
    torch.testing.assert_close(batches[0], smaller)
