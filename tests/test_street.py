"""The rendered street numbers: reproducible, well-formed, readable, honest about fonts."""

import numpy as np
import pytest
import torch

import utils


@pytest.fixture(scope="module")
def crops():
    """1,500 crops of the seen families, drawn once for the whole module."""
    return utils.render_street_numbers(1500, 5, utils.SEEN_FAMILIES)


def _flat(images: torch.Tensor) -> torch.Tensor:
    """Gray, standardised, polarity removed by the sign of centre minus border: n x 1024."""
    gray = images.float().mean(1)
    gray = gray - gray.mean((1, 2), keepdim=True)
    gray = gray / gray.std((1, 2), keepdim=True).clamp(min=1.0)
    sign = gray[:, 8:24, 11:21].mean((1, 2)).sign().view(-1, 1)
    return gray.flatten(1) * torch.where(sign == 0, 1.0, sign)


def test_shapes_types_and_ranges(crops):
    images, labels = crops
    assert images.shape == (1500, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (1500,) and labels.dtype == torch.int64
    assert labels.min() == 0 and labels.max() == 9
    # A fair draw: 150 each, standard deviation 11.6; five of those either way.
    assert (torch.bincount(labels, minlength=10) - 150).abs().max() < 58


def test_every_crop_shows_something(crops):
    images, _ = crops
    assert images.float().mean(1).flatten(1).std(1).min() > 1.0
    assert 70 < images.float().mean() < 180
    assert (images[:, 0] != images[:, 2]).flatten(1).any(1).float().mean() > 0.95  # in colour


def test_same_seed_same_bytes_whatever_the_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = utils.render_street_numbers(300, 7, utils.SEEN_FAMILIES)
        torch.set_num_threads(2)
        two = utils.render_street_numbers(300, 7, utils.SEEN_FAMILIES)
        assert torch.get_num_threads() == 2  # the caller's setting survives
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_seeds_differ_and_global_generator_is_untouched():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one, _ = utils.render_street_numbers(50, 1, utils.SEEN_FAMILIES)
    assert torch.equal(torch.rand(4), expected)
    two, _ = utils.render_street_numbers(50, 2, utils.SEEN_FAMILIES)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("count", [1, 1001])
def test_counts_around_a_chunk(count):
    images, labels = utils.render_street_numbers(count, 0, utils.SEEN_FAMILIES[:1])
    assert len(images) == len(labels) == count


def test_families_are_split():
    assert set(utils.SEEN_FAMILIES).isdisjoint(utils.UNSEEN_FAMILIES)
    assert set(utils.SEEN_FAMILIES) | set(utils.UNSEEN_FAMILIES) == set(utils.FONT_FAMILIES)
    assert utils.UNSEEN_FAMILIES
    faces = [
        {face for name in names for face in utils.FONT_FAMILIES[name]}
        for names in (utils.SEEN_FAMILIES, utils.UNSEEN_FAMILIES)
    ]
    assert faces[0].isdisjoint(faces[1])


@pytest.mark.parametrize("family", utils.FONT_FAMILIES)
def test_every_family_has_ten_different_glyphs(family):
    for face in utils.FONT_FAMILIES[family]:
        fields, half_widths, _ = utils._glyph_fields(*face)
        ink = (fields > 0).flatten(1)
        assert ink.any(1).all() and (half_widths > 0.03).all() and (half_widths < 0.7).all()
        digits = ink[:10].float()
        assert torch.cdist(digits, digits).fill_diagonal_(99).min() > 5


@pytest.mark.parametrize("count", [0, -3])
def test_bad_count(count):
    with pytest.raises(ValueError, match="count"):
        utils.render_street_numbers(count, 0, utils.SEEN_FAMILIES)


@pytest.mark.parametrize("families", [(), ("Comic Sans",), "STIX"])
def test_bad_families_name_the_valid_ones(families):
    with pytest.raises(ValueError, match="DejaVu Sans"):
        utils.render_street_numbers(5, 0, families)


def test_digits_are_readable(crops):
    """A ridge regression on raw pixels, the bluntest reader there is, is far above chance."""
    images, labels = crops
    x, y = _flat(images), torch.eye(10)[labels]
    train, test = slice(0, 1200), slice(1200, None)
    gram = x[train].T @ x[train] + 3000 * torch.eye(1024)
    weights = torch.linalg.solve(gram, x[train].T @ y[train])
    accuracy = ((x[test] @ weights).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.3, f"{accuracy:.3f}"
    shuffled = labels[test][torch.from_numpy(np.random.RandomState(0).permutation(300))]
    assert ((x[test] @ weights).argmax(1) == shuffled).float().mean() < 0.17
