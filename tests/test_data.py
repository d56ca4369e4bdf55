"""Splits, the readers of MNIST and SVHN, caches, and which data a run takes."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import noise_split
from PIL import Image
from scipy.io import savemat

import utils


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def pngs_of(split):
    return [png(image.permute(1, 2, 0).numpy()) for image in split.images]


def write_parquet(path, pngs, labels):
    """A file as the mirror has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": None} for content in pngs]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def as_parquet(path, split):
    return write_parquet(path, pngs_of(split), split.labels.tolist())


def as_mat(path, split):
    """A file in the official format: 32 x 32 x 3 x N, the digit 0 as 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = torch.where(split.labels == 0, 10, split.labels).to(torch.uint8)
    savemat(path, {"X": split.images.permute(2, 3, 1, 0).numpy(), "y": labels.numpy()[:, None]})
    return path


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


IMAGES = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
LABELS = torch.tensor([0, 9])


WRONG_IMAGES = [IMAGES.float(), IMAGES[:, 0], IMAGES[:1], IMAGES.expand(2, 2, 4, 4)]
WRONG_LABELS = [LABELS.int(), LABELS[:, None], LABELS - 1, LABELS + 1]


@pytest.mark.parametrize(
    ("images", "labels"),
    [(images, LABELS) for images in WRONG_IMAGES] + [(IMAGES, labels) for labels in WRONG_LABELS],
)
def test_images_and_labels_of_another_shape_type_or_value_are_refused(images, labels):
    with pytest.raises(ValueError, match="images"):
        utils.Split(images, labels)


def test_take_and_first_give_the_images_asked_for_in_that_order():
    split = noise_split(40)
    taken = split.take([3, 39, 3])
    assert torch.equal(taken.images, split.images[[3, 39, 3]])
    assert taken.labels.tolist() == [3, 9, 3]
    assert same(split.take(np.array([3, 39, 3], dtype=np.uint8)), taken)  # no mask for torch
    assert same(split.first(7), split.take(torch.arange(7)))
    assert len(split.first(99)) == 40
    for wrong in (np.array([], dtype=int), [40], [-1], [0.5], [True, False]):
        with pytest.raises(ValueError, match="indices"):
            split.take(wrong)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="count must be 1 or more"):
            split.first(wrong)


def test_images_become_floats_from_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert utils.to_float(images).tolist() == pytest.approx([-1, -0.6, 1])
    with pytest.raises(ValueError, match="uint8"):
        utils.to_float(images.float())


@pytest.mark.slow
def test_all_of_real_svhn_is_that_of_the_official_files(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    data = utils.load_svhn()
    assert (data.name, data.real) == ("SVHN", True)
    assert (len(data.train), len(data.test)) == (73_257, 6_000)
    assert data.train.counts() == utils.SVHN_TRAIN_COUNTS
    assert data.test.labels[:10].tolist() == [5, 2, 1, 0, 6, 1, 9, 1, 1, 8]
    # The first 601 official crops are here in the official format; ours were cut again.
    official = utils.decode_mat(shared / "SVHN_subset" / "train_first601.mat")
    ours = data.train.first(601)
    assert torch.equal(official.labels, ours.labels)
    assert (official.images.int() - ours.images.int()).abs().max() <= 4


def test_parquet_files_are_read_in_order_and_again_only_after_a_change(small_svhn, monkeypatch):
    train, test = small_svhn
    root = utils.data_root() / "svhn"
    as_parquet(root / "train-0.parquet", train.first(25))
    as_parquet(root / "train-1.parquet", train.take(range(25, 40)))
    as_parquet(root / "test-0.parquet", test)
    data = utils.load_svhn()
    assert (data.name, data.real) == ("SVHN", True)
    assert same(data.train, train)
    assert same(data.test, test)
    with monkeypatch.context() as patch:
        patch.setattr(utils.pd, "read_parquet", lambda *_, **__: pytest.fail("decoded twice"))
        assert same(utils.load_svhn().train, train)
    pixels = utils.image_pixels
    with monkeypatch.context() as patch:  # what another version of the decoder gives
        patch.setattr(utils, "image_pixels", lambda content: 255 - pixels(content))
        assert torch.equal(utils.load_svhn().train.images, 255 - train.images)
    with monkeypatch.context() as patch:  # as for the lone notebook
        patch.setenv("A3_DATA", "auto")
        patch.setenv("A3_PROFILE", "tiny")
        patch.setattr(utils, "OFFLINE_FOLDER", Path("nowhere"))
        assert utils.load_svhn().real
    changed = train.take(range(39, 24, -1))
    as_parquet(root / "train-1.parquet", changed)
    assert torch.equal(utils.load_svhn().train.images[25:], changed.images)


def test_an_official_file_with_another_checksum_is_not_used(small_svhn):
    as_mat(utils.data_root() / "train_32x32.mat", small_svhn[0])
    with pytest.raises(utils.DataError, match=r"train_32x32\.mat.*checksum"):
        utils.load_svhn()


GRAY = png(np.zeros((32, 32), np.uint8))
FAULTS = {
    "a label of 10": (lambda pngs, labels: (pngs, [10, *labels[1:]]), "must be 0 to 9"),
    "a gray image": (lambda pngs, labels: ([GRAY, *pngs[1:]], labels), "32 x 32 x 3"),
    "no image": (lambda pngs, labels: ([b"<html>", *pngs[1:]], labels), "UnidentifiedImageError"),
    "wrong counts": (lambda pngs, labels: (pngs, [1] * 20 + labels[20:]), "not those of SVHN"),
    "a digit missing": (lambda pngs, labels: (pngs[:30], list(range(9)) * 3 + [0] * 3), "missing"),
    "too many images": (lambda pngs, labels: (pngs * 2, labels * 2), "80 images; SVHN has 40"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_file_is_named_and_never_used(fault, small_svhn):
    train, test = small_svhn
    change, says = FAULTS[fault]
    pngs, labels = change(pngs_of(train), train.labels.tolist())
    write_parquet(utils.data_root() / "svhn" / "train-0.parquet", pngs, labels)
    as_parquet(utils.data_root() / "svhn" / "test-0.parquet", test)
    with pytest.raises(utils.DataError, match=f"(?s)train-.*({says}).*What to do"):
        utils.load_svhn()


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_a_damaged_cache_is_made_again(damage):
    train = noise_split(40)
    utils.load_or_make("toy", lambda: train, "key")
    (path,) = utils.runs_folder().iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:3000] if damage == "cut" else content)
    assert same(utils.load_or_make("toy", lambda: train, "key"), train)
    assert same(utils.load_or_make("toy", lambda: pytest.fail("made twice"), "key"), train)


def test_a_cache_belongs_to_its_key_and_a_run_goes_on_without_one(tmp_path, monkeypatch, capsys):
    one, other = noise_split(seed=1), noise_split(seed=2)
    assert same(utils.load_or_make("toy", lambda: one, "a", "b"), one)
    assert same(utils.load_or_make("toy", lambda: other, "a", "c"), other)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "file"))
    assert same(utils.load_or_make("toy", lambda: one, "a"), one)
    assert "cannot be written" in capsys.readouterr().out


def test_a_stand_in_is_announced_and_never_called_mnist_or_svhn(small_svhn, monkeypatch, capsys):
    monkeypatch.setenv("A3_DATA", "auto")
    for load, name in ((utils.load_mnist, "MNIST"), (utils.load_svhn, "SVHN")):
        data = load()
        told = capsys.readouterr().out
        assert not data.real
        assert name not in data.name
        assert f"NOTE  {data.name} in place of {name}." in told
        assert "Connection refused" in told


@pytest.mark.parametrize(
    ("data", "offline", "says"),
    [("real", utils.OFFLINE_FOLDER, "run again"), ("auto", Path("nowhere"), "folder offline/")],
)
def test_without_data_a_run_stops_and_says_what_to_do(small_svhn, monkeypatch, data, offline, says):
    monkeypatch.setenv("A3_DATA", data)
    monkeypatch.setattr(utils, "OFFLINE_FOLDER", offline)
    for load in (utils.load_mnist, utils.load_svhn):
        with pytest.raises(utils.DataError, match=f"(?s)Connection refused.*What to do.*{says}"):
            load()


def test_embedded_and_tiny_runs_ask_neither_for_files_nor_for_downloads(small_svhn, monkeypatch):
    for reader in ("real_mnist", "real_svhn"):
        monkeypatch.setattr(utils, reader, lambda _: pytest.fail("real data asked for"))
    monkeypatch.setenv("A3_DATA", "embedded")
    assert not utils.load_svhn().real
    monkeypatch.setenv("A3_PROFILE", "tiny")
    monkeypatch.setenv("A3_DATA", "auto")
    for data in (utils.load_mnist(), utils.load_svhn()):
        assert (len(data.train), len(data.test), data.real) == (512, 256, False)
        assert not torch.equal(data.test.images[0], data.train.images[0])


def test_a_missing_package_is_named_and_leads_to_no_download(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Missing optional dependency 'pyarrow'.")

    folder = utils.data_root() / "svhn"
    folder.mkdir(parents=True)
    (folder / "test-0.parquet").write_bytes(b"some bytes")
    monkeypatch.setattr(utils.pd, "read_parquet", missing)
    monkeypatch.setattr(utils, "fetch_from_any", lambda *_: pytest.fail("a download"))
    with pytest.raises(utils.DataError, match="pyarrow"):
        utils.real_svhn("test")
