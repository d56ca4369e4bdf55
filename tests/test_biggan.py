"""Question 3: noise, interpolations and images. Which generator is taken: test_weights.py."""

import pytest
import torch
from conftest import CPU, DRAWS
from torch import nn
from torch.testing import assert_close

import utils
from offline import digit_biggan

pytest.importorskip("pytorch_pretrained_biggan")


@pytest.fixture(scope="module")
def gan() -> utils.ImageGenerator:
    return utils.load_generator("digits", CPU)


@pytest.mark.parametrize(("method", "rounding"), [("slerp", 1e-6), ("lerp", 0)])
def test_interpolation_goes_from_end_to_end_and_is_symmetric(nb, method, rounding):
    a, b = nb.truncated_noise(2, 32, 0.8, seed=3)
    there = nb.interpolate(a, b, getattr(nb, method))
    back = nb.interpolate(b, a, getattr(nb, method))
    assert there.shape == (10, 32)
    assert_close(there[[0, -1]], torch.stack([a, b]), atol=rounding, rtol=0)
    assert_close(back.flip(0), there, atol=1e-5, rtol=1e-4)


def test_slerp_turns_evenly_and_its_length_changes_evenly(nb):
    a, b = nb.truncated_noise(2, 32, 0.8, seed=3)
    t = torch.linspace(0, 1, 11)
    points = nb.slerp(a, 3 * b, t[:, None])
    lengths = points.norm(dim=1)
    assert_close(points[[0, -1]], torch.stack([a, 3 * b]))
    assert_close(lengths, torch.lerp(a.norm(), 3 * b.norm(), t), rtol=1e-5, atol=1e-5)
    unit = points / lengths[:, None]
    angles = torch.acos((unit[1:] * unit[:-1]).sum(dim=1))
    assert_close(angles, angles.mean().expand(10), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [2.0, -1.0, 1 + 1e-6])
def test_slerp_of_parallel_and_opposite_vectors_is_the_line(nb, factor):
    (a,) = nb.truncated_noise(1, 32, 0.8, seed=3)
    t = torch.linspace(0, 1, 5)[:, None]
    assert_close(nb.slerp(a, factor * a, t), nb.lerp(a, factor * a, t))


def test_between_two_classes_the_noise_goes_by_slerp_and_the_class_by_lerp(nb):
    z, c = nb.interpolate_classes(DRAWS, ("one", "two"), 0.5, seed=7)
    assert torch.equal(z, nb.interpolate(*nb.truncated_noise(2, 3, 0.5, seed=7), nb.slerp))
    t = torch.linspace(0, 1, 10)
    assert_close(c, torch.stack([1 - t, t], 1))


def test_noise_is_truncated_and_seeded(nb):
    z = nb.truncated_noise(500, 32, 0.4, seed=1)
    assert 0.7 < z.abs().max() <= 0.8
    assert abs(z.std() / 0.4 - 0.88) < 0.02  # a unit normal cut to -2..2 has std 0.880
    assert torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=1))
    assert not torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=2))


def test_class_accuracy_is_the_share_of_its_own_ten_classes(nb, gan):
    class AlwaysThirteen(nn.Module):
        def forward(self, images):
            return torch.eye(20)[13].expand(len(images), -1)

    assert nb.class_accuracy(gan, AlwaysThirteen(), first_class=0, count=20) == 0
    assert nb.class_accuracy(gan, AlwaysThirteen(), first_class=10, count=20) == pytest.approx(10)


def test_the_evaluation_classifier_recognizes_the_digits_that_were_asked_for(nb, gan):
    evaluator = digit_biggan.load_evaluation_classifier(CPU)
    for first in (0, 10):
        assert nb.class_accuracy(gan, evaluator, first, count=40) > 90


@pytest.mark.parametrize("size", [32, 128])
def test_strips_show_each_image_above_its_t(nb, size):
    strip = (torch.arange(10) / 9).view(10, 1, 1, 1).expand(10, 3, size, size) * 2 - 1
    figure = nb.draw_strips({"slerp": strip, "lerp": strip})
    for axis in figure.axes:
        assert f"{axis.images[0].get_array().mean():.2f}" == axis.get_xlabel()
    nb.plt.close(figure)
