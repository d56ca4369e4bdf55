"""Splits, fingerprints, the readers of MNIST and SVHN, caches, stand-ins."""

import gzip
import hashlib
import io
import os
import zipfile
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


def toy_split(count=40, channels=1, size=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return utils.Split(images.to(torch.uint8), torch.arange(count) % 10)


def png(image, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def as_parquet(path, split, labels=None, pngs=None, columns=("image", "label")):
    """A file with the columns of the mirror's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pngs = pngs or [png(image.permute(1, 2, 0).numpy()) for image in split.images]
    images = [{"bytes": one, "path": None} for one in pngs]
    labels = split.labels.tolist() if labels is None else labels
    pq.write_table(pa.table(dict(zip(columns, (images, labels), strict=True))), path)
    return path


def as_mat(path, split):
    """A file in the official format: 32 x 32 x 3 x N, the digit 0 as 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = torch.where(split.labels == 0, 10, split.labels).to(torch.uint8)
    savemat(path, {"X": split.images.permute(2, 3, 1, 0).numpy(), "y": labels.numpy()[:, None]})
    return path


@pytest.fixture
def small_svhn(monkeypatch):
    """A pretended SVHN of 40 and 20 images; no address answers, and `real` is asked for."""
    monkeypatch.setattr(utils, "SIZES", {**utils.SIZES, "SVHN": (40, 20)})
    monkeypatch.setattr(utils, "SVHN_COUNTS", [4] * 10)
    monkeypatch.setattr(utils, "SVHN_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(utils, "MNIST_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("A3_DATA", "real")
    return toy_split(40, 3, 32), toy_split(20, 3, 32, seed=1)


def drawing(monkeypatch, train, test):
    """Let drawn digits be the stand-in for SVHN."""
    drawn = utils.DigitData("drawn digits", train, test, real=False)
    module = utils.offline_module("street_numbers")
    monkeypatch.setattr(module, "stand_in", lambda: drawn)
    return drawn


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# ---- Split, DigitData, fingerprint ----


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
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "N > 0"),
    ],
)
def test_split_refuses_what_it_cannot_be(images, labels, word):
    with pytest.raises(ValueError, match=word):
        utils.Split(images, labels)


def test_take_and_first_give_the_images_asked_for():
    split = toy_split()
    taken = split.take([3, 39, 3])
    assert torch.equal(taken.images, split.images[[3, 39, 3]]) and taken.labels.tolist() == [
        3,
        9,
        3,
    ]
    assert same(split.take(torch.tensor([1])), split.take(np.array([1])))
    assert len(split.first(7)) == 7 and len(split.first(99)) == 40
    for wrong in ([40], [-1], [0.5], [], [True, False]):
        with pytest.raises(ValueError):
            split.take(wrong)
    for wrong in (0, -3):
        with pytest.raises(ValueError):
            split.first(wrong)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_tensors_make_a_right_split_or_are_refused(data):
    dtypes = st.sampled_from((torch.uint8, torch.int64, torch.float32, torch.bool))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    images = torch.zeros(shape).to(data.draw(dtypes))
    labels = data.draw(st.lists(st.integers(-1, 10), max_size=4))
    try:
        split = utils.Split(images, torch.tensor(labels).to(data.draw(dtypes)))
    except ValueError as error:
        assert "images" in str(error)
    else:
        assert split.images.dtype == torch.uint8 and split.images.shape[1] in (1, 3)
        assert split.labels.dtype == torch.int64 and set(split.labels.tolist()) <= set(range(10))
        assert sum(split.counts()) == len(split) == len(split.images) > 0


def test_fingerprint_sees_every_part():
    split = toy_split()
    changed = utils.Split(split.images.clone(), split.labels)
    changed.images[3, 0, 4, 4] += 1
    keys = {
        utils.fingerprint(split), utils.fingerprint(changed), utils.fingerprint(split, 1),
        utils.fingerprint(1, split), utils.fingerprint({"lr": 1}), utils.fingerprint({"lr": 2}),
        utils.fingerprint({"w": torch.zeros(2)}), utils.fingerprint({"w": torch.ones(2)}),
        utils.fingerprint([split.images]), utils.fingerprint(None), utils.fingerprint([[1], 2]),
        utils.fingerprint([1, 2]), utils.fingerprint(torch.zeros(2).bfloat16()),
    }  # fmt: skip
    assert len(keys) == 13
    assert utils.fingerprint(split) == utils.fingerprint(toy_split())
    assert utils.fingerprint({"a": 1, "b": 2}) == utils.fingerprint({"b": 2, "a": 1})
    assert utils.fingerprint(torch.arange(6).view(2, 3).T) != utils.fingerprint(
        torch.arange(6).view(3, 2)
    )


# ---- real data ----


def test_real_mnist_is_read_in_order_with_its_known_counts(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    before = sorted(shared.rglob("*"))
    data = utils.load_handwritten()
    assert data.name == "MNIST" and data.real and sorted(shared.rglob("*")) == before
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.train.counts() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test.counts() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train.images.float().mean().item() == pytest.approx(33.318, abs=0.01)
    monkeypatch.setenv("A3_PROFILE", "tiny")
    monkeypatch.setenv("A3_DATA", "real")
    data = utils.load_handwritten()
    assert data.name == "MNIST (512 of 60,000 training, 256 of 10,000 test images)"


def test_real_svhn_test_images_are_the_official_ones(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    split = utils._svhn("test")
    assert split.images.shape == (6000, 3, 32, 32) and split.images.is_contiguous()
    assert split.labels[:10].tolist() == [5, 2, 1, 0, 6, 1, 9, 1, 1, 8]
    table = pq.read_table(shared / "svhn" / "test-00000-of-00001.parquet")
    for row in (0, 999, 1000, 5999):
        image = Image.open(io.BytesIO(table["image"][row].as_py()["bytes"]))
        assert np.array_equal(split.images[row].permute(1, 2, 0), np.asarray(image))
        assert split.labels[row] == table["label"][row].as_py()


@pytest.mark.slow
def test_all_of_real_svhn(shared, monkeypatch):
    monkeypatch.setenv("A3_DATA_ROOT", str(shared))
    data = utils.load_street()
    assert data.name == "SVHN (73,257 training, 6,000 of 26,032 test images)" and data.real
    assert data.train.counts() == utils.SVHN_COUNTS
    # The first 601 official crops are here in the official format; ours were cut again.
    path = shared / "SVHN_subset" / "train_first601.mat"
    monkeypatch.setitem(utils.FILES, path.name, utils._sha256(path))
    official = utils._from_mat([path])
    ours = data.train.first(601)
    assert torch.equal(official.labels, ours.labels)
    assert (official.images.int() - ours.images.int()).abs().max() <= 4
    assert same(utils.load_street().train, data.train)


# ---- SVHN's formats ----


@pytest.mark.parametrize("folder", ["svhn", "svhn/cropped_digits"])
def test_parquet_files_are_read_in_order_and_then_cached(folder, small_svhn, monkeypatch):
    train, test = small_svhn
    root = utils.data_root() / folder
    as_parquet(root / "train-00000-of-00002.parquet", train.first(25))
    as_parquet(root / "train-00001-of-00002.parquet", train.take(range(25, 40)))
    as_parquet(root / "test-00000-of-00001.parquet", test)
    data = utils.load_street()
    assert data.name == "SVHN" and data.real and same(data.train, train) and same(data.test, test)
    monkeypatch.setattr(utils, "_from_parquet", lambda files: pytest.fail("decoded twice"))
    again = utils.load_street()
    assert same(again.train, train) and same(again.test, test)


def test_a_set_that_is_not_complete_says_so_in_its_name(small_svhn):
    train, test = small_svhn
    as_parquet(utils.data_root() / "svhn" / "train-0.parquet", train)
    path = as_parquet(utils.data_root() / "svhn" / "test-0.parquet", test.first(6))
    assert utils.load_street().name == "SVHN (40 training, 6 of 20 test images)"
    as_parquet(path, test)  # another file under the same name: the cache is not used
    assert utils.load_street().name == "SVHN"
    as_parquet(utils.data_root() / "svhn" / "train-0.parquet", train.first(30))
    assert utils.load_street().name == "SVHN (30 of 40 training, 20 test images)"


def test_official_files_are_read_with_10_as_the_digit_0(small_svhn, monkeypatch):
    train, test = small_svhn
    for name, split in (("train_32x32.mat", train), ("test_32x32.mat", test)):
        content = as_mat(utils.data_root() / name, split).read_bytes()
        monkeypatch.setitem(utils.FILES, name, hashlib.sha256(content).hexdigest()[:16])
    data = utils.load_street()
    assert data.name == "SVHN" and same(data.train, train) and same(data.test, test)
    (utils.data_root() / "test_32x32.mat").write_bytes(content[:-1])
    with pytest.raises(utils.DataError, match="test_32x32.mat.*checksum"):
        utils.load_street()


def malformed(kind, path, train):
    """Writes one kind of unusable training file; returns what the error must say."""
    pngs = [png(image.permute(1, 2, 0).numpy()) for image in train.images]
    labels = train.labels.tolist()
    if kind == "a label of 10":
        as_parquet(path, train, [10] + labels[1:])
        return "column 'label'.*0 to 9"
    if kind == "a missing label":
        as_parquet(path, train, [None] + labels[1:])
        return "column 'label'.*0 to 9"
    if kind == "a broken label":
        as_parquet(path, train, [0.5] + labels[1:])
        return "column 'label'.*0 to 9"
    if kind == "no column of labels":
        as_parquet(path, train, columns=("image", "digit"))
        return "column 'label'"
    if kind == "a gray image":
        as_parquet(path, train, pngs=[png(train.images[0, 0].numpy(), "L")] + pngs[1:])
        return "column 'image'.*32 x 32 x 3"
    if kind == "a small image":
        as_parquet(path, train, pngs=[png(np.zeros((28, 28, 3), np.uint8))] + pngs[1:])
        return "column 'image'.*32 x 32 x 3"
    if kind == "no image":
        as_parquet(path, train, pngs=[b"<html>"] + pngs[1:])
        return "column 'image'.*UnidentifiedImageError"
    if kind == "half an image":
        as_parquet(path, train, pngs=[pngs[0][:1500]] + pngs[1:])
        return "column 'image'"
    if kind == "no rows":
        pq.write_table(pq.read_table(as_parquet(path, train)).slice(0, 0), path)
        return "N > 0"
    if kind == "a class is missing":
        as_parquet(path, train.take(np.flatnonzero(train.labels != 3)))
        return r"counts.*\[4, 4, 4, 0, 4"
    if kind == "too many":
        as_parquet(path, toy_split(50, 3, 32))
        return "counts"
    if kind == "wrong counts":
        as_parquet(path, train, [1] * 20 + labels[20:])
        return "counts"
    if kind == "half a file":
        path.write_bytes(as_parquet(path, train).read_bytes()[:-9])
        return "ArrowInvalid"
    path.parent.mkdir(parents=True)
    if kind == "empty":
        path.write_bytes(b"")
        return "ArrowInvalid"
    if kind == "a folder":
        path.mkdir()
        return "Error"
    path.symlink_to(path)  # a loop of links
    return "OSError|no such file"


@pytest.mark.parametrize("kind", [
    "a label of 10", "a missing label", "a broken label", "no column of labels", "a gray image",
    "a small image", "no image", "half an image", "no rows", "a class is missing", "too many",
    "wrong counts", "half a file", "empty", "a folder", "a loop",
])  # fmt: skip
def test_a_malformed_file_is_named_and_never_used(kind, small_svhn, monkeypatch, capsys):
    path = utils.data_root() / "svhn" / "train-00000-of-00001.parquet"
    says = malformed(kind, path, small_svhn[0])
    as_parquet(utils.data_root() / "svhn" / "test-0.parquet", small_svhn[1])
    with pytest.raises(utils.DataError, match=f"(?s)train-.*({says}).*What to do") as caught:
        utils.load_street()
    assert str(path.parent) in str(caught.value) and "Connection refused" in str(caught.value)
    monkeypatch.setenv("A3_DATA", "auto")
    drawing(monkeypatch, *small_svhn)
    data = utils.load_street()
    told = capsys.readouterr().out
    assert not data.real and data.name in told and "train-" in told


# ---- caches ----


@pytest.fixture
def cached(small_svhn):
    """SVHN loaded once; returns the cache file of the training set and that set."""
    for part, split in zip(("train", "test"), small_svhn, strict=True):
        as_parquet(utils.data_root() / "svhn" / f"{part}-0.parquet", split)
    utils.load_street()
    (path,) = utils.runs_folder().glob("svhn-train-*")
    return path, small_svhn[0]


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "one bit", "other arrays", "a folder", "a loop"]
)
def test_a_damaged_cache_is_made_again(damage, cached):
    path, train = cached
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a loop":
        path.symlink_to(path)
    elif damage == "other arrays":
        np.savez(path, images=np.zeros((2, 2)), labels=np.zeros(2))
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"empty": b"", "cut": content[:3000], "one bit": content}[damage])
    assert same(utils.load_street().train, train)
    if damage != "a folder":
        assert zipfile.ZipFile(path).testzip() is None


def test_a_run_goes_on_without_a_cache(cached, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for runs in ("file", "file/below", "loop"):
        monkeypatch.setenv("A3_RUNS", str(tmp_path / runs))
        assert same(utils.load_street().train, cached[1])
        assert "cannot be written" in capsys.readouterr().out

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("A3_RUNS", str(tmp_path / "new"))
    monkeypatch.setattr(utils.np, "savez", full)
    assert same(utils.load_street().train, cached[1])
    assert "No space left" in capsys.readouterr().out
    assert os.listdir(tmp_path / "new") == []


# ---- MNIST's files ----


@pytest.fixture
def small_mnist(small_svhn, monkeypatch):
    """MNIST's four files with 12 and 5 images in A3_DATA_ROOT; returns the two splits."""
    raw = utils.data_root() / "MNIST" / "raw"
    raw.mkdir(parents=True)
    splits = toy_split(12), toy_split(5, seed=1)
    for prefix, split in zip(("train", "t10k"), splits, strict=True):
        for name, array in (("images-idx3", split.images[:, 0]), ("labels-idx1", split.labels)):
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            body = array.to(torch.uint8).numpy().tobytes()
            content = gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + body)
            name = f"{prefix}-{name}-ubyte.gz"
            (raw / name).write_bytes(content)
            monkeypatch.setitem(utils.FILES, name, hashlib.sha256(content).hexdigest()[:16])
    return splits


def test_mnist_needs_nothing_but_to_read_its_files(small_mnist, monkeypatch):
    """Whatever else is there, and where nothing can be written."""
    raw = utils.data_root() / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").mkdir()
    (raw / "t10k-images-idx3-ubyte").symlink_to("t10k-images-idx3-ubyte")
    monkeypatch.setattr(utils, "write_atomically", lambda *a: pytest.fail("written"))
    data = utils.load_handwritten()
    assert data.name == "MNIST (12 of 60,000 training, 5 of 10,000 test images)"
    assert same(data.train, small_mnist[0]) and same(data.test, small_mnist[1])


@pytest.mark.parametrize("fault", ["folder", "loop", "damaged", "missing", "forbidden"])
def test_a_file_of_mnist_that_cannot_be_used(fault, small_mnist, monkeypatch, capsys):
    path = utils.data_root() / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    if fault != "forbidden":
        path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault == "loop":
        path.symlink_to(path)
    elif fault == "damaged":
        path.write_bytes(content[:-1])
    elif fault == "forbidden":
        allowed = open

        def forbid(name, *args, **kwargs):
            if Path(name) == path:
                raise PermissionError(13, "Permission denied", str(name))
            return allowed(name, *args, **kwargs)

        monkeypatch.setattr("builtins.open", forbid)
    with pytest.raises(utils.DataError, match="(?s)train-labels.*What to do.*save the file as"):
        utils.load_handwritten()
    monkeypatch.setenv("A3_DATA", "auto")
    data = utils.load_handwritten()
    assert not data.real and "train-labels" in capsys.readouterr().out


# ---- stand-ins ----


def test_sklearn_digits_are_split_without_overlap(monkeypatch):
    monkeypatch.setenv("A3_DATA", "embedded")
    data = utils.load_handwritten()
    assert (data.name, data.real) == ("scikit-learn digits", False)
    assert (len(data.train), len(data.test)) == (1437, 360) and min(data.train.counts()) > 130
    assert data.train.images.shape[1:] == (1, 28, 28) and data.train.images.max() == 255
    seen = {bytes(image.numpy().tobytes()) for image in data.train.images}
    assert sum(bytes(image.numpy().tobytes()) in seen for image in data.test.images) <= 2


def test_tiny_profile_asks_no_network(monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    drawing(monkeypatch, toy_split(600, 3, 32), toy_split(300, 3, 32))
    for reader in ("_mnist", "_svhn"):
        monkeypatch.setattr(utils, reader, lambda part: pytest.fail("real data asked for"))
    for data in (utils.load_handwritten(), utils.load_street()):
        assert (len(data.train), len(data.test), data.real) == (512, 256, False)
        assert min(data.train.counts()) > 20


@pytest.mark.parametrize("wanted", ["auto", "embedded"])
def test_a_lone_notebook_without_network_or_files_says_what_to_do(wanted, small_svhn, monkeypatch):
    monkeypatch.setenv("A3_DATA", wanted)
    monkeypatch.setattr(utils, "OFFLINE", Path("nowhere"))
    for load in (utils.load_handwritten, utils.load_street):
        with pytest.raises(utils.DataError, match="offline/") as caught:
            load()
        assert wanted == "embedded" or "What to do: run again with a network" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        utils.offline_module("street_numbers")
