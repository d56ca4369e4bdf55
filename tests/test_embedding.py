"""Question 1 (e): triplets, loss, nearest neighbors, the frozen g, and where g comes from."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import utils


def _two_sets(seed: int, n: int = 60, m: int = 50, dim: int = 8):
    """Random embeddings of two sets, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, dim, generator=rng), torch.randn(m, dim, generator=rng)
    x_labels, y_labels = (torch.randint(0, 10, (k,), generator=rng) for k in (n, m))
    return x, x_labels, y, y_labels


def _toy_split(channels: int, size: int, n: int = 96, seed: int = 0) -> utils.Split:
    """Noise with a bright bar whose place tells the digit: easy to learn, quick to make."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, channels, size, size), generator=rng)
    for image, digit in zip(images, labels.tolist(), strict=True):
        image[:, 2 + 2 * digit : 5 + 2 * digit] += 180
    return utils.Split(images.to(torch.uint8), labels)


# ---- triplets and loss ---------------------------------------------------------------

label_lists = st.lists(st.integers(0, 4), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(anchors=label_lists, others=label_lists, semi_hard=st.booleans(), seed=st.integers(0, 99))
def test_triplets_are_right_or_refused(nb, anchors, others, semi_hard, seed):
    """Positives share the anchor's digit, negatives do not; every anchor that has both is used."""
    torch.manual_seed(seed)
    a_labels, o_labels = torch.tensor(anchors), torch.tensor(others)
    distances = torch.rand(len(anchors), len(others)) if semi_hard else None
    usable = [i for i, a in enumerate(anchors) if a in others and set(others) != {a}]
    if not usable:
        with pytest.raises(ValueError, match="equal and an unequal digit"):
            nb.choose_triplets(a_labels, o_labels, distances)
        return
    a, p, n = nb.choose_triplets(a_labels, o_labels, distances)
    assert a.tolist() == usable
    assert (o_labels[p] == a_labels[a]).all() and (o_labels[n] != a_labels[a]).all()


def test_random_triplets_reach_every_positive_and_negative_equally(nb):
    torch.manual_seed(0)
    counts = torch.zeros(2, 6)
    for _ in range(3000):
        _, p, n = nb.choose_triplets(torch.tensor([1]), torch.tensor([1, 1, 1, 0, 2, 2]))
        counts[0, p] += 1
        counts[1, n] += 1
    assert counts[0, 3:].sum() == counts[1, :3].sum() == 0
    # Each of three has 1,000 expected, standard deviation 26.
    assert (counts[0, :3] - 1000).abs().max() < 130 and (counts[1, 3:] - 1000).abs().max() < 130


@pytest.mark.parametrize("seed", range(5))
def test_semi_hard_negative_is_the_nearest_beyond_the_positive(nb, seed):
    x, x_labels, y, y_labels = _two_sets(seed)
    distances = torch.cdist(x, y)
    torch.manual_seed(seed)
    for a, p, n in zip(*nb.choose_triplets(x_labels, y_labels, distances), strict=True):
        negatives = distances[a][y_labels != x_labels[a]]
        farther = negatives[negatives > distances[a, p]]
        expected = farther.min() if len(farther) else negatives.max()
        assert distances[a, n] == expected


def test_bad_input_is_refused(nb):
    with pytest.raises(RuntimeError, match="size"):
        nb.choose_triplets(torch.tensor([0, 1]), torch.tensor([0, 1, 1]), torch.rand(3, 2))
    z, labels = torch.eye(2), torch.tensor([0, 1])
    for alpha in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            nb.two_sided_loss(z, labels, z, labels, False, alpha)
    for k in (0, 6):
        with pytest.raises(ValueError, match="k must be between 1 and 5"):
            nb.rank_gallery(torch.rand(5, 2), torch.rand(5, 2), k)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("semi_hard", [False, True])
def test_two_sided_loss_is_the_sum_of_torchs(nb, alpha, semi_hard):
    x, x_labels, y, y_labels = _two_sets(7)
    d = torch.cdist(x, y)
    torch.manual_seed(3)
    m = nb.choose_triplets(x_labels, y_labels, d if semi_hard else None)
    s = nb.choose_triplets(y_labels, x_labels, d.T if semi_hard else None)
    expected = sum(
        F.triplet_margin_loss(anchors[a], others[p], others[n], margin=alpha)
        for anchors, others, (a, p, n) in [(x, y, m), (y, x, s)]
    )
    torch.manual_seed(3)  # the same luck, so the same triplets
    ours, active = nb.two_sided_loss(x, x_labels, y, y_labels, semi_hard, alpha)
    assert torch.allclose(ours, expected, atol=1e-5) and 0 < active <= 1


@pytest.mark.parametrize("semi_hard", [False, True])
def test_loss_of_perfect_and_swapped_clusters_and_its_gradient(nb, semi_hard):
    x, labels = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([0, 1])
    loss, active = nb.two_sided_loss(x, labels, x + 0.01, labels, semi_hard)
    assert loss == 0 and active == 0
    loss, active = nb.two_sided_loss(x, labels, x.flip(0), labels, semi_hard)
    assert loss == pytest.approx(2 * 10.2, rel=1e-5) and active == 1
    same = torch.zeros(4, 8, requires_grad=True)  # distances of zero have no NaN gradient
    labels = torch.tensor([0, 0, 1, 1])
    nb.two_sided_loss(same, labels, torch.zeros(4, 8), labels, semi_hard)[0].backward()
    assert torch.isfinite(same.grad).all()


# ---- nearest neighbors ---------------------------------------------------------------


def test_neighbors_are_scikit_learns(nb):
    from sklearn.neighbors import NearestNeighbors

    x, x_labels, y, y_labels = _two_sets(1, n=1200, m=300)
    theirs = NearestNeighbors(n_neighbors=5).fit(y.numpy()).kneighbors(x.numpy())
    distances, indices = nb.rank_gallery(x, y, 5)
    assert (indices.numpy() == theirs[1]).all()
    assert np.allclose(distances.numpy(), theirs[0], atol=1e-4)
    expected = 100 * (y_labels[theirs[1][:, 0]] == x_labels).double().mean().item()
    assert nb.top1(x, x_labels, y, y_labels) == pytest.approx(expected)


def test_draws_are_of_100_queries_and_2000_gallery_images(nb):
    few, gallery = nb.draw(0, 10_000, 60_000)
    assert len(few.unique()) == 100 and len(gallery.unique()) == 2_000
    assert not torch.equal(gallery, nb.draw(1, 10_000, 60_000)[1])
    x, x_labels, y, y_labels = _two_sets(2, n=150, m=2_500)
    of_100, of_all = nb.top1_of_draws(x, x_labels, y, y_labels, draws=3)
    few, gallery = nb.draw(2, 150, 2_500)
    expected = nb.top1(x[few], x_labels[few], y[gallery], y_labels[gallery])
    assert len(of_100) == len(of_all) == 3 and of_100[2] == pytest.approx(expected)
    assert of_all[2] == pytest.approx(nb.top1(x, x_labels, y[gallery], y_labels[gallery]))


# ---- encoders and training -----------------------------------------------------------


@pytest.fixture()
def fp32(monkeypatch):
    monkeypatch.setenv("A3_PRECISION", "fp32")


def test_architecture_is_the_starters(nb):
    model = nb.StreetClassifier()
    convolutions = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.padding[0]) for c in convolutions] == [
        (3, 32, 1), (32, 32, 1), (32, 64, 1), (64, 64, 1), (64, 128, 1), (128, 128, 1),
        (128, 256, 0),
    ]  # fmt: skip
    assert model.features(torch.zeros(2, 3, 32, 32)).shape == (2, 256, 1, 1)
    assert all(not m.affine for m in model.features if isinstance(m, nn.BatchNorm2d))
    assert [m.p for m in model.features if isinstance(m, nn.Dropout)] == [0.3] * 7
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("small, unit_sphere", [(False, False), (True, True)])
def test_stored_features_give_the_embedding_of_the_pixels(nb, small, unit_sphere, fp32):
    torch.manual_seed(0)
    network = nb.StreetClassifier()
    model = nb.JointEmbedding(network, small, unit_sphere).eval()
    split = _toy_split(3, 32, n=12)
    features = nb.street_features(network, split)
    assert features.shape == (12, 256) and features.dtype == torch.float32
    assert not any(m.training for m in network.features.modules())
    from_pixels = model(utils.to_float(split.images))
    assert torch.allclose(nb.embed_street(model, features), from_pixels, atol=1e-5)
    z = utils.predict(model, _toy_split(1, 28, n=12))
    assert z.shape == (12, 64)
    if unit_sphere:
        assert torch.allclose(z.norm(dim=1), torch.ones(12), atol=1e-5)


@pytest.mark.parametrize("name", ["suggested", "augmentation"])
def test_training_changes_theta_and_w_and_leaves_g(nb, fp32, name):
    torch.manual_seed(0)
    network = nb.StreetClassifier()
    digits, streets = _toy_split(1, 28, seed=1), _toy_split(3, 32, seed=2)
    features = nb.street_features(network, streets)
    g_before = {key: value.clone() for key, value in network.features.state_dict().items()}
    model, history = nb.train_embedding(
        name, network, digits, digits.first(20), features, streets.labels,
        epochs=3, steps=6, size=32,
    )  # fmt: skip
    model.train()
    assert not any(m.training for m in model.g.modules()) and model.f.training
    assert not any(parameter.requires_grad for parameter in model.g.parameters())
    assert all(torch.equal(value, g_before[key]) for key, value in model.g.state_dict().items())
    utils.seed_everything(0)
    first = nb.JointEmbedding(network, model.small, model.unit_sphere).state_dict()
    trained = {key for key, value in model.named_parameters() if not torch.equal(value, first[key])}
    assert trained == {key for key, _ in model.named_parameters() if not key.startswith("g.")}
    assert all(0 <= row["train_active"] <= 100 for row in history)
    if name == "augmentation":
        assert history[-1]["train_loss"] < history[0]["train_loss"]


# ---- where g comes from --------------------------------------------------------------


def _street(real: bool) -> utils.DigitData:
    split = _toy_split(3, 32, n=64)
    return utils.DigitData("toy street numbers", split, split.first(32), real)


def _no_network(*_, **__):
    raise utils.DataError("no network")


def _write_weights(nb, folder, sha256: str | None = None) -> nn.Module:
    """Weights and their .json as offline/street_classifier.py leaves them, in float16."""
    path, model = folder / "street_classifier.pt", nb.StreetClassifier()
    state = model.state_dict().items()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state}, path)
    sha256 = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256}), encoding="utf-8")
    return model.eval()


def test_published_weights_are_read_and_their_classes_put_in_order(nb, monkeypatch):
    """The published head's class k is the digit k + 1: 1, 2, ..., 9, 0."""
    published = nb.StreetClassifier().eval()
    plain = {k: v for k, v in published.state_dict().items() if "num_batches" not in k}  # old torch

    def download(urls, path, sha256_prefix, size=None):
        assert len(urls) == 2 and sha256_prefix == "f564f3d8"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(plain, path)
        return path

    monkeypatch.setattr(utils, "download_weights", download)
    model, images = nb.published_classifier(), torch.randn(4, 3, 32, 32)
    assert not model.training
    assert torch.allclose(model(images).roll(-1, 1), published(images), atol=1e-6)


def test_our_weights_are_read_or_refused(nb, tmp_path):
    written = _write_weights(nb, tmp_path)
    read, images = nb.our_classifier(tmp_path), torch.randn(2, 3, 32, 32)
    assert next(read.parameters()).dtype == torch.float32
    assert torch.allclose(read(images), written(images), atol=0.02)
    _write_weights(nb, tmp_path, sha256="0" * 64)
    with pytest.raises(ValueError, match="street_classifier"):
        nb.our_classifier(tmp_path)


def test_weights_that_read_badly_are_not_used_and_g_is_trained(nb, tmp_path, monkeypatch, capsys):
    _write_weights(nb, tmp_path)  # untrained
    monkeypatch.setattr(nb.our_classifier, "__defaults__", (tmp_path,))
    monkeypatch.setattr(utils, "download_weights", _no_network)
    model, origin = nb.pretrained_classifier(_street(True), images=64)
    printed = capsys.readouterr().out
    assert "trained in this notebook" in origin and not model.training
    assert "no network" in printed and "on 64 training images" in printed


def test_stand_in_data_do_not_ask_the_network(nb, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nb.our_classifier, "__defaults__", (tmp_path,))  # an empty folder
    monkeypatch.setattr(utils, "download_weights", _no_network)
    _, origin = nb.pretrained_classifier(_street(False), images=64)
    assert "trained in this notebook" in origin
    assert "no network" not in capsys.readouterr().out


def test_committed_weights_read_street_numbers(nb, monkeypatch):
    if not (utils.OFFLINE / "street_classifier.pt").exists():
        pytest.skip("no weights of g here: the notebook trains it")
    assert (utils.OFFLINE / "street_classifier.pt").stat().st_size < 2_000_000
    monkeypatch.setenv("A3_PROFILE", "tiny")
    rendered = utils.offline_module("street_numbers").stand_in().test
    assert nb.test_accuracy(nb.our_classifier(), rendered) >= nb.LEAST_G
