"""Question 3: noise, interpolations and images. Which generator is taken: test_weights.py."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import utils

biggan = pytest.importorskip("pytorch_pretrained_biggan")
CPU = torch.device("cpu")
DIGIT_CLASSES = [f"{data} {digit}" for data in ("SVHN", "MNIST") for digit in range(10)]


def random_biggan() -> nn.Module:
    """A small BigGAN with random weights whose eval mode gives finite images of 32 x 32."""
    config = biggan.BigGANConfig(
        output_dim=32,
        z_dim=8,
        channel_width=8,
        num_classes=20,
        layers=[(True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)],
        attention_layer_position=2,
    )
    torch.manual_seed(0)
    model = biggan.BigGAN(config)
    nn.init.ones_(model.generator.bn.weight)
    nn.init.zeros_(model.generator.bn.bias)
    with torch.no_grad():
        for _ in range(20):  # spectral norm's power iterations settle in train mode only
            model.train()(torch.randn(2, 8), torch.eye(20)[:2], 1.0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gan() -> utils.ImageGenerator:
    return utils.ImageGenerator(random_biggan(), "random", "random weights", DIGIT_CLASSES, 8, 32)


# ---- interpolation ----


@pytest.mark.parametrize("method", ["slerp", "lerp"])
@pytest.mark.parametrize("between", [0, 1, 8])
def test_interpolation_has_exact_ends_and_is_symmetric(nb, method, between):
    a, b = nb.truncated_noise(2, 32, 0.8, seed=3)
    there = nb.interpolate(a, b, getattr(nb, method), between)
    back = nb.interpolate(b, a, getattr(nb, method), between)
    assert there.shape == (between + 2, 32)
    assert torch.equal(there[[0, -1]], torch.stack([a, b]))
    assert_close(back.flip(0), there, atol=1e-5, rtol=1e-4)


def test_slerp_turns_evenly_and_its_length_changes_evenly(nb):
    a, b = nb.truncated_noise(2, 32, 0.8, seed=3)
    t = torch.linspace(0, 1, 11)
    points = nb.slerp(a, 3 * b, t)
    lengths = points.norm(dim=1)
    assert_close(lengths, torch.lerp(a.norm(), 3 * b.norm(), t), rtol=1e-5, atol=1e-5)
    unit = points / lengths[:, None]
    angles = torch.acos((unit[1:] * unit[:-1]).sum(dim=1))
    assert_close(angles, angles.mean().expand(10), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 1 + 1e-6])
def test_slerp_of_parallel_and_opposite_vectors_is_the_line(nb, factor):
    (a,) = nb.truncated_noise(1, 32, 0.8, seed=3)
    t = torch.linspace(0, 1, 5)
    assert_close(nb.slerp(a, factor * a, t), nb.lerp(a, factor * a, t))


def test_halfway_slerp_keeps_the_length_that_lerp_loses(nb):
    assert abs(nb.length_kept(nb.slerp, 128) - 1) < 1e-5
    assert abs(nb.length_kept(nb.lerp, 128) - 0.5**0.5) < 0.01


def test_class_weights_stay_a_mixture(nb, gan):
    z, c = nb.interpolate_classes(gan, ("SVHN 1", "MNIST 8"), 0.5, seed=0)
    assert z.shape == (10, 8)
    assert c.shape == (10, 20)
    assert (c >= 0).all()
    assert_close(c.sum(dim=1), torch.ones(10))
    assert (c[0].argmax(), c[-1].argmax()) == (1, 18)


# ---- noise, classes, images ----


def test_noise_is_truncated_and_seeded(nb):
    z = nb.truncated_noise(500, 32, 0.4, seed=1)
    assert 0.7 < z.abs().max() <= 0.8
    assert abs(z.std() / 0.4 - 0.88) < 0.02  # a unit normal cut to -2..2 has std 0.880
    assert torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=1))
    assert not torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=2))


def test_unknown_class_is_named(nb):
    assert nb.class_vector("MNIST 3", DIGIT_CLASSES).nonzero().tolist() == [[13]]
    with pytest.raises(ValueError, match="vulcano"):
        nb.class_vector("vulcano", DIGIT_CLASSES)


def test_generate_is_repeatable_and_leaves_the_model_alone(nb, gan):
    before = {name: value.clone() for name, value in gan.model.state_dict().items()}
    z, c = nb.interpolate_classes(gan, ("SVHN 2", "MNIST 5"), 0.7, seed=5)
    images = nb.generate(gan, z, c, 0.7)
    assert images.shape == (10, 3, 32, 32)
    assert images.abs().max() <= 1
    assert torch.equal(images, nb.generate(gan, z, c, 0.7))
    ends = [0, -1]
    assert_close(images[ends], nb.generate(gan, z[ends], c[ends], 0.7), atol=1e-4, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in gan.model.state_dict().items())


@pytest.mark.parametrize("size, rows", [(32, 2), (128, 4)])
def test_large_images_are_drawn_in_rows_of_five(nb, size, rows):
    figure = nb.draw_strips(
        {"slerp": torch.zeros(10, 3, size, size), "lerp": torch.zeros(10, 3, size, size)}
    )
    labels = [axis.get_title("left") for axis in figure.axes if axis.get_title("left")]
    assert labels == ["slerp", "lerp"] * (rows // 2)
    assert len(figure.axes) == 20
    nb.plt.close(figure)


def test_class_accuracy_is_the_share_of_its_own_ten_classes(nb, gan):
    class AlwaysThirteen(nn.Module):
        def forward(self, images):
            return torch.eye(20)[13].expand(len(images), -1)

    assert nb.class_accuracy(gan, AlwaysThirteen(), first=0, count=20) == 0
    assert nb.class_accuracy(gan, AlwaysThirteen(), first=10, count=20) == pytest.approx(10)


# ---- the digit model ----


def test_digit_model_draws_digits_that_the_classifier_knows(nb):
    digit_biggan = pytest.importorskip("offline.digit_biggan")
    gan, why_not = utils.load_biggan("digits", "tiny", CPU)
    assert (gan.classes, gan.z_dim, gan.size, why_not) == (DIGIT_CLASSES, 32, 32, "")
    evaluator = digit_biggan.load_evaluation_classifier(CPU)
    for first in (0, 10):
        assert nb.class_accuracy(gan, evaluator, first, 100) > 90
    seen = nb.classes_along(gan, evaluator, ("MNIST 4", "MNIST 9"), 5)
    assert seen.shape == (5, 10)
    assert (seen[:, [0, -1]] == torch.tensor([14, 19])).all()
