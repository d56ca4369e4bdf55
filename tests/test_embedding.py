"""Question 1 (e): triplets, their loss, nearest neighbors, the encoders, and a frozen g."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import nn

import utils

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=25)


def embedded(nb, count, seed, dimensions=8):
    """Random embeddings with random labels."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, dimensions, generator=generator)
    return nb.Digits(z, torch.randint(0, 10, (count,), generator=generator))


def bars(count, channels, size, seed=0):
    """Noise with a bright bar whose place tells the digit: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 60, (count, channels, size, size), generator=generator)
    for image, digit in zip(images, labels.tolist(), strict=True):
        image[:, 2 + 2 * digit : 5 + 2 * digit] += 180
    return utils.Split(images.to(torch.uint8), labels)


# ---- triplets ----


@settings(max_examples=60, deadline=None)
@given(anchors=LABELS, others=LABELS, semi_hard=st.booleans(), seed=st.integers(0, 99))
def test_positives_share_the_anchors_digit_negatives_do_not_and_the_mask_tells_who_has_both(
    nb, anchors, others, semi_hard, seed
):
    torch.manual_seed(seed)
    a, o = torch.tensor(anchors), torch.tensor(others)
    distances = torch.rand(len(anchors), len(others)) if semi_hard else None
    positive, negative, usable = nb.mine_triplets(a, o, distances)
    assert usable.tolist() == [one in others and set(others) != {one} for one in anchors]
    assert (o[positive] == a)[usable].all()
    assert (o[negative] != a)[usable].all()


def test_random_triplets_reach_every_positive_and_every_negative_equally_and_independently(nb):
    torch.manual_seed(0)
    labels = torch.tensor([1, 1, 1, 0, 2, 2])
    positive, negative, _ = nb.mine_triplets(torch.ones(9000).long(), labels)
    pairs = Counter(zip(positive.tolist(), negative.tolist(), strict=True))
    assert set(pairs) == {(p, n) for p in (0, 1, 2) for n in (3, 4, 5)}
    assert all(abs(count - 1000) < 150 for count in pairs.values())  # standard deviation 30


def test_a_semi_hard_negative_is_the_nearest_beyond_the_positive_else_the_farthest(nb):
    torch.manual_seed(0)
    x, y = embedded(nb, 500, 1), embedded(nb, 50, 2)
    distances = torch.cdist(x.z, y.z)
    positive, negative, usable = nb.mine_triplets(x.labels, y.labels, distances)
    assert usable.all()
    fallbacks = 0
    for row, label, p, n in zip(distances, x.labels, positive, negative, strict=True):
        negatives = row[y.labels != label]
        farther = negatives[negatives > row[p]]
        fallbacks += not len(farther)
        assert row[n] == (farther.min() if len(farther) else negatives.max())
    assert fallbacks
    assert len(positive.unique()) == 50  # drawn at random


# ---- the loss ----


def test_the_bracket_is_torchs_triplet_margin_loss_row_by_row(nb):
    rows = [torch.randn(20, 64) for _ in range(3)]
    for margin in (0.2, 1.5):
        expected = nn.TripletMarginLoss(margin, reduction="none")(*rows)
        assert torch.allclose(nb.triplet_losses(*rows, margin), expected)


@pytest.mark.parametrize("semi_hard", [False, True])
def test_the_loss_is_the_sum_of_both_sides_means_over_usable_anchors(nb, semi_hard):
    x, y = embedded(nb, 60, 7), embedded(nb, 50, 8)
    x.labels[:5] = 3
    y.labels[y.labels == 3] = 4  # no positive for digit 3
    distances = torch.cdist(x.z, y.z)
    torch.manual_seed(3)
    sides = []
    for anchors, others, d in ((x, y, distances), (y, x, distances.T)):
        triplet = nb.mine_triplets(anchors.labels, others.labels, d if semi_hard else None)
        p, n, usable = triplet
        assert usable.all() == (anchors is y)
        rows = [part[usable] for part in (anchors.z, others.z[p], others.z[n])]
        sides.append(nn.TripletMarginLoss(0.2, reduction="none")(*rows))
    torch.manual_seed(3)  # the same random numbers, so the same triplets
    loss, active = nb.cross_domain_loss(x, y, semi_hard)
    assert torch.allclose(loss, sum(side.mean() for side in sides))
    expected = np.mean([(side > 0).double().mean() for side in sides])
    assert active.item() == pytest.approx(expected)
    assert 0 < expected < 1


@pytest.mark.parametrize("semi_hard", [False, True])
def test_the_loss_of_perfect_and_of_swapped_clusters_and_of_one_point(nb, semi_hard):
    z, labels = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([0, 1])
    x = nb.Digits(z, labels)
    loss, active = nb.cross_domain_loss(x, nb.Digits(z + 0.01, labels), semi_hard)
    assert (loss, active) == (0, 0)
    loss, active = nb.cross_domain_loss(x, nb.Digits(z.flip(0), labels), semi_hard)
    assert (loss.item(), active) == (pytest.approx(2 * 10.2, rel=1e-5), 1)
    same = nb.Digits(torch.zeros(2, 2, requires_grad=True), labels)
    nb.cross_domain_loss(same, same, semi_hard)[0].backward()
    assert torch.isfinite(same.z.grad).all()
    alone = nb.Digits(z.requires_grad_(), torch.zeros(2).long())  # no negative anywhere
    loss, active = nb.cross_domain_loss(alone, alone, semi_hard)
    loss.backward()
    assert (loss, active, z.grad.abs().sum()) == (0, 0, 0)


@pytest.mark.parametrize("semi_hard", [False, True])
def test_no_step_of_the_embedding_waits_for_a_gpu(nb, semi_hard):
    """On the device 'meta' there are shapes but no values: reading one is an error there."""
    model = nb.JointEmbedding(nb.StreetClassifier(), True, True).to("meta")
    labels = torch.zeros(8, device="meta").long()
    batch = torch.empty(8, 1, 24, 24, device="meta"), labels, torch.empty(8, 256).to("meta"), labels
    loss, _ = nb.embedding_loss(model, batch, semi_hard)
    loss.backward()


# ---- evaluation ----


def test_neighbors_are_those_of_brute_force_and_of_scikit_learn(nb):
    x, y = embedded(nb, 2100, 1), embedded(nb, 300, 2)
    distances, indices = nb.nearest_neighbors(x.z, y.z, 5)
    brute = np.linalg.norm(x.z.double().numpy()[:, None] - y.z.double().numpy()[None], axis=2)
    assert (indices.numpy() == brute.argsort(1)[:, :5]).all()
    assert np.allclose(distances, np.sort(brute, 1)[:, :5], atol=1e-4)
    theirs = NearestNeighbors(n_neighbors=5).fit(y.z.numpy()).kneighbors(x.z.numpy())[1]
    assert (indices.numpy() == theirs).all()
    hits = (y.labels[theirs[:, 0]] == x.labels).numpy()
    assert (nb.top1_hits(x, y).numpy() == hits).all()
    assert nb.top1(x, y) == pytest.approx(100 * hits.mean())


def test_a_draw_has_100_queries_and_2000_gallery_images_and_repeats_none(nb):
    few, gallery = nb.sample_protocol(0, 100, 2_000)  # all there are
    assert (few.sort().values == torch.arange(100)).all()
    assert (gallery.sort().values == torch.arange(2_000)).all()
    draw, again, another = (nb.sample_protocol(seed, 10_000, 60_000) for seed in (0, 0, 1))
    for indices, same, other, size in zip(draw, again, another, (10_000, 60_000), strict=True):
        assert torch.equal(indices, same)
        assert not torch.equal(indices, other)
        assert indices.max() > 0.9 * size  # from all of them
    assert (len(draw[0]), len(draw[1])) == (100, 2_000)


def test_top1_of_draws_asks_100_and_all_queries_of_each_draws_gallery(nb):
    x, y = embedded(nb, 150, 2), embedded(nb, 2_500, 3)
    scores = nb.top1_of_draws(x, y, draws=3)
    for seed in range(3):
        few, gallery = nb.sample_protocol(seed, 150, 2_500)
        gallery = nb.Digits(y.z[gallery], y.labels[gallery])
        assert scores["100"][seed] == nb.top1(nb.Digits(x.z[few], x.labels[few]), gallery)
        assert scores["all"][seed] == nb.top1(x, gallery)
    assert len(scores["100"]) == len(scores["all"]) == 3


# ---- encoders ----


@pytest.mark.parametrize(("small", "unit_sphere"), [(False, False), (True, True)])
def test_stored_features_give_the_embedding_of_the_pixels(nb, small, unit_sphere):
    torch.manual_seed(0)
    network, split = nb.StreetClassifier(), bars(12, 3, 32)
    model = nb.JointEmbedding(network, small, unit_sphere)
    features = nb.street_features(network, split)
    assert (features.shape, features.dtype) == ((12, 256), torch.float32)
    z = nb.embed_street(model, features)
    pooled = network.features.eval()(utils.to_float(split.images)).mean((2, 3))
    expected = pooled @ model.W.weight.T + model.W.bias
    if unit_sphere:
        expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(z, expected, atol=1e-5)
    assert torch.allclose(model(utils.to_float(split.images)), expected, atol=1e-5)
    handwritten = utils.predict(model, bars(12, 1, 28))
    assert handwritten.shape == z.shape == (12, 64)
    assert torch.allclose(handwritten.norm(dim=1), torch.ones(12), atol=1e-5) == unit_sphere


# ---- training ----


@pytest.fixture
def data(nb):
    """What an embedding is trained on; the features tell the digit."""
    labels = torch.arange(90) % 10
    street = nb.Digits(F.one_hot(labels, 256).float() * 3, labels)
    return nb.EmbeddingData(bars(300, 1, 28, 1), bars(40, 1, 28, 2), street)


def test_a_batch_has_256_of_each_set_or_all_each_with_its_label_and_order(nb, data):
    digits = utils.Split(
        torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(250) % 10
    )
    digits = digits.take(np.arange(300) % 250)
    plan = utils.Plan("x", epochs=2, steps=3, seed=1)
    street = nb.Digits(torch.arange(300.0).view(-1, 1), (torch.arange(300) + 3) % 10)
    batches = list(nb.TripletLoader(digits, street, nb.BASELINE, plan).epoch(0))
    assert len(batches) == 3
    orders = []
    for images, x_labels, features, y_labels in batches:
        assert len(images) == len(x_labels) == len(features) == len(y_labels) == 256
        x_marks = ((images.flatten() + 1) * 127.5).round().long()
        y_marks = features.flatten().long()
        assert torch.equal(x_labels, x_marks % 10)
        assert torch.equal(y_labels, (y_marks + 3) % 10)
        assert len(y_marks.unique()) == 256  # none twice
        orders += [x_marks, y_marks]
    for number, order in enumerate(orders):
        assert all((order == other).sum() < 15 for other in orders[:number])
    few = next(nb.TripletLoader(digits, data.street, nb.BASELINE, plan).epoch(0))
    assert len(few[2].unique(dim=0)) == 10
    assert len(few[3]) == 90
    other = next(nb.TripletLoader(digits, street, nb.BASELINE, plan).epoch(1))
    assert not torch.equal(other[2], batches[0][2])


@pytest.mark.parametrize("name", ["suggested", "both"])
def test_a_training_follows_its_variant_and_watches_held_out_images(nb, data, monkeypatch, name):
    handed = []
    monkeypatch.setattr(utils, "fit", lambda *arguments: handed.extend(arguments))
    variant, plan = nb.VARIANTS[name], utils.Plan("x", epochs=2, steps=3, seed=1)
    network = nb.StreetClassifier()
    model, _ = nb.train_embedding(variant, network, data, plan)
    utils.seed_torch(plan.seed)
    started = nb.JointEmbedding(network, variant.small, variant.unit_sphere)
    assert torch.equal(model.W.weight, started.W.weight)
    _, _, batches, loss_fn, done = handed
    assert replace(done, evaluate=None) == replace(plan, lr=variant.lr, schedule=variant.schedule)
    assert loss_fn.keywords == {"semi_hard": variant.semi_hard}
    recipe = nb.Recipe(side=24 if variant.small else None)
    expected = nb.TripletLoader(data.digits, data.street, recipe, plan).epoch(0)
    assert torch.equal(next(batches(0))[0], next(expected)[0])
    held_out = nb.Digits(utils.predict(model, data.held_out), data.held_out.labels)
    gallery = nb.Digits(nb.embed_street(model, data.street.z), data.street.labels)
    assert done.evaluate(model) == {"val_top1": nb.top1(held_out, gallery)}
    monkeypatch.setattr(nb, "top1_of_draws", lambda *sets: {"all": [nb.top1(*sets), 0.0]})
    mean = nb.top1(held_out, gallery) / 2
    assert nb.validation_top1(model, data.held_out, data.street) == mean


def test_a_training_lowers_the_loss_moves_theta_and_w_and_leaves_g_bit_for_bit(nb, data):
    torch.manual_seed(0)
    network = nb.StreetClassifier()
    before = {name: value.clone() for name, value in network.features.state_dict().items()}
    plan = utils.Plan("x", epochs=2, steps=6, seed=1)
    model, history = nb.train_embedding(nb.VARIANTS["both"], network, data, plan)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["val_top1"] > 90
    assert all(0 <= row["train_active"] <= 100 for row in history)
    for name, value in model.g.state_dict().items():
        assert torch.equal(value, before[name])
    utils.seed_torch(1)
    untrained = nb.JointEmbedding(network, True, True).state_dict()
    moved = {n for n, value in model.named_parameters() if not torch.equal(value, untrained[n])}
    assert moved == {n for n, _ in model.named_parameters() if not n.startswith("g.")}


def test_g_stays_in_eval_mode_and_asks_for_no_gradients(nb):
    model = nb.JointEmbedding(nb.StreetClassifier(), False, False).train()
    assert not any(part.training for part in model.g.modules())
    assert all(part.training for part in model.f.modules())
    assert not any(parameter.requires_grad for parameter in model.g.parameters())
    before = {name: value.clone() for name, value in model.g.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))  # no dropout
    assert all(torch.equal(value, before[name]) for name, value in model.g.state_dict().items())
    assert not any(part.training for part in model.eval().modules())
