"""The rendered street numbers: reproducible, well-formed, readable, and of an unchanged look."""

import time

import numpy as np
import pytest
import torch

import utils

LOOK = {"mean": [122.29, 121.86, 124.48], "std": [62.77, 61.65, 63.01], "contrast": 29.09}


@pytest.fixture(scope="module")
def street():
    return utils.offline_module("street_numbers")


@pytest.fixture(scope="module")
def crops(street):
    return street.render_street_numbers(1500, 5)


def test_shapes_types_and_balance(crops):
    images, labels = crops
    assert images.shape == (1500, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (1500,) and labels.dtype == torch.int64
    # A fair draw: 150 each, standard deviation 11.6; five of those either way.
    assert (torch.bincount(labels, minlength=10) - 150).abs().max() < 58


def test_the_look_is_that_of_the_committed_weights(crops):
    """Statistics, as bytes depend on the versions of the libraries and on the processor."""
    images, labels = crops
    assert labels[:12].tolist() == [1, 4, 7, 5, 6, 0, 2, 3, 8, 4, 9, 0]
    assert images.float().mean((0, 2, 3)).tolist() == pytest.approx(LOOK["mean"], abs=0.5)
    assert images.float().std((0, 2, 3)).tolist() == pytest.approx(LOOK["std"], abs=0.5)
    contrast = images.float().mean(1).flatten(1).std(1)
    assert contrast.median().item() == pytest.approx(LOOK["contrast"], abs=0.5)
    assert contrast.min() > 1  # every crop shows something
    assert (images[:, 0] != images[:, 2]).flatten(1).any(1).float().mean() > 0.95  # in color


def test_same_seed_same_bytes_whatever_the_threads(street):
    before = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try:
        torch.set_num_threads(1)
        one = street.render_street_numbers(251, 7)  # one more than a chunk
        torch.set_num_threads(2)
        two = street.render_street_numbers(251, 7)
        assert torch.get_num_threads() == 2  # the caller's setting survives
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(torch.rand(4), expected)  # and so does torch's own generator
    assert not torch.equal(street.render_street_numbers(251, 8)[0], one[0])


def test_every_face_has_ten_different_glyphs(street):
    for face in [face for family in street.FONT_FAMILIES.values() for face in family]:
        fields, half_widths, _ = street._glyph_fields(*face)
        ink = (fields > 0).flatten(1)
        assert ink.any(1).all() and (half_widths > 0.03).all() and (half_widths < 0.7).all()
        digits = ink[:10].float()
        assert torch.cdist(digits, digits).fill_diagonal_(99).min() > 5


@pytest.mark.parametrize("count", [0, -3])
def test_bad_count(street, count):
    with pytest.raises(ValueError, match="count"):
        street.render_street_numbers(count, 0)


def test_a_thousand_crops_take_seconds(street):
    start = time.process_time()
    street.render_street_numbers(500, 1)
    assert time.process_time() - start < 2.5


def test_digits_are_readable(crops):
    """A ridge regression on raw pixels, the bluntest reader there is, is far above chance."""
    images, labels = crops
    gray = images.float().mean(1)
    gray = gray - gray.mean((1, 2), keepdim=True)
    gray = gray / gray.std((1, 2), keepdim=True).clamp(min=1.0)
    sign = gray[:, 8:24, 11:21].mean((1, 2)).sign().view(-1, 1)  # the middle against the border
    x, y = gray.flatten(1) * torch.where(sign == 0, 1.0, sign), torch.eye(10)[labels]
    train, test = slice(0, 1200), slice(1200, None)
    gram = x[train].T @ x[train] + 3000 * torch.eye(1024)
    guesses = (x[test] @ torch.linalg.solve(gram, x[train].T @ y[train])).argmax(1)
    assert (guesses == labels[test]).float().mean() > 0.3
    shuffled = labels[test][torch.from_numpy(np.random.RandomState(0).permutation(300))]
    assert (guesses == shuffled).float().mean() < 0.17


def test_stand_ins_are_rendered_once_and_again_after_a_change(monkeypatch, street):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    first = utils.load_street()
    assert (len(first.train), len(first.test), first.real) == (512, 256, False)
    assert first.name == "rendered street numbers"
    render, made = street.render_street_numbers, []
    monkeypatch.setattr(street, "render_street_numbers", lambda *a: made.append(a) or render(*a))
    assert torch.equal(utils.load_street().train.images, first.train.images) and not made
    monkeypatch.setattr(street, "versions", lambda: ["another version of matplotlib"])
    utils.load_street()
    assert made == [(512, 1), (256, 2)]
