"""Question 1 (e): triplets, their loss, nearest neighbors, the encoders, and a frozen g."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import patterns, seeded
from sklearn.neighbors import NearestNeighbors
from torch import nn

import utils


def embedded(nb, count, seed, dimensions=8):
    """Random embeddings with random labels."""
    generator = seeded(seed)
    z = torch.randn(count, dimensions, generator=generator)
    return nb.LabeledVectors(z, torch.randint(0, 10, (count,), generator=generator))


def test_random_triplets_reach_every_positive_and_every_negative_equally_and_independently(nb):
    torch.manual_seed(0)
    labels = torch.tensor([1, 1, 1, 0, 2, 2])
    anchors = nb.LabeledVectors(torch.zeros(9000, 2), torch.ones(9000).long())
    others = nb.LabeledVectors(torch.zeros(6, 2), labels)
    positive, negative = nb.mine_triplets(anchors, others, semi_hard=False)
    pairs = Counter(zip(positive.tolist(), negative.tolist(), strict=True))
    assert set(pairs) == {(p, n) for p in (0, 1, 2) for n in (3, 4, 5)}
    assert all(abs(count - 1000) < 150 for count in pairs.values())  # standard deviation 30


def test_a_semi_hard_negative_is_the_nearest_beyond_the_positive_else_the_farthest(nb):
    torch.manual_seed(0)
    x, y = embedded(nb, 500, 1), embedded(nb, 50, 2)
    distances = torch.cdist(x.vectors, y.vectors)
    positive, negative = nb.mine_triplets(x, y, semi_hard=True)
    assert (y.labels[positive] == x.labels).all()
    fallbacks = 0
    for row, label, p, n in zip(distances, x.labels, positive, negative, strict=True):
        negatives = row[y.labels != label]
        farther = negatives[negatives > row[p]]
        fallbacks += not len(farther)
        assert row[n] == (farther.min() if len(farther) else negatives.max())
    assert fallbacks
    assert len(positive.unique()) == 50  # drawn at random


class Identity(nn.Module):
    """An embedding that leaves its input as it is."""

    embed_images = embed_features = staticmethod(lambda z: z)


@pytest.mark.parametrize("name", ["one-cycle", "semi-hard", "refined"])
def test_the_loss_is_torchs_summed_over_both_sides_means_over_anchors(nb, name):
    variant = nb.VARIANTS[name]
    assert variant.margin == (1.0 if name == "refined" else 0.2)
    assert variant.semi_hard == (name != "one-cycle")
    x, y = embedded(nb, 60, 7), embedded(nb, 50, 8)
    assert set(x.labels.tolist()) == set(y.labels.tolist()) == set(range(10))
    torch.manual_seed(3)
    sides = []
    for anchors, others in ((x, y), (y, x)):
        p, n = nb.mine_triplets(anchors, others, variant.semi_hard)
        rows = (anchors.vectors, others.vectors[p], others.vectors[n])
        sides.append(nn.TripletMarginLoss(variant.margin, reduction="none")(*rows))
    torch.manual_seed(3)  # the same random numbers, so the same triplets
    loss, metrics = nb.embedding_loss(
        Identity(), (x.vectors, x.labels, y.vectors, y.labels), variant
    )
    assert torch.allclose(loss, sum(side.mean() for side in sides))
    active = 100 * np.mean([(side > 0).double().mean() for side in sides])
    assert metrics["active"].item() == pytest.approx(active)


@pytest.mark.parametrize("semi_hard", [False, True])
def test_the_loss_of_one_point_has_finite_gradients(nb, semi_hard):
    same = nb.LabeledVectors(torch.zeros(2, 2, requires_grad=True), torch.tensor([0, 1]))
    nb.cross_domain_loss(same, same, semi_hard, 0.2)[0].backward()
    assert torch.isfinite(same.vectors.grad).all()


@pytest.mark.parametrize("name", ["suggested", "semi-hard"])
def test_no_step_of_the_embedding_waits_for_a_gpu(nb, name):
    """On the device 'meta' there are shapes but no values: reading one is an error there."""
    model = nb.JointEmbedding(nb.StreetClassifier(), nb.Recipe(side=24)).to("meta")
    labels = torch.zeros(8, device="meta").long()
    batch = torch.empty(8, 1, 24, 24, device="meta"), labels, torch.empty(8, 256).to("meta"), labels
    loss, _ = nb.embedding_loss(model, batch, nb.VARIANTS[name])
    loss.backward()


def test_neighbors_are_those_of_scikit_learn(nb):
    x, y = embedded(nb, 2100, 1), embedded(nb, 300, 2)
    distances, indices = nb.nearest_neighbors(x.vectors, y.vectors, 5)
    exact = NearestNeighbors(n_neighbors=5).fit(y.vectors.numpy()).kneighbors(x.vectors.numpy())
    assert np.allclose(distances, exact[0], atol=1e-4)
    assert (indices.numpy() == exact[1]).all()
    hits = y.labels[indices[:, 0]] == x.labels
    assert nb.top1(x, y) == pytest.approx(100 * hits.double().mean().item())


def test_a_draw_has_100_queries_and_2000_gallery_images_and_repeats_none(nb):
    draw, again, another = (nb.draw_indices(seed, 10_000, 60_000) for seed in (0, 0, 1))
    assert (len(draw[0].unique()), len(draw[1].unique())) == (100, 2_000)
    for indices, same, other, size in zip(draw, again, another, (10_000, 60_000), strict=True):
        assert torch.equal(indices, same)
        assert not torch.equal(indices, other)
        assert 0.9 * size < indices.max() < size  # from all of them


def test_top1_of_draws_asks_100_and_all_queries_of_each_draws_gallery(nb):
    x, y = embedded(nb, 150, 2), embedded(nb, 2_500, 3)
    scores = nb.top1_of_draws(x, y, draws=3)
    for seed in range(3):
        few, gallery = nb.draw_indices(seed, 150, 2_500)
        gallery = nb.LabeledVectors(y.vectors[gallery], y.labels[gallery])
        assert scores["100"][seed] == nb.top1(
            nb.LabeledVectors(x.vectors[few], x.labels[few]), gallery
        )
        assert scores["all"][seed] == nb.top1(x, gallery)


def test_stored_features_give_the_embedding_of_the_pixels(nb):
    torch.manual_seed(0)
    network, split = nb.StreetClassifier(), patterns(12, 0, 3, 32)
    model = nb.JointEmbedding(network, nb.BASELINE)
    features = nb.street_features(network, split)
    assert (features.shape, features.dtype) == ((12, 256), torch.float32)
    z = nb.embed_street(model, features)
    pooled = network.features.eval()(utils.to_float(split.images)).mean((2, 3))
    expected = pooled @ model.W.weight.T + model.W.bias
    assert torch.allclose(z, expected, atol=1e-5)
    assert torch.allclose(model(utils.to_float(split.images)), expected, atol=1e-5)
    handwritten = utils.predict(model, patterns(12, 0, size=28))
    assert handwritten.shape == z.shape == (12, 64)


@pytest.fixture
def data(nb):
    """What an embedding is trained on; the features tell the digit."""
    labels = torch.arange(90) % 10
    street = nb.LabeledVectors(F.one_hot(labels, 256).float() * 3, labels)
    digits = patterns(440, 1, size=28)
    return nb.EmbeddingData(digits.first(300), digits.take(range(300, 440)), street)


def test_a_batch_has_256_of_each_set_or_all_each_with_its_label_and_order(nb, data):
    marks = torch.arange(256)  # an image or feature is its own number
    digits = utils.Split(marks.to(torch.uint8).view(-1, 1, 1, 1), marks % 10)
    street = nb.LabeledVectors(torch.arange(300.0).view(-1, 1), (torch.arange(300) + 3) % 10)
    plan = utils.Plan("x", epochs=2, steps_per_epoch=3, seed=1)
    loader = nb.JointLoader(digits, street, nb.BASELINE, plan)
    batches = [*loader.epoch(0), *loader.epoch(1)]
    assert len(batches) == 6
    orders = []
    for images, x_labels, features, y_labels in batches:
        x_marks = ((images.flatten() + 1) * 127.5).round().long()
        y_marks = features.flatten().long()
        assert torch.equal(x_labels, x_marks % 10)
        assert torch.equal(y_labels, (y_marks + 3) % 10)
        assert len(x_marks.unique()) == len(y_marks.unique()) == 256
        orders += [x_marks, y_marks]
    for number, order in enumerate(orders):
        assert all((order == other).sum() < 15 for other in orders[:number])
    other_seed = nb.JointLoader(digits, street, nb.BASELINE, replace(plan, seed=2)).epoch(0)
    assert not torch.equal(next(other_seed)[2], batches[0][2])
    few = next(nb.JointLoader(digits, data.street, nb.BASELINE, plan).epoch(0))
    assert len(few[3]) == 90


@pytest.mark.parametrize("name", ["suggested", "refined"])
def test_a_training_follows_its_variant_and_watches_held_out_images(nb, data, monkeypatch, name):
    handed = []
    monkeypatch.setattr(utils, "fit", lambda *arguments: handed.extend(arguments))
    variant, plan = nb.VARIANTS[name], utils.Plan("x", epochs=2, steps_per_epoch=3, seed=1)
    model, _ = nb.train_embedding(variant, nb.StreetClassifier(), data, plan)
    _, _, batches, loss_fn, done = handed
    assert replace(done, evaluate=None) == replace(plan, lr=variant.lr, schedule=variant.schedule)
    assert loss_fn.keywords == {"variant": variant}
    assert bool(len(model.prepare)) == (name == "refined")
    expected = nb.JointLoader(data.handwritten, data.street, variant.recipe, plan).epoch(0)
    assert torch.equal(next(batches(0))[0], next(expected)[0])
    held_out = nb.LabeledVectors(utils.predict(model, data.held_out), data.held_out.labels)
    gallery = nb.LabeledVectors(nb.embed_street(model, data.street.vectors), data.street.labels)
    top1 = nb.top1(held_out, gallery)
    assert done.evaluate(model) == {"val_top1": top1}
    # Each of the 20 draws takes all of so small a gallery.
    assert nb.validation_top1(model, data) == pytest.approx(top1)


def test_a_training_lowers_the_loss_moves_theta_and_w_and_leaves_g_bit_for_bit(nb, data):
    torch.manual_seed(0)
    network = nb.StreetClassifier()
    plan = utils.Plan("x", epochs=2, steps_per_epoch=9, seed=1)
    utils.seed_torch(plan.seed)
    before = copy.deepcopy(nb.JointEmbedding(network, nb.BASELINE).state_dict())
    model, history = nb.train_embedding(nb.VARIANTS["semi-hard"], network, data, plan)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["val_top1"] > 90
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if not name.startswith("g.")}


def test_g_has_the_dropout_that_is_asked_for(nb):
    layers = nb.StreetClassifier(dropout=0.05).modules()
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.05] * 7


def test_g_has_no_dropout_and_no_gradients_in_training(nb):
    model = nb.JointEmbedding(nb.StreetClassifier(), nb.BASELINE).train()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    assert not any(parameter.requires_grad for parameter in model.g.parameters())
    assert all(part.training for part in model.f.modules())
