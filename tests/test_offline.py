"""The folder offline/: stand-ins that look as they did, and models that are what is recorded."""

import ast
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import utils
from offline import digit_biggan, small_digits, street_numbers
from offline.training import common, train_digit_biggan, train_street_classifier

LOOK = {"mean": [122.29, 121.86, 124.48], "std": [62.77, 61.65, 63.01], "contrast": 29.09}


def record(name):
    return json.loads((digit_biggan.WEIGHTS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def crops():
    return street_numbers.render_street_numbers(1500, 5)


@pytest.fixture(scope="module")
def gan():
    return digit_biggan.load_digit_biggan()


@pytest.fixture(scope="module")
def evaluator():
    return digit_biggan.load_evaluation_classifier()


def test_offline_imports_nothing_of_ours():
    for file in Path(street_numbers.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        names = {alias.name.split(".")[0] for node in imports for alias in node.names}
        from_imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names |= {(node.module or "").split(".")[0] for node in from_imports}
        assert not names & {"utils", "tools", "offline", ""}, file.name


# ---- the stand-in for MNIST ----


def test_small_digits_are_split_without_overlap_and_in_mnists_format():
    (train, train_labels), (test, test_labels) = small_digits.load_small_digits()
    assert train.shape == (1437, 1, 28, 28)
    assert test.shape == (360, 1, 28, 28)
    assert train.dtype == torch.uint8
    assert train.max() == 255
    assert torch.bincount(train_labels).min() > 130
    assert torch.bincount(test_labels).min() > 30
    seen = {image.numpy().tobytes() for image in train}
    repeated = sum(image.numpy().tobytes() in seen for image in test)
    assert repeated <= 2  # the set itself holds a few twice


# ---- the stand-in for SVHN ----


def test_street_numbers_are_balanced_and_in_svhns_format(crops):
    images, labels = crops
    assert images.shape == (1500, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    # A fair draw: 150 each, standard deviation 11.6; five of those either way.
    assert (torch.bincount(labels, minlength=10) - 150).abs().max() < 58


def test_street_numbers_look_as_they_did(crops):
    """Statistics, as bytes depend on the versions of the libraries and on the processor."""
    images, labels = crops
    assert labels[:12].tolist() == [1, 4, 7, 5, 6, 0, 2, 3, 8, 4, 9, 0]
    assert images.float().mean((0, 2, 3)).tolist() == pytest.approx(LOOK["mean"], abs=0.5)
    assert images.float().std((0, 2, 3)).tolist() == pytest.approx(LOOK["std"], abs=0.5)
    contrast = images.float().mean(1).flatten(1).std(1)
    assert contrast.median().item() == pytest.approx(LOOK["contrast"], abs=0.5)
    assert contrast.min() > 1  # every crop shows something
    in_color = (images[:, 0] != images[:, 2]).flatten(1).any(1)
    assert in_color.float().mean() > 0.95


def test_same_seed_gives_same_bytes_whatever_the_threads():
    before = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try:
        torch.set_num_threads(1)
        one = street_numbers.render_street_numbers(251, 7)  # one more than a chunk
        torch.set_num_threads(2)
        two = street_numbers.render_street_numbers(251, 7)
        assert torch.get_num_threads() == 2  # the caller's setting survives
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert torch.equal(torch.rand(4), expected)  # torch's own generator is left alone
    assert not torch.equal(street_numbers.render_street_numbers(251, 8)[0], one[0])
    with pytest.raises(ValueError, match="count"):
        street_numbers.render_street_numbers(0, 7)


def test_every_face_has_ten_different_glyphs():
    for face in [face for family in street_numbers.FONT_FAMILIES.values() for face in family]:
        fields, half_widths, _ = street_numbers._glyph_fields(*face)
        ink = (fields > 0).flatten(1)
        assert ink.any(1).all()
        assert 0.03 < half_widths.min() <= half_widths.max() < 0.7
        digits = ink[:10].float()
        assert torch.cdist(digits, digits).fill_diagonal_(99).min() > 5


def test_labels_are_those_of_the_digits_shown(crops, nb):
    """g, which was trained on real SVHN, reads them; of shuffled labels it finds a tenth."""
    images, labels = crops[0][:400], crops[1][:400]
    model = utils.load_weights(nb.StreetClassifier(), digit_biggan.WEIGHTS / "street_classifier.pt")
    cpu = torch.device("cpu")
    assert utils.percent_right(model, utils.Split(images, labels), cpu) > 93
    shuffled = labels[torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))]
    assert utils.percent_right(model, utils.Split(images, shuffled), cpu) < 15


def test_the_stand_in_is_rendered_once_and_again_after_a_change(monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    first = utils.load_svhn()
    render, made = street_numbers.render_street_numbers, []

    def counted(*size):
        made.append(size)
        return render(*size)

    monkeypatch.setattr(street_numbers, "render_street_numbers", counted)
    assert torch.equal(utils.load_svhn().train.images, first.train.images)
    assert made == []
    monkeypatch.setattr(street_numbers, "versions", lambda: ["another version of matplotlib"])
    utils.load_svhn()
    assert made == [(512, 1), (256, 2)]


# ---- the trained models ----


def test_weights_are_small_and_those_of_their_records():
    log = record("digit_biggan_log.json")
    recorded = {
        "street_classifier.pt": record("street_classifier.json")["sha256"],
        "digit_biggan.pt": log["sha256"],
        "evaluation_classifier.pt": log["sha256_evaluation_classifier"],
    }
    for name, sha256 in recorded.items():
        content = (digit_biggan.WEIGHTS / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        assert len(content) < 4e6


def test_the_digit_model_gives_finite_images_at_every_truncation(gan):
    noise = torch.randn(20, digit_biggan.Z_DIM, generator=torch.Generator().manual_seed(0))
    for truncation in (0.02, 0.4, 0.55, 1.0):
        with torch.no_grad():
            images = gan(truncation * noise.clamp(-2, 2), torch.eye(20), truncation)
        assert images.shape == (20, 3, 32, 32)
        assert images.isfinite().all()
        assert images.abs().max() <= 1
    street, handwritten = images.std(dim=1).flatten(1).mean(1).chunk(2)
    assert handwritten.mean() < 0.1  # MNIST's three channels are almost equal
    assert handwritten.mean() < street.mean()


def test_generated_digits_are_recognized_as_often_as_recorded(gan, evaluator):
    labels = torch.arange(20).repeat(20)
    images = train_digit_biggan.sample(gan, labels, 1.0, seed=5)
    _, right = train_digit_biggan.features_and_right(evaluator, images, labels)
    final = record("digit_biggan_log.json")["final"]["1.0"]
    recorded = (final["recognized_street"] + final["recognized_handwritten"]) / 2
    assert right == pytest.approx(recorded, abs=5)


def test_the_evaluation_classifier_reads_real_mnist(evaluator, shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    test = utils.real_mnist("test").first(500)
    padded = torch.nn.functional.pad(test.images, (2, 2, 2, 2))
    images = utils.to_float(padded).expand(-1, 3, -1, -1)
    _, right = train_digit_biggan.features_and_right(evaluator, images, test.labels + 10)
    assert right > 98


# ---- the scripts that trained them ----


def test_frechet_distance_is_that_of_scipy_and_zero_to_itself():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(200, 5, generator=generator).double() ** 2 for _ in range(2))
    root = torch.as_tensor(scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    trace = (a.T.cov() + b.T.cov() - 2 * root).trace()
    expected = (a.mean(0) - b.mean(0)).square().sum() + trace
    assert train_digit_biggan.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert train_digit_biggan.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two rows"):
        train_digit_biggan.frechet_distance(a[:1], b)


def test_batch_norm_in_training_equals_the_librarys_with_stored_statistics():
    torch.manual_seed(0)
    norm = train_digit_biggan.TrainableBatchNorm(4, 6, eps=1e-4)
    x, condition = torch.randn(64, 4, 8, 8), torch.randn(64, 6)
    norm.row = 50
    trained = norm.train()(x, 1.0, condition)
    stored = norm.eval()(x, 1.0, condition)
    assert torch.allclose(trained, stored, atol=2e-3)


def test_a_resumed_training_of_g_sees_the_same_batches():
    images = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8)
    split = utils.Split(images, torch.arange(300) % 10)
    first, again, other = (train_street_classifier.batch_of(split, step) for step in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert first[0].shape == (128, 3, 32, 32)


def test_the_same_weights_are_the_same_file_in_every_process(tmp_path, monkeypatch):
    """Their sha256 is on record: neither the file's name nor the process's id may be in it."""
    model = torch.nn.Linear(3, 2)
    first = common.round_and_save(model, tmp_path / "weights.pt")
    rounded = model.weight.detach().clone()
    assert torch.equal(rounded, rounded.half().float())
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    assert common.round_and_save(model, tmp_path / "others.pt") == first


class CountingTrainer:
    """A Trainer whose steps only count: what it measures is the number of the step."""

    def __init__(self):
        self.generator = self.average = torch.nn.Linear(1, 1)
        self.step, self.seconds, self.log = 0, 0.0, []

    def networks(self):
        return {"generator": self.generator}

    def train_step(self, real):
        self.step += 1
        return {"loss": float(self.step)}

    def save(self, path):
        path.write_text(str(self.step), encoding="utf-8")


def test_the_last_steps_of_a_training_are_logged_and_kept_too(tmp_path, monkeypatch):
    monkeypatch.setattr(train_digit_biggan, "LOG_EVERY", 2)
    monkeypatch.setattr(train_digit_biggan, "SNAPSHOT_EVERY", 4)
    trainer = CountingTrainer()
    train_digit_biggan.train(trainer, None, 5, tmp_path)
    assert [(row["step"], row["loss"]) for row in trainer.log] == [(2, 1.5), (4, 3.5), (5, 5.0)]
    assert (tmp_path / "checkpoint.pt").read_text(encoding="utf-8") == "5"
    assert [path.name for path in tmp_path.glob("snapshot*")] == ["snapshot-000004.pt"]
