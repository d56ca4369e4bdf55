"""The models in offline/: their files, and the measures that were taken with them."""

import hashlib
import json

import pytest
import torch
from torch import nn

import utils
from offline import digit_biggan, street_classifier, train_digit_biggan

CPU = torch.device("cpu")
SIZES = {"street_classifier": 2.0, "digit_biggan": 4.0, "evaluation_classifier": 0.5}  # at most, MB


def facts(name: str) -> dict:
    return json.loads((utils.OFFLINE / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gan():
    return digit_biggan.load_digit_biggan(CPU)


@pytest.fixture(scope="module")
def evaluator():
    return digit_biggan.load_evaluation_classifier(CPU)


def sha256(name: str) -> str:
    return hashlib.sha256((utils.OFFLINE / f"{name}.pt").read_bytes()).hexdigest()


def test_files_are_those_of_the_records_and_small():
    for name, most in SIZES.items():
        assert (utils.OFFLINE / f"{name}.pt").stat().st_size < most * 1e6
    assert sha256("street_classifier") == facts("street_classifier.json")["sha256"]
    log = facts("digit_biggan_log.json")
    assert sha256("digit_biggan") == log["sha256"]
    assert sha256("evaluation_classifier") == log["sha256_evaluation_classifier"]
    assert (utils.OFFLINE / "digit_biggan_log.json").stat().st_size < 40_000
    assert sum(file.stat().st_size for file in utils.OFFLINE.glob("*.*")) < 8e6


def test_street_classifier_fits_the_notebook_and_reads_rendered_numbers(nb, monkeypatch):
    model = nb.StreetClassifier()
    utils.load_weights(model, utils.OFFLINE / "street_classifier.pt")
    monkeypatch.setenv("A3_PROFILE", "tiny")
    rendered = utils.offline_module("street_numbers").stand_in().test
    assert nb.accuracy(utils.predict(model, rendered), rendered.labels) >= 90
    assert len(rendered) >= 200


def test_street_batches_are_the_same_after_a_resume():
    split = utils.Split(
        torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8), torch.arange(300) % 10
    )
    first, again, other = (street_classifier.batch_of(split, step) for step in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert first[0].shape == (128, 3, 32, 32) and first[0].abs().max() <= 1


def test_generator_output(gan):
    assert gan.classes == digit_biggan.DIGIT_CLASSES and gan.z_dim == 32 and gan.size == 32
    z = torch.randn(20, gan.z_dim, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    for truncation in (0.02, 0.4, 0.55, 1.0):
        images = gan.model(truncation * z, torch.eye(20), truncation)
        assert images.shape == (20, 3, 32, 32) and images.isfinite().all()
        assert images.abs().max() <= 1
    street, handwritten = images[:10], images[10:]
    spread = [part.std(dim=1).mean() for part in (street, handwritten)]
    assert spread[1] < 0.1 and spread[1] < spread[0]  # MNIST's three channels are almost equal


def test_generated_digits_are_recognized_as_recorded(gan, evaluator):
    labels = torch.arange(20).repeat(20)
    images = train_digit_biggan.sample(gan.model, labels, 1.0, seed=5)
    _, right = train_digit_biggan.features_and_right(evaluator, images, labels)
    final = facts("digit_biggan_log.json")["final"]["1.0"]
    recorded = (final["recognized_street"] + final["recognized_handwritten"]) / 2
    assert right == pytest.approx(recorded, abs=5)


def test_evaluation_classifier_reads_mnist(nb, evaluator, shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    monkeypatch.setenv("A3_DATA", "real")
    test = nb.padded(utils.load_handwritten().test.first(500))
    images = utils.to_float(test.images).expand(-1, 3, -1, -1)
    _, right = train_digit_biggan.features_and_right(evaluator, images, test.labels + 10)
    assert right > 98


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=generator).double()
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    scale, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])
    expected = float(((scale - 1) ** 2).sum() + (shift**2).sum())  # diagonal covariances
    distance = digit_biggan.frechet_distance(white, white * scale + shift)
    assert distance == pytest.approx(expected, rel=1e-6)
    assert digit_biggan.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(200, 5, generator=generator).double() ** 2 for _ in range(2))
    root = torch.as_tensor(linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov() - 2 * root).trace()
    assert digit_biggan.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3), torch.zeros(4, 2), torch.full((4, 3), torch.nan)]
)
def test_frechet_distance_refuses(bad):
    with pytest.raises(ValueError, match="a and b"):
        digit_biggan.frechet_distance(bad, torch.zeros(4, 3))


def test_training_batch_norm_equals_the_library_with_stored_statistics():
    torch.manual_seed(0)
    norm = train_digit_biggan.TrainableBatchNorm(4, 6, eps=1e-4)
    x, condition = torch.randn(64, 4, 8, 8), torch.randn(64, 6)
    norm.row = 50
    trained = norm.train()(x, 1.0, condition)
    stored = norm.eval()(x, 1.0, condition)
    assert torch.allclose(trained, stored, atol=2e-3)


def test_accuracy_score_of_separable_images_is_high():
    """The last step of the CAS: train on one set, test on another."""
    labels = torch.arange(512) % 2
    images = torch.randint(0, 100, (512, 1, 16, 16), dtype=torch.uint8)
    images[labels == 1] += 120
    split = utils.Split(images, labels)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    assert train_digit_biggan.train_and_test(model, split, split.first(100), epochs=5) > 95


def test_generated_split_is_gray_and_balanced(gan):
    split = train_digit_biggan.generated_split(gan.model, "handwritten", 40)
    assert split.images.shape == (40, 1, 32, 32) and split.images.dtype == torch.uint8
    assert torch.bincount(split.labels).tolist() == [4] * 10
