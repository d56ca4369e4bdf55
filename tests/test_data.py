"""Splits, switches, the two roles and their stand-ins, batches, augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils


def toy_split(count=40, channels=1, size=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return utils.Split(images.to(torch.uint8), torch.arange(count) % 10)


@pytest.mark.parametrize("name", sorted(utils.CHOICES))
def test_unknown_switch_value_lists_the_valid_ones(name, monkeypatch):
    monkeypatch.setenv(name, "banana")
    with pytest.raises(ValueError, match="banana") as caught:
        utils.switch(name)
    assert all(choice in str(caught.value) for choice in utils.CHOICES[name])


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12))
def test_switches_take_nothing_but_their_choices(text):
    import os

    if "\x00" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        return  # no environment can hold these
    os.environ["A3_PROFILE"] = text
    try:
        assert utils.profile() in utils.CHOICES["A3_PROFILE"]
    except ValueError as error:
        assert "A3_PROFILE" in str(error)
        assert text.strip().lower() not in ("", *utils.CHOICES["A3_PROFILE"])
    finally:
        del os.environ["A3_PROFILE"]


def test_precision_is_detected_and_can_be_overridden(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(utils, "cpu_has_fast_bf16", lambda: True)
    assert utils.precision_policy(cpu) == torch.bfloat16
    monkeypatch.setattr(utils, "cpu_has_fast_bf16", lambda: False)
    assert utils.precision_policy(cpu) == torch.float32
    monkeypatch.setenv("A3_PRECISION", "bf16")
    assert utils.precision_policy(cpu) == torch.bfloat16
    monkeypatch.setenv("A3_PRECISION", "fp16")
    with pytest.raises(ValueError, match="CUDA"):
        utils.precision_policy(cpu)


@pytest.mark.parametrize(
    "images, labels, word",
    [
        (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), "uint8"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "N x C"),
        (torch.zeros(4, 2, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "C 1 or 3"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "4 images"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4), "int64"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.full((4,), 10), "0 to 9"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.full((4,), -1), "0 to 9"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "empty"),
    ],
)
def test_split_refuses_what_it_cannot_be(images, labels, word):
    with pytest.raises(ValueError, match=word):
        utils.Split(images, labels)


def test_gray_uses_the_itu_601_weights_as_pillow_does():
    from PIL import Image

    split = toy_split(channels=3, size=32)
    gray = split.gray()
    assert gray.images.shape == (40, 1, 32, 32) and gray.images.dtype == torch.uint8
    for colour, ours in zip(split.images[:5], gray.images[:5], strict=True):
        pillow = np.asarray(Image.fromarray(colour.permute(1, 2, 0).numpy()).convert("L"))
        assert np.abs(pillow.astype(int) - ours[0].numpy()).max() <= 1
    assert toy_split().gray().images.shape == (40, 1, 28, 28)


def test_padding_keeps_the_picture_in_the_middle():
    split = toy_split()
    padded = split.padded(32)
    assert torch.equal(padded.images[:, :, 2:30, 2:30], split.images)
    assert int(padded.images.sum()) == int(split.images.sum())
    with pytest.raises(ValueError, match="size"):
        split.padded(20)


def test_mnist_is_read_in_order_with_its_known_counts(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    data = utils.load_handwritten()
    assert data.name == "MNIST" and data.real
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.train.counts() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test.counts() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train.images.float().mean().item() == pytest.approx(33.318, abs=0.01)


def refuse(*_):
    raise utils.DownloadError("no network in this test")


@pytest.mark.parametrize("load", [utils.load_handwritten, utils.load_street])
def test_auto_falls_back_in_plain_sight_and_real_stops(load, monkeypatch, capsys):
    monkeypatch.setattr(utils, "load_mnist", refuse)
    monkeypatch.setattr(utils, "load_svhn", refuse)
    monkeypatch.setenv("A3_PROFILE", "tiny")
    monkeypatch.setenv("A3_DATA", "auto")
    data = load()
    told = capsys.readouterr().out
    assert not data.real and data.name in told and "no network in this test" in told
    monkeypatch.setenv("A3_DATA", "real")
    with pytest.raises(utils.DownloadError):
        load()


def test_tiny_profile_asks_no_network(monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    monkeypatch.setattr(utils, "load_mnist", lambda root: pytest.fail("asked for MNIST"))
    monkeypatch.setattr(utils, "load_svhn", lambda root: pytest.fail("asked for SVHN"))
    digits, streets = utils.load_handwritten(), utils.load_street()
    assert digits.train.images.shape == (512, 1, 28, 28)
    assert streets.train.images.shape == (512, 3, 32, 32) and len(streets.unseen) == 128
    assert all(min(data.train.counts()) > 20 for data in (digits, streets))


def test_sklearn_digits_are_split_without_overlap(monkeypatch):
    monkeypatch.setenv("A3_DATA", "embedded")
    data = utils.load_handwritten()
    assert (len(data.train), len(data.test)) == (1437, 360)
    seen = {bytes(image.numpy().tobytes()) for image in data.train.images}
    assert sum(bytes(image.numpy().tobytes()) in seen for image in data.test.images) <= 2


def test_rendered_pictures_are_made_once_and_then_cached(monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    first = utils.load_street()
    monkeypatch.setattr(utils, "render_street_numbers", lambda *_: pytest.fail("rendered twice"))
    assert torch.equal(utils.load_street().train.images, first.train.images)


@pytest.mark.parametrize(
    "old, new, rendered_again",
    [
        ("_uniform(rng, 0.52, 0.94, n, 1, 1)", "_uniform(rng, 0.52, 0.95, n, 1, 1)", True),
        ("def validation_split(", "def cut_in_two(", False),  # not a part of the renderer
    ],
)
def test_a_changed_renderer_never_finds_the_old_pictures(
    old, new, rendered_again, monkeypatch, tmp_path
):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    utils._renderer_versions.cache_clear()
    utils.load_street()
    source = Path(utils.__file__).read_text()
    assert source.count(old) == 1
    (tmp_path / "utils.py").write_text(source.replace(old, new))
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    utils._renderer_versions.cache_clear()
    again = []
    render = utils.render_street_numbers
    monkeypatch.setattr(utils, "render_street_numbers", lambda *a: again.append(a) or render(*a))
    utils.load_street()
    utils._renderer_versions.cache_clear()
    assert bool(again) == rendered_again


def test_damaged_rendered_cache_is_made_again(monkeypatch, capsys):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    first = utils.load_street()
    for path in utils.runs_folder().glob("street-*.npz"):
        path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(utils.load_street().train.images, first.train.images)
    assert "damaged" in capsys.readouterr().out


def test_validation_split_is_disjoint_and_leaves_the_test_split_alone():
    data = utils.DigitData("toy", toy_split(100), toy_split(20, seed=1), real=False)
    fit_on, held_out = utils.validation_split(data, 30)
    assert (len(fit_on), len(held_out)) == (70, 30)
    rows = {bytes(i.numpy().tobytes()) for i in fit_on.images}
    assert not any(bytes(i.numpy().tobytes()) in rows for i in held_out.images)
    for bad in (0, 100, -1):
        with pytest.raises(ValueError, match="count"):
            utils.validation_split(data, bad)


def test_fingerprint_sees_every_part():
    split = toy_split()
    changed = utils.Split(split.images.clone(), split.labels)
    changed.images[3, 0, 4, 4] += 1
    keys = {
        utils.fingerprint(split), utils.fingerprint(changed), utils.fingerprint(split, 1),
        utils.fingerprint(1, split), utils.fingerprint({"lr": 1}), utils.fingerprint({"lr": 2}),
        utils.fingerprint({"w": torch.zeros(2)}), utils.fingerprint({"w": torch.ones(2)}),
        utils.fingerprint([split.images]), utils.fingerprint(None),
    }  # fmt: skip
    assert len(keys) == 10
    assert utils.fingerprint(split) == utils.fingerprint(toy_split())


def test_to_float_maps_bytes_to_minus_one_and_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert utils.to_float(images).flatten().tolist() == [-1.0, 1.0]
    assert images.flatten().tolist() == [0, 255]


@pytest.mark.parametrize("batch_size", [1, 7, 40, 64])
def test_loader_sees_every_picture_once_with_its_label(batch_size):
    split = toy_split()
    split.images[:, 0, 0, 0] = torch.arange(40, dtype=torch.uint8)
    loader = utils.Loader(split, batch_size, device=torch.device("cpu"))
    images, labels = (torch.cat(part) for part in zip(*loader.epoch(0), strict=True))
    marks = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert sorted(marks.tolist()) == list(range(40))
    assert torch.equal(labels, marks % 10)
    assert len(list(loader.epoch(0))) == len(loader)


def test_loader_repeats_an_epoch_and_changes_between_epochs():
    loader = utils.Loader(toy_split(), 8, seed=3, augment=utils.random_affine)
    again = utils.Loader(toy_split(), 8, seed=3, augment=utils.random_affine)
    first, same, other = (next(x)[0] for x in (loader.epoch(5), again.epoch(5), loader.epoch(6)))
    assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="batch_size"):
        utils.Loader(toy_split(), 0)


def test_affine_without_amounts_changes_nothing():
    images = utils.to_float(toy_split(size=32).images)
    generator = torch.Generator().manual_seed(0)
    still = utils.random_affine(images, generator, degrees=0, shift=0, zoom=0, shear=0)
    assert torch.allclose(still, images, atol=1e-4)
    moved = utils.random_affine(images, generator)
    assert moved.shape == images.shape and not torch.allclose(moved, images, atol=0.1)


def test_affine_is_per_sample():
    images = utils.to_float(toy_split(1).images).expand(2, -1, -1, -1)
    one, two = utils.random_affine(images, torch.Generator().manual_seed(0))
    assert not torch.allclose(one, two, atol=0.1)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_erasing_paints_one_square_a_picture_in_its_mean(size):
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    erased = utils.random_erase(images, torch.Generator().manual_seed(0), size)
    changed = erased != images
    means = images.mean((1, 2, 3))
    places = set()
    for picture, mask, mean in zip(erased, changed, means, strict=True):
        rows, columns = mask[0].any(1).nonzero()[:, 0], mask[0].any(0).nonzero()[:, 0]
        assert 1 <= len(rows) <= size and 1 <= len(columns) <= size
        assert mask.sum() == len(rows) * len(columns)
        assert torch.equal(rows, torch.arange(rows[0], rows[-1] + 1))
        assert torch.allclose(picture[mask], mean)
        places.add((rows[0].item(), columns[0].item()))
    assert len(places) > 100
    assert (changed.sum((1, 2, 3)) == size * size).float().mean() > 0.5
    with pytest.raises(ValueError, match="size"):
        utils.random_erase(images, torch.Generator(), 0)


def test_negatives_are_half_of_the_pictures_and_nothing_else():
    images = torch.rand(1000, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    changed = utils.random_negative(images, torch.Generator().manual_seed(0))
    negative = (changed == -images).flatten(1).all(1)
    assert ((changed == images).flatten(1).all(1) ^ negative).all()
    assert 400 < negative.sum() < 600
