"""Question 1 (e): triplets, loss, retrieval, the frozen g. Checked against other people's code."""

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


def _two_domains(seed: int, n: int = 60, m: int = 50, dim: int = 8, digits: int = 10):
    """Random embeddings of two domains and their labels."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, dim, generator=rng), torch.randn(m, dim, generator=rng)
    labels = [torch.randint(0, digits, (k,), generator=rng) for k in (n, m)]
    return x, labels[0], y, labels[1]


def _toy_split(channels: int, size: int, n: int = 96, seed: int = 0) -> utils.Split:
    """Noise with a bright bar whose place tells the digit: easy to learn, quick to make."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, channels, size, size), generator=rng)
    for image, digit in zip(images, labels.tolist(), strict=True):
        image[:, 2 + 2 * digit : 5 + 2 * digit] += 180
    return utils.Split(images.to(torch.uint8), labels)


# ---- triplets ------------------------------------------------------------------------


label_lists = st.lists(st.integers(0, 4), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(anchors=label_lists, others=label_lists, semi_hard=st.booleans(), seed=st.integers(0, 99))
def test_triplets_are_right_or_refused(nb, anchors, others, semi_hard, seed):
    """Positives share the anchor's digit, negatives do not, and no anchor is left out wrongly."""
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


def test_a_missing_class_gives_fewer_triplets(nb):
    a, _, _ = nb.choose_triplets(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1]))
    assert a.tolist() == [0, 1, 3]  # the 2 has no positive


@pytest.mark.parametrize("others", [[3, 3, 3], [7, 8]])
def test_no_triplet_at_all_is_an_error(nb, others):
    with pytest.raises(ValueError, match="other domain"):
        nb.choose_triplets(torch.tensor([3, 3]), torch.tensor(others))


def test_wrong_shape_of_distances_is_an_error(nb):
    with pytest.raises(ValueError, match="distances must be 2 x 3"):
        nb.choose_triplets(torch.tensor([0, 1]), torch.tensor([0, 1, 1]), torch.rand(3, 2))


def test_random_triplets_reach_every_positive_and_negative_equally(nb):
    torch.manual_seed(0)
    labels, others = torch.tensor([1]), torch.tensor([1, 1, 1, 0, 2, 2])
    counts = torch.zeros(2, 6)
    for _ in range(3000):
        _, p, n = nb.choose_triplets(labels, others)
        counts[0, p] += 1
        counts[1, n] += 1
    assert counts[0, 3:].sum() == counts[1, :3].sum() == 0
    # Each of three has 1,000 expected, standard deviation 26.
    assert (counts[0, :3] - 1000).abs().max() < 130 and (counts[1, 3:] - 1000).abs().max() < 130


def test_no_farther_negative_means_the_farthest(nb):
    distances = torch.tensor([[5.0, 1.0, 2.0]])
    a, p, n = nb.choose_triplets(torch.tensor([4]), torch.tensor([4, 0, 1]), distances)
    assert (a.item(), p.item(), n.item()) == (0, 0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_semi_hard_triplets_are_those_of_pytorch_metric_learning(nb, seed):
    """Its miner lists every (anchor, positive, farther negative); ours is the nearest of those."""
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    from pytorch_metric_learning.distances import LpDistance

    x, x_labels, y, y_labels = _two_domains(seed)
    distances = torch.cdist(x, y)
    miner = miners.TripletMarginMiner(
        margin=1e9, type_of_triplets="semihard", distance=LpDistance(normalize_embeddings=False)
    )
    nearest: dict[tuple[int, int], int] = {}
    for a, p, n in torch.stack(miner(x, x_labels, y, y_labels), 1).tolist():
        best = nearest.setdefault((a, p), n)
        if distances[a, n] < distances[a, best]:
            nearest[a, p] = n
    torch.manual_seed(seed)
    ours = torch.stack(nb.choose_triplets(x_labels, y_labels, distances), 1).tolist()
    mined = [(a, p, n) for a, p, n in ours if (a, p) in nearest]
    assert len(mined) > 30 and all(nearest[a, p] == n for a, p, n in mined)
    for a, p, n in ours:
        if (a, p) not in nearest:  # no farther negative: the farthest there is
            others = y_labels != x_labels[a]
            assert distances[a, n] == distances[a][others].max() <= distances[a, p]


# ---- loss, against pytorch-metric-learning and torch ----------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("semi_hard", [False, True])
def test_two_sided_loss_is_that_of_pytorch_metric_learning(nb, alpha, semi_hard):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import MeanReducer

    x, x_labels, y, y_labels = _two_domains(7)
    loss_fn = losses.TripletMarginLoss(
        margin=alpha, distance=LpDistance(normalize_embeddings=False), reducer=MeanReducer()
    )
    d = torch.cdist(x, y)
    torch.manual_seed(3)
    m = nb.choose_triplets(x_labels, y_labels, d if semi_hard else None)
    s = nb.choose_triplets(y_labels, x_labels, d.T if semi_hard else None)
    theirs = loss_fn(x, x_labels, m, y, y_labels) + loss_fn(y, y_labels, s, x, x_labels)
    torch.manual_seed(3)  # the same luck, so the same triplets
    ours, _ = nb.two_sided_loss(x, x_labels, y, y_labels, semi_hard=semi_hard, alpha=alpha)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_triplet_terms_are_torchs(nb):
    x, x_labels, y, y_labels = _two_domains(3)
    a, p, n = triplets = nb.choose_triplets(x_labels, y_labels)
    expected = F.triplet_margin_loss(x[a], y[p], y[n], margin=0.2, reduction="none")
    assert torch.allclose(nb.triplet_terms(x, y, triplets, 0.2), expected, atol=1e-6)


@pytest.mark.parametrize("semi_hard", [False, True])
def test_loss_and_active_share_of_perfect_and_of_swapped_clusters(nb, semi_hard):
    x, labels = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([0, 1])
    loss, active = nb.two_sided_loss(x, labels, x + 0.01, labels, semi_hard=semi_hard)
    assert loss == 0 and active == 0
    loss, active = nb.two_sided_loss(x, labels, x.flip(0), labels, semi_hard=semi_hard)
    assert loss == pytest.approx(2 * 10.2, rel=1e-5) and active == 1


@pytest.mark.parametrize("semi_hard", [False, True])
def test_gradient_is_finite_where_points_coincide(nb, semi_hard):
    x = torch.zeros(4, 8, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    loss, _ = nb.two_sided_loss(x, labels, torch.zeros(4, 8), labels, semi_hard=semi_hard)
    loss.backward()
    assert torch.isfinite(x.grad).all()


# ---- retrieval -----------------------------------------------------------------------


def test_neighbours_are_scikit_learns(nb):
    from sklearn.neighbors import NearestNeighbors

    x, x_labels, y, y_labels = _two_domains(1, n=1200, m=300)
    theirs = NearestNeighbors(n_neighbors=5).fit(y.numpy()).kneighbors(x.numpy())
    distances, indices = nb.rank_gallery(x, y, 5)
    assert (indices.numpy() == theirs[1]).all()
    assert np.allclose(distances.numpy(), theirs[0], atol=1e-4)
    expected = 100 * (y_labels[theirs[1][:, 0]] == x_labels).double().mean().item()
    assert nb.top1(x, x_labels, y, y_labels) == pytest.approx(expected)


@pytest.mark.parametrize("same_set", [False, True])
def test_scores_are_those_of_accuracy_calculator(nb, same_set):
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    from pytorch_metric_learning.distances import LpDistance

    x, x_labels, y, y_labels = _two_domains(2, n=1100, m=80, digits=5)
    if same_set:
        y, y_labels = x, x_labels
    calculator = accuracy.AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision"), k=None, device=torch.device("cpu"),
        knn_func=inference.CustomKNN(LpDistance(normalize_embeddings=False)),
    )  # fmt: skip
    theirs = calculator.get_accuracy(x, x_labels, y, y_labels, ref_includes_query=same_set)
    ours = nb.retrieval_scores(x, x_labels, y, y_labels, same_set=same_set)
    assert ours["top1"] == pytest.approx(100 * theirs["precision_at_1"], abs=1e-3)
    assert ours["map"] == pytest.approx(100 * theirs["mean_average_precision"], abs=0.01)


def test_average_precision_by_hand(nb):
    """Right, wrong, right: (1/1 + 2/3) / 2."""
    gallery, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([4, 5, 4])
    scores = nb.retrieval_scores(torch.zeros(1, 1), torch.tensor([4]), gallery, labels)
    assert scores["top1"] == 100 and scores["map"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    missing = nb.retrieval_scores(torch.zeros(1, 1), torch.tensor([9]), gallery, labels)
    assert missing == {"top1": 0, "top5": 0, "map": 0}


def test_a_query_is_not_its_own_neighbour(nb):
    x, labels, _, _ = _two_domains(4, n=1050)
    _, order = nb.rank_gallery(x, x, same_set=True)
    assert order.shape == (1050, 1049)
    assert not (order == torch.arange(1050)[:, None]).any()
    assert (nb.rank_gallery(x, x, 1)[1][:, 0] == torch.arange(1050)).all()
    lonely = nb.retrieval_scores(
        x[:3], torch.tensor([0, 1, 2]), x[:3], torch.tensor([0, 1, 2]), same_set=True
    )
    assert lonely["top1"] == 0


@pytest.mark.parametrize("k, same_set", [(0, False), (6, False), (5, True)])
def test_impossible_k_is_an_error(nb, k, same_set):
    with pytest.raises(ValueError, match="k must be between 1 and"):
        nb.rank_gallery(torch.rand(5, 2), torch.rand(5, 2), k, same_set=same_set)


def test_same_set_needs_equal_lengths(nb):
    with pytest.raises(ValueError, match="one length"):
        nb.rank_gallery(torch.rand(5, 2), torch.rand(4, 2), same_set=True)


def test_confusion_counts_every_query(nb):
    x, x_labels, y, y_labels = _two_domains(5)
    counts = nb.nearest_confusion(x, x_labels, y, y_labels)
    assert counts.shape == (10, 10)
    assert torch.equal(counts.sum(1), torch.bincount(x_labels, minlength=10))
    expected = nb.top1(x, x_labels, y, y_labels)
    assert 100 * counts.diagonal().sum() / len(x) == pytest.approx(expected)


# ---- towers and training -------------------------------------------------------------


@pytest.fixture()
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("A3_RUNS", str(tmp_path))
    monkeypatch.setenv("A3_PRECISION", "fp32")
    return tmp_path


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


@pytest.mark.parametrize("normalise", [False, True])
def test_towers(nb, normalise, monkeypatch):
    monkeypatch.setenv("A3_PRECISION", "fp32")
    torch.manual_seed(0)
    classifier = nb.StreetClassifier()
    model = nb.JointEmbedding(classifier, normalise=normalise).eval()
    split = _toy_split(3, 32, n=12)
    features = nb.street_features(classifier, split)
    assert features.shape == (12, 256) and features.dtype == torch.float32
    assert not any(m.training for m in classifier.features.modules())
    from_pixels = model(utils.to_float(split.images))
    assert torch.allclose(nb.embed_street(model, features), from_pixels, atol=1e-5)
    z = nb.embed_handwritten(model, _toy_split(1, 28, n=12))
    assert z.shape == (12, 64)
    if normalise:
        assert torch.allclose(z.norm(dim=1), torch.ones(12), atol=1e-5)


def test_training_moves_theta_and_w_and_leaves_g(nb, runs):
    torch.manual_seed(0)
    classifier = nb.StreetClassifier()
    digits, streets = _toy_split(1, 28, seed=1), _toy_split(3, 32, seed=2)
    features = nb.street_features(classifier, streets)
    model = nb.JointEmbedding(classifier, normalise=True)
    model.train()
    assert not any(m.training for m in model.g.modules()) and model.f[0].training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = nb.triplet_batches(
        digits, features, streets.labels, size=32, steps=6, device=torch.device("cpu")
    )
    history = nb.train_embedding(
        model, batches, semi_hard=True, run="test", epochs=3, steps_per_epoch=6, lr=3e-3,
        schedule="constant", evaluate=None, settings={},
    )  # fmt: skip
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("g."))
    assert all(
        not torch.equal(v, before[k]) for k, v in after.items() if k in ("f.0.weight", "W.weight")
    )
    assert history.last["train_loss"] < history.rows[0]["train_loss"]
    assert 0 <= history.last["train_active"] <= 100


def test_batches_hold_different_digits_and_repeat_by_seed(nb):
    digits, features = _toy_split(1, 28, n=40), torch.arange(30.0)[:, None]
    labels = torch.arange(30) % 10
    batches = nb.triplet_batches(
        digits, features, labels, size=16, steps=3, device=torch.device("cpu")
    )
    first, again, other = list(batches(0)), list(batches(0)), list(batches(1))
    assert len(first) == 3
    for (images, x_labels, f, y_labels), same in zip(first, again, strict=True):
        assert images.shape == (16, 1, 28, 28) and len(x_labels) == 16
        assert len(f.unique()) == 16 and torch.equal(labels[f[:, 0].long()], y_labels)
        assert all(
            torch.equal(a, b) for a, b in zip((images, x_labels, f, y_labels), same, strict=True)
        )
    assert not torch.equal(first[0][2], other[0][2])


# ---- where g comes from --------------------------------------------------------------


def _street(real: bool) -> utils.DigitData:
    split = _toy_split(3, 32, n=64)
    return utils.DigitData("toy streets", split, split.first(32), real=real)


def test_published_weights_are_read_and_renumbered(nb, runs, monkeypatch):
    """The published head's class k is the digit k + 1: 1, 2, ..., 9, 0."""
    torch.manual_seed(1)
    published = nb.StreetClassifier().eval()
    plain = {k: v for k, v in published.state_dict().items() if "num_batches" not in k}  # torch 0.3

    def fake_download(urls, path, checksum, timeout):
        assert urls == [nb.PUBLISHED_G] and checksum == "sha256:f564f3d8" and timeout <= 10
        torch.save(plain, path)

    monkeypatch.setattr(utils, "download", fake_download)
    model, origin = nb.pretrained_classifier(_street(True), pictures=64, device=torch.device("cpu"))
    images = torch.randn(4, 3, 32, 32)
    assert "published" in origin and not model.training
    assert torch.allclose(model(images).roll(-1, 1), published(images), atol=1e-6)


def test_without_network_g_is_trained_and_says_so(nb, runs, monkeypatch, capsys):
    def no_network(*_, **__):
        raise utils.DownloadError("no network")

    monkeypatch.setattr(utils, "download", no_network)
    model, origin = nb.pretrained_classifier(_street(True), pictures=64, device=torch.device("cpu"))
    assert "trained in this notebook" in origin and "no network" in capsys.readouterr().out
    assert not model.training


def _write_weights(nb, folder, **changed):
    path = folder / "street_classifier.pt"
    model = nb.StreetClassifier()
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path
    )
    facts = {"street_version": utils.STREET_VERSION,
             "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **changed}  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(facts))
    return path, model.eval()


def test_our_weights_are_read(nb, tmp_path):
    path, model = _write_weights(nb, tmp_path)
    read = nb.our_classifier(path)
    images = torch.randn(2, 3, 32, 32)
    assert next(read.parameters()).dtype == torch.float32
    assert torch.allclose(read(images), model(images), atol=0.02)


@pytest.mark.parametrize("changed", [{"street_version": "old"}, {"sha256": "0" * 64}])
def test_weights_of_another_renderer_or_damaged_are_refused(nb, tmp_path, changed):
    path, _ = _write_weights(nb, tmp_path, **changed)
    with pytest.raises(ValueError, match="street_classifier"):
        nb.our_classifier(path)


def test_committed_weights_are_what_their_json_says(nb, request):
    path = request.config.rootpath / nb.OUR_G
    if not path.exists():
        pytest.skip("no weights of g here: the notebook trains it")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert utils.has_checksum(path, "sha256:" + facts["sha256"])
    assert path.stat().st_size < 3_000_000
    if facts["street_version"] != utils.STREET_VERSION:
        pytest.fail("weights/street_classifier.pt is of another renderer; run its recipe again")
    model = nb.our_classifier(path)
    images, labels = utils.render_street_numbers(400, 99, utils.SEEN_FAMILIES)
    found = utils.accuracy(utils.predict(model, utils.Split(images, labels)), labels)
    assert found > facts["accuracy"]["test"] - 5


@pytest.mark.parametrize("alpha", [-0.1, float("nan")])
def test_a_margin_below_zero_is_refused(nb, alpha):
    z, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="alpha"):
        nb.two_sided_loss(z, labels, z, labels, semi_hard=False, alpha=alpha)
