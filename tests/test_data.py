"""Splits, the readers of MNIST and SVHN, caches, and which data a run takes."""

import gzip
import hashlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import utils

NOWHERE = "http://127.0.0.1:9"  # no server listens there


def toy_split(count=40, channels=1, size=28, seed=0):
    """Random images, labeled 0 to 9 in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return utils.Split(images.to(torch.uint8), torch.arange(count) % 10)


def png(image, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def pngs_of(split):
    return [png(image.permute(1, 2, 0).numpy()) for image in split.images]


def write_parquet(path, pngs, labels, columns=("image", "label")):
    """A file as the mirror has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": None} for content in pngs]
    pq.write_table(pa.table(dict(zip(columns, (images, labels), strict=True))), path)
    return path


def as_parquet(path, split):
    return write_parquet(path, pngs_of(split), split.labels.tolist())


def as_mat(path, split):
    """A file in the official format: 32 x 32 x 3 x N, the digit 0 as 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = torch.where(split.labels == 0, 10, split.labels).to(torch.uint8)
    savemat(path, {"X": split.images.permute(2, 3, 1, 0).numpy(), "y": labels.numpy()[:, None]})
    return path


def write_mnist(folder, train, test):
    """MNIST's four files in `folder`; their sha256 by name."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for prefix, split in (("train", train), ("t10k", test)):
        for kind, numbers in (("images-idx3", split.images[:, 0]), ("labels-idx1", split.labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in numbers.shape)
            body = numbers.to(torch.uint8).numpy().tobytes()
            content = gzip.compress(bytes([0, 0, 8, numbers.ndim]) + sizes + body)
            name = f"{prefix}-{kind}-ubyte.gz"
            (folder / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def pretend_small_svhn(monkeypatch):
    """From now on SVHN has 40 and 20 images, no address answers, and `real` is asked for."""
    sizes = {"MNIST": {"train": 12, "test": 5}, "SVHN": {"train": 40, "test": 20}}
    monkeypatch.setattr(utils, "SIZES", sizes)
    monkeypatch.setattr(utils, "SVHN_COUNTS", [4] * 10)
    monkeypatch.setattr(utils, "SVHN_HOST", NOWHERE)
    monkeypatch.setattr(utils, "MNIST_HOST", NOWHERE)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("A3_DATA", "real")
    return toy_split(40, 3, 32), toy_split(20, 3, 32, seed=1)


def pretend_small_mnist(monkeypatch):
    """From now on MNIST has 12 and 5 images, and A3_DATA_ROOT holds its four files."""
    pretend_small_svhn(monkeypatch)
    splits = toy_split(12), toy_split(5, seed=1)
    digests = write_mnist(utils.data_root() / "MNIST" / "raw", *splits)
    monkeypatch.setattr(utils, "SHA256", {**utils.SHA256, **digests})
    return splits


@pytest.fixture
def small_svhn(monkeypatch):
    return pretend_small_svhn(monkeypatch)


@pytest.fixture
def small_mnist(monkeypatch):
    return pretend_small_mnist(monkeypatch)


@pytest.fixture
def drawn_digits(monkeypatch):
    """A quick stand-in for SVHN."""
    drawn = utils.DigitData("drawn digits", toy_split(600, 3, 32), toy_split(300, 3, 32), False)
    monkeypatch.setattr(utils, "svhn_stand_in", lambda: drawn)
    return drawn


# ---- Split ----


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_split_has_the_right_shapes_types_and_labels_or_is_refused(data):
    dtypes = st.sampled_from((torch.uint8, torch.int64, torch.float32, torch.bool))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    images = torch.zeros(shape).to(data.draw(dtypes))
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, 10), max_size=4) | st.integers(0, 9)))
    labels = labels.to(data.draw(dtypes))
    right = (
        images.dtype == torch.uint8
        and labels.dtype == torch.int64
        and images.ndim == 4
        and images.shape[1] in (1, 3)
        and labels.ndim == 1
        and 0 < len(images) == len(labels)
        and set(labels.tolist()) <= set(range(10))
    )
    if right:
        assert sum(utils.Split(images, labels).counts()) == len(images)
    else:
        with pytest.raises(ValueError, match="images"):
            utils.Split(images, labels)


def test_take_and_first_give_the_images_asked_for_in_that_order():
    split = toy_split()
    taken = split.take([3, 39, 3])
    assert torch.equal(taken.images, split.images[[3, 39, 3]])
    assert taken.labels.tolist() == [3, 9, 3]
    assert same(split.take(torch.tensor([1])), split.take(np.array([1])))
    assert len(split.first(7)) == 7
    assert len(split.first(99)) == 40
    for wrong in ([40], [-1], [0.5], [], [True, False]):
        with pytest.raises(ValueError):
            split.take(wrong)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="count"):
            split.first(wrong)


def test_images_become_floats_from_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert utils.to_float(images).tolist() == pytest.approx([-1, -0.6, 1])
    with pytest.raises(ValueError, match="uint8"):
        utils.to_float(images.float())


# ---- real data ----


def test_real_mnist_is_read_in_order_with_its_known_counts(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    before = sorted(shared.rglob("*"))
    data = utils.load_mnist()
    assert sorted(shared.rglob("*")) == before  # nothing is written there
    assert utils.describe_size(data) == "MNIST: 60,000 training and 10,000 test images"
    assert data.real
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.train.counts() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test.counts() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train.images.float().mean().item() == pytest.approx(33.318, abs=0.01)


def test_real_svhn_test_images_are_the_official_ones(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    split = utils.real_svhn("test")
    assert split.images.shape == (6000, 3, 32, 32)
    assert split.labels[:10].tolist() == [5, 2, 1, 0, 6, 1, 9, 1, 1, 8]
    table = pq.read_table(shared / "svhn" / "test-00000-of-00001.parquet")
    for row in (0, 999, 1000, 5999):
        image = Image.open(io.BytesIO(table["image"][row].as_py()["bytes"]))
        assert np.array_equal(split.images[row].permute(1, 2, 0), np.asarray(image))
        assert split.labels[row] == table["label"][row].as_py()


@pytest.mark.slow
def test_all_of_real_svhn_is_that_of_the_official_files(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    data = utils.load_svhn()
    assert utils.describe_size(data) == "SVHN: 73,257 training and 6,000 of 26,032 test images"
    assert data.name == "SVHN"
    assert data.train.counts() == utils.SVHN_COUNTS
    # The first 601 official crops are here in the official format; ours were cut again.
    path = shared / "SVHN_subset" / "train_first601.mat"
    monkeypatch.setitem(utils.SHA256, path.name, utils.file_sha256(path))
    official, ours = utils.decode_mat(path), data.train.first(601)
    assert torch.equal(official.labels, ours.labels)
    assert (official.images.int() - ours.images.int()).abs().max() <= 4


def test_mnist_is_read_where_nothing_can_be_written(small_mnist, monkeypatch):
    monkeypatch.setattr(utils, "write_atomically", lambda *_: pytest.fail("written"))
    data = utils.load_mnist()
    assert (data.name, data.real) == ("MNIST", True)
    assert same(data.train, small_mnist[0])
    assert same(data.test, small_mnist[1])


@pytest.mark.parametrize("fault", ["folder", "loop", "damaged", "missing"])
def test_a_file_of_mnist_that_cannot_be_used_is_named(fault, small_mnist):
    path = utils.data_root() / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault == "loop":
        path.symlink_to(path)
    elif fault == "damaged":
        path.write_bytes(content[:-1])
    with pytest.raises(utils.DataError, match=r"(?s)train-labels.*What to do.*save the file as"):
        utils.load_mnist()


# ---- SVHN's formats ----


@pytest.mark.parametrize("folder", ["svhn", "svhn/cropped_digits"])
def test_parquet_files_are_read_in_order_and_decoded_once(folder, small_svhn, monkeypatch):
    train, test = small_svhn
    root = utils.data_root() / folder
    as_parquet(root / "train-00000-of-00002.parquet", train.first(25))
    as_parquet(root / "train-00001-of-00002.parquet", train.take(range(25, 40)))
    as_parquet(root / "test-00000-of-00001.parquet", test)
    for _ in range(2):
        data = utils.load_svhn()
        assert (data.name, data.real) == ("SVHN", True)
        assert same(data.train, train)
        assert same(data.test, test)
        monkeypatch.setattr(utils, "decode_parquet", lambda _: pytest.fail("decoded twice"))


def test_a_changed_file_is_read_again_and_an_incomplete_set_says_so(small_svhn):
    train, test = small_svhn
    root = utils.data_root() / "svhn"
    as_parquet(root / "train-0.parquet", train)
    as_parquet(root / "test-0.parquet", test.first(6))
    data = utils.load_svhn()
    assert data.name == "SVHN"
    assert utils.describe_size(data) == "SVHN: 40 training and 6 of 20 test images"
    as_parquet(root / "test-0.parquet", test)
    assert utils.describe_size(utils.load_svhn()) == "SVHN: 40 training and 20 test images"


def test_official_files_are_read_with_10_as_the_digit_0(small_svhn, monkeypatch):
    for part, split in zip(("train", "test"), small_svhn, strict=True):
        path = as_mat(utils.data_root() / f"{part}_32x32.mat", split)
        monkeypatch.setitem(utils.SHA256, path.name, utils.file_sha256(path))
    data = utils.load_svhn()
    assert same(data.train, small_svhn[0])
    assert same(data.test, small_svhn[1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(utils.DataError, match=r"test_32x32\.mat.*checksum"):
        utils.load_svhn()


def malformed_parquet(kind, path, train):
    """Write a training file with this fault; the words that the error must have."""
    pngs, labels = pngs_of(train), train.labels.tolist()
    gray, small = png(train.images[0, 0].numpy(), "L"), png(np.zeros((28, 28, 3), np.uint8))
    contents = {
        "a label of 10": (pngs, [10, *labels[1:]], "labels must be 0 to 9"),
        "a missing label": (pngs, [None, *labels[1:]], "labels must be 0 to 9"),
        "a broken label": (pngs, [0.5, *labels[1:]], "labels must be 0 to 9"),
        "a gray image": ([gray, *pngs[1:]], labels, "32 x 32 x 3"),
        "a small image": ([small, *pngs[1:]], labels, "32 x 32 x 3"),
        "no image": ([b"<html>", *pngs[1:]], labels, "UnidentifiedImageError"),
        "half an image": ([pngs[0][:1500], *pngs[1:]], labels, "OSError|SyntaxError"),
        "no threes": (
            [image for image, label in zip(pngs, labels, strict=True) if label != 3],
            [label for label in labels if label != 3],
            r"counts.*\[4, 4, 4, 0, 4",
        ),
        "too many": (pngs + pngs, labels + labels, "counts"),
        "wrong counts": (pngs, [1] * 20 + labels[20:], "counts"),
        "half a file": (pngs, labels, "ArrowInvalid"),
        "no column of labels": (pngs, labels, "label"),
    }
    pngs, labels, says = contents[kind]
    columns = ("image", "digit") if kind == "no column of labels" else ("image", "label")
    write_parquet(path, pngs, labels, columns)
    if kind == "half a file":
        path.write_bytes(path.read_bytes()[:-9])
    return says


MALFORMED = (
    "a label of 10, a missing label, a broken label, a gray image, a small image, no image, "
    "half an image, no threes, too many, wrong counts, half a file, no column of labels"
)


@pytest.mark.parametrize("kind", MALFORMED.split(", "))
def test_a_malformed_file_is_named_and_never_used(kind, small_svhn):
    path = utils.data_root() / "svhn" / "train-00000-of-00001.parquet"
    says = malformed_parquet(kind, path, small_svhn[0])
    as_parquet(utils.data_root() / "svhn" / "test-0.parquet", small_svhn[1])
    with pytest.raises(utils.DataError, match=f"(?s)train-.*({says}).*What to do"):
        utils.load_svhn()


# ---- caches ----


@pytest.mark.parametrize("damage", ["empty", "cut", "one bit", "other arrays", "a folder"])
def test_a_damaged_cache_is_made_again(damage):
    train = toy_split(40, 3, 32)
    utils.load_cached("toy", lambda: train, "key")
    (path,) = utils.runs_folder().iterdir()
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "other arrays":
        np.savez(path, images=np.zeros((2, 2)), labels=np.zeros(2))
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"empty": b"", "cut": content[:3000], "one bit": content}[damage])
    assert same(utils.load_cached("toy", lambda: train, "key"), train)
    if damage != "a folder":
        assert same(utils.load_cached("toy", lambda: pytest.fail("made twice"), "key"), train)


def test_a_cache_belongs_to_its_key_and_a_run_goes_on_without_one(tmp_path, monkeypatch, capsys):
    one, other = toy_split(seed=1), toy_split(seed=2)
    assert same(utils.load_cached("toy", lambda: one, "a", "b"), one)
    assert same(utils.load_cached("toy", lambda: other, "a", "c"), other)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "file"))
    assert same(utils.load_cached("toy", lambda: one, "a"), one)
    assert "cannot be written" in capsys.readouterr().out


# ---- which data a run takes ----


def test_a_stand_in_is_announced_and_never_called_mnist_or_svhn(small_svhn, monkeypatch, capsys):
    monkeypatch.setenv("A3_DATA", "auto")
    monkeypatch.setitem(utils.RENDERED_SIZES, "train", 60)
    monkeypatch.setitem(utils.RENDERED_SIZES, "test", 30)
    for load, name in ((utils.load_mnist, "MNIST"), (utils.load_svhn, "SVHN")):
        data = load()
        told = capsys.readouterr().out
        assert not data.real
        assert name not in data.name
        assert name not in utils.describe_size(data)
        assert f"NOTE  {data.name} in place of {name}." in told
        assert "Connection refused" in told


def test_real_stops_with_an_error_that_says_what_to_do(small_svhn):
    for load in (utils.load_mnist, utils.load_svhn):
        with pytest.raises(utils.DataError, match=r"(?s)Connection refused.*What to do: run again"):
            load()


def test_without_huggingface_hub_the_reason_is_shown_and_a_stand_in_serves(
    drawn_digits, small_svhn, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    reason = (
        r"ufldl-stanford/svhn: ModuleNotFoundError: .*huggingface_hub.*; "
        "run %pip install --upgrade huggingface_hub"
    )
    with pytest.raises(utils.DataError, match=reason) as caught:
        utils.load_svhn()
    assert f"{NOWHERE}/train_32x32.mat: URLError" in str(caught.value)  # tried all the same
    monkeypatch.setenv("A3_DATA", "auto")
    assert utils.load_svhn() is drawn_digits
    assert re.search(reason, capsys.readouterr().out)


def test_embedded_and_tiny_runs_ask_neither_for_files_nor_for_the_network(
    drawn_digits, monkeypatch
):
    for reader in ("real_mnist", "real_svhn"):
        monkeypatch.setattr(utils, reader, lambda _: pytest.fail("real data asked for"))
    monkeypatch.setenv("A3_DATA", "embedded")
    assert utils.load_svhn() == drawn_digits
    monkeypatch.delenv("A3_DATA")
    monkeypatch.setenv("A3_PROFILE", "tiny")
    for data in (utils.load_mnist(), utils.load_svhn()):
        assert (len(data.train), len(data.test), data.real) == (512, 256, False)


def test_a_tiny_run_on_real_data_takes_its_first_images(small_mnist, monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    monkeypatch.setattr(utils, "TINY_SIZES", {"train": 7, "test": 3})
    data = utils.load_mnist()
    assert same(data.train, small_mnist[0].first(7))
    assert utils.describe_size(data) == "MNIST: 7 of 12 training and 3 of 5 test images"


@pytest.mark.parametrize("wanted", ["auto", "embedded"])
def test_a_lone_notebook_without_network_or_files_says_what_it_needs(
    wanted, small_svhn, monkeypatch
):
    monkeypatch.setenv("A3_DATA", wanted)
    monkeypatch.setattr(utils, "OFFLINE", Path("nowhere"))
    for load in (utils.load_mnist, utils.load_svhn):
        with pytest.raises(utils.DataError, match="its folder offline/") as caught:
            load()
        assert wanted == "embedded" or "What to do: run again" in str(caught.value)
