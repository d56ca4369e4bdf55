"""The folder offline/: stand-ins that look as they did, and models that are what is recorded."""

import hashlib
import json

import pytest
import torch
from conftest import CPU

import utils
from offline import digit_biggan, small_digits, street_numbers
from offline.training import train_digit_biggan


def record(name):
    return json.loads((digit_biggan.WEIGHTS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def crops():
    return street_numbers.render_street_numbers(1500, 5)


def test_small_digits_are_split_without_overlap_each_with_its_label():
    (train, train_labels), (test, test_labels) = small_digits.load_small_digits()
    assert train.shape == (1437, 1, 28, 28)
    assert test.shape == (360, 1, 28, 28)
    assert train.max() == 255
    assert torch.bincount(train_labels).min() > 130
    assert torch.bincount(test_labels).min() > 30
    seen = {image.numpy().tobytes() for image in train}
    repeated = sum(image.numpy().tobytes() in seen for image in test)
    assert repeated <= 2  # the set itself holds a few twice
    nearest = torch.cdist(test.flatten(1).float(), train.flatten(1).float()).argmin(1)
    assert (train_labels[nearest] == test_labels).float().mean() > 0.95


def test_street_numbers_look_as_they_did(crops):
    """Statistics, as bytes depend on the versions of the libraries and on the processor."""
    images, labels = crops
    assert images.shape == (1500, 3, 32, 32)
    assert labels[:12].tolist() == [1, 4, 7, 5, 6, 0, 2, 3, 8, 4, 9, 0]
    # A fair draw: 150 each, standard deviation 11.6; five of those either way.
    assert (torch.bincount(labels, minlength=10) - 150).abs().max() < 58
    assert images.float().mean((0, 2, 3)).tolist() == pytest.approx(
        [122.29, 121.86, 124.48], abs=0.5
    )
    assert images.float().std((0, 2, 3)).tolist() == pytest.approx([62.77, 61.65, 63.01], abs=0.5)
    contrast = images.float().mean(1).flatten(1).std(1)
    assert contrast.median().item() == pytest.approx(29.09, abs=0.5)
    assert contrast.min() > 1  # every crop shows something


def test_same_seed_gives_same_bytes_whatever_the_threads():
    one = street_numbers.render_street_numbers(251, 7)  # one more than a chunk
    torch.set_num_threads(2)
    try:
        two = street_numbers.render_street_numbers(251, 7)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(street_numbers.render_street_numbers(251, 8)[0], one[0])


def test_labels_are_those_of_the_digits_shown(crops, nb):
    """g, which was trained on real SVHN, reads them."""
    model = utils.load_weights(nb.StreetClassifier(), digit_biggan.WEIGHTS / "street_classifier.pt")
    split = utils.Split(*crops).first(400)
    assert utils.classifier_accuracy(model, split, CPU) > 93


def test_weights_are_those_of_their_records():
    log = record("digit_biggan_log.json")
    recorded = {
        "street_classifier.pt": record("street_classifier.json")["sha256"],
        "digit_biggan.pt": log["sha256"],
        "evaluation_classifier.pt": log["sha256_evaluation_classifier"],
    }
    for name, sha256 in recorded.items():
        content = (digit_biggan.WEIGHTS / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256


@pytest.mark.parametrize("truncation", [0.4, 1.0])
def test_generated_digits_are_recognized_as_often_as_recorded(truncation):
    evaluator = digit_biggan.load_evaluation_classifier()
    labels = torch.arange(20).repeat(20)
    gan = digit_biggan.load_digit_biggan()
    images = train_digit_biggan.sample(gan, labels, truncation, seed=5)
    _, accuracy = train_digit_biggan.features_and_accuracy(evaluator, images, labels)
    final = record("digit_biggan_log.json")["final"][str(truncation)]
    recorded = (final["recognized_street"] + final["recognized_handwritten"]) / 2
    assert accuracy == pytest.approx(recorded, abs=3)
