"""Shared helpers of Assignment 3 (COMP 499/691): the plumbing, none of the answers.

In this order: settings, data, training, parallel runs, display, PDF.
"""

from __future__ import annotations

import ast
import base64
import copyreg
import dis
import gzip
import hashlib
import http.client
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial, singledispatch
from html import escape, unescape
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, TypeVar
from urllib.parse import unquote

import joblib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import torch
from bs4 import BeautifulSoup, Comment, Tag
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from jinja2 import pass_context
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from nbconvert.exporters import HTMLExporter
from nbformat import NotebookNode
from packaging.version import Version
from torch import Tensor, nn
from tqdm import tqdm
from traitlets.config import Config

# ---- Settings ----

CHOICES = {  # the first is the default
    "A3_PROFILE": ("auto", "full", "short", "tiny"),
    "A3_DATA": ("auto", "real", "embedded"),  # embedded: stand-ins, without a download
    "A3_PRECISION": ("auto", "fp32", "bf16", "fp16"),
}
# The folder is missing beside a lone notebook, as in Colab, which writes utils.py and nothing else.
OFFLINE_FOLDER = Path(__file__).resolve().parent / "offline"


def setting(name: str) -> str:
    """The environment's value of a setting, else the first of its CHOICES.

    Raises ValueError that lists the valid values.
    """
    choices = CHOICES[name]
    value = os.environ.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of: {', '.join(choices)}.")
    return value


def jobs_setting() -> int | None:
    """A3_JOBS, how many trainings run side by side, or None where it is not set.

    Raises ValueError unless it is a whole number from 1.
    """
    text = os.environ.get("A3_JOBS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"A3_JOBS={text!r} must be a whole number, 1 or more.")
    return int(text)


def data_root() -> Path:
    """Folder of the data sets: A3_DATA_ROOT, else ./data."""
    return Path(os.environ.get("A3_DATA_ROOT") or "data").expanduser()


def runs_folder() -> Path:
    """Folder of all that a run writes: A3_RUNS, else ./runs."""
    return Path(os.environ.get("A3_RUNS") or "runs").expanduser()


def profile_for(*datasets: DigitData) -> str:
    """A3_PROFILE; where it is 'auto', 'full' on real data and 'short' with a stand-in."""
    profile = setting("A3_PROFILE")
    if profile != "auto":
        return profile
    return "full" if all(data.real for data in datasets) else "short"


def default_device() -> torch.device:
    """The CUDA GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache  # as autocast asks for each batch
def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AMX, AVX512-BF16); known on Linux only."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def forward_dtype(device: torch.device) -> torch.dtype:
    """Data type of the forward pass: A3_PRECISION, else what is fast on `device`.

    bf16 on CPUs and GPUs that have it (from Ampere on), fp16 with a loss scaler on older GPUs,
    else fp32. Raises ValueError for fp16 on a CPU and as `setting`.
    """
    choice = setting("A3_PRECISION")
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif choice == "auto":
        choice = "bf16" if cpu_has_fast_bf16() else "fp32"
    if choice == "fp16" and device.type != "cuda":
        raise ValueError("A3_PRECISION=fp16 needs a CUDA GPU; use auto, fp32 or bf16.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def autocast(device: torch.device) -> torch.autocast:
    """Context of a forward pass in the data type that `forward_dtype` gives."""
    dtype = forward_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def describe_machine() -> str:
    """One line on the machine, without its name: '2 cores x86_64, no GPU, torch 2.14.1'."""
    cores = counted(joblib.cpu_count(), "core")  # those that this process may use
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    version = torch.__version__.split("+")[0]
    return f"{cores} {platform.machine()}, {gpu}, torch {version}"


def counted(number: int, noun: str) -> str:
    """'1 core', '2 cores'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_notice(text: str) -> None:
    """Print something the reader must not miss, set off on standard output."""
    print("NOTE  " + text.strip().replace("\n", "\n      "), flush=True)


# ---- Data ----

TIMEOUT = 10.0  # how long, in seconds, a server may be silent
# An address, and a function that downloads it and returns the path of the file.
Source = tuple[str, Callable[[], Path]]
RETRYABLE = (  # what a second try may mend
    RuntimeError,  # among others, torch.hub's for a file with another hash, as one that was cut
    ConnectionError,
    http.client.HTTPException,
)
SIZES = {  # of the real sets, not cut short
    "MNIST": {"train": 60_000, "test": 10_000},
    "SVHN": {"train": 73_257, "test": 26_032},
}
TINY_SIZES = {"train": 512, "test": 256}  # at most, of each data set in the tiny profile
RENDERED_SIZES = {"train": 24_000, "test": 5_000}  # of the stand-in for SVHN
RENDERED_SEEDS = {"train": 1, "test": 2}
SHA256_PREFIXES = {  # the first 8 of 64 hex digits
    "train-images-idx3-ubyte.gz": "440fcabf",
    "train-labels-idx1-ubyte.gz": "3552534a",
    "t10k-images-idx3-ubyte.gz": "8d422c7b",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f9",
    "train_32x32.mat": "435e94d6",
    "test_32x32.mat": "cdce80df",
}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
SVHN_URL = "http://ufldl.stanford.edu/housenumbers"
SVHN_MIRROR = "ufldl-stanford/svhn"  # on the Hugging Face hub
SVHN_TRAIN_COUNTS = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # of 0 to 9
CERTIFICATES_HINT = (
    "if certificates cannot be verified, install them for this Python (macOS: run 'Install "
    "Certificates.command'; elsewhere set SSL_CERT_FILE to what `python -m certifi` prints)"
)


class DataError(RuntimeError):
    """No data or weights: what is missing, and below it what was tried."""


@dataclass(frozen=True)
class Split:
    """Images (uint8, N x C x H x W, C 1 or 3) and their labels (int64, N, 0 to 9).

    Raises ValueError for anything else.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4:
            raise ValueError(
                f"images must be uint8, N x C x H x W; got {self.images.dtype} {shape}"
            )
        if shape[0] < 1 or shape[1] not in (1, 3):
            raise ValueError(f"images must have N > 0 and C 1 or 3; got N x C x H x W = {shape}")
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise ValueError(
                f"labels must be int64, one for each of {shape[0]} images; "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if self.labels.min() < 0 or self.labels.max() > 9:
            raise ValueError("labels of images must be 0 to 9")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> Split:
        """The images at `indices`, in that order. ValueError for none, or outside 0 to N - 1."""
        given = np.asarray(indices)
        if not given.size:
            raise ValueError("there must be indices; got none")
        whole_numbers = np.issubdtype(given.dtype, np.integer)
        if not whole_numbers or given.min() < 0 or given.max() >= len(self):
            raise ValueError(f"indices must be whole numbers from 0 to {len(self) - 1}")
        index = torch.from_numpy(given.astype(np.int64))  # torch takes uint8 for a mask
        return Split(self.images[index], self.labels[index])

    def first(self, count: int) -> Split:
        """The first `count` images, or all when there are fewer. ValueError for a count below 1."""
        if count < 1:
            raise ValueError(f"count must be 1 or more; got {count}")
        return Split(self.images[:count], self.labels[:count])

    def counts(self) -> list[int]:
        """Number of images of each digit, 0 to 9."""
        return torch.bincount(self.labels, minlength=10).tolist()


@dataclass(frozen=True)
class DigitData:
    """A data set: its true name ("MNIST", "SVHN" or the stand-in's), two splits, real or not."""

    name: str
    train: Split
    test: Split
    real: bool

    def map(self, change: Callable[[Split], Split]) -> DigitData:
        """The same data with `change` applied to both splits."""
        return replace(self, train=change(self.train), test=change(self.test))


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, as the starter normalizes. ValueError for other types."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8; got {images.dtype}.")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


# Files and addresses


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then rename: readers never see half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_or_warn(path: Path, write: Callable[[Path], object]) -> None:
    """`write_atomically` a file that a run can do without: where that fails, say so and go on."""
    try:
        write_atomically(path, write)
    except OSError as error:
        print_notice(f"{path.name} cannot be written ({error}); the run goes on.")


def file_sha256(path: Path) -> str:
    """The file's sha256 as 64 hex digits. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_failure(source: object, error: Exception) -> str:
    """One line: the address or file, and what went wrong with it."""
    if isinstance(error, TimeoutError):
        return f"{source}: silent for {TIMEOUT:.0f} s"
    message = " ".join(str(error).split())[:300]
    return f"{source}: {type(error).__name__}: {message}"


def wait_for_answer(url: str) -> None:
    """Return when the server of `url` answers anything at all.

    Raises TimeoutError after TIMEOUT seconds, URLError where no connection can be made. A
    certificate that cannot be verified is no reason to stop: other clients have other certificates.
    """
    request = urllib.request.Request(url, method="HEAD")
    # The timeout of urlopen does not cover the look-up of the server's name, which may hang. So
    # urlopen runs in a thread, and we wait for its result. It gets a timeout of its own, longer
    # than our wait. Python waits for its threads when it exits; without that timeout a silent
    # server would delay the exit.
    pool = ThreadPoolExecutor(max_workers=1)
    answer = pool.submit(urllib.request.urlopen, request, timeout=2 * TIMEOUT)
    try:
        answer.result(TIMEOUT).close()
    except (urllib.error.HTTPError, http.client.HTTPException, ConnectionError):
        # The server is there, and the download will say what is wrong. urllib wraps errors of
        # connecting in URLError: one that comes bare comes after the connection was made.
        return
    except urllib.error.URLError as error:  # refused, unknown host, certificate
        if isinstance(error.reason, ssl.SSLError):
            return
        raise
    finally:
        pool.shutdown(wait=False)


def fetch_from(url: str, fetch: Callable[[], Path]) -> Path:
    """`fetch()`, once the server of `url` answers; tried again after an error of RETRYABLE."""
    wait_for_answer(url)
    print(f"Downloading {url}", flush=True)
    with redirect_stderr(sys.stdout):  # for progress bars: a notebook shows stderr in red
        try:
            return fetch()
        except RETRYABLE:
            return fetch()


def fetch_from_any(
    name: str, sources: Sequence[Source], hint: str, earlier_failures: Sequence[str] = ()
) -> Path:
    """The file from the first of `sources` that gives one.

    Raises DataError that lists all failures, the earlier ones first, and says what to do: `hint`.
    """
    failures = list(earlier_failures)
    for url, fetch in sources:
        try:
            return fetch_from(url, fetch)
        except Exception as error:  # whatever a client raises, the next address may work
            failures.append(describe_failure(url, error))
    if any("certificate" in failure.lower() for failure in failures):
        hint = f"{hint}; {CERTIFICATES_HINT}"
    lines = "\n".join(f"- {failure}" for failure in failures)
    raise DataError(f"{name} could not be downloaded.\nTried:\n{lines}\nWhat to do: {hint}.")


def download(url: str, path: Path, sha256_prefix: str) -> Path:
    """Download to `path`; a file that is cut or has another sha256 never gets that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix)
    finally:
        socket.setdefaulttimeout(before)
    return path


def verified_file(urls: Sequence[str], path: Path, sha256_prefix: str) -> Path:
    """`path`, with a file of this sha256: the one there, else from the first url that gives it.

    Raises DataError that lists every failure.
    """
    failures = []
    try:
        if file_sha256(path).startswith(sha256_prefix):
            return path
        failures.append(f"{path}: a file with another sha256")
    except FileNotFoundError:
        pass  # it is downloaded
    except OSError as error:
        failures.append(describe_failure(path, error))
    sources = [(url, partial(download, url, path, sha256_prefix)) for url in urls]
    wanted = f"{path} (sha256 {sha256_prefix}...)"
    hint = f"run again with an internet connection, or save the file as {wanted}"
    return fetch_from_any(path.name, sources, hint, failures)


def hub_source(repository: str, file: str, folder: Path, repo_type: str = "model") -> Source:
    """A source for `fetch_from_any`: a file of the Hugging Face hub, saved below `folder`.

    The hub's own client checks the file and resumes a download that was cut. Raises ImportError
    without huggingface_hub.
    """
    # Set before the import, which reads it: Xet, the hub's newer protocol, has no time-outs.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import hf_hub_download, hf_hub_url

    location = {
        "repo_id": repository,
        "filename": file,
        "repo_type": repo_type,
        "endpoint": os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
    }

    def fetch() -> Path:
        return Path(hf_hub_download(**location, local_dir=folder))

    return hf_hub_url(**location), fetch


def read_cache(path: Path) -> Split | None:
    """The split in an .npz file, or None where there is none or it is damaged."""
    try:
        with np.load(path) as stored:  # checks the CRC of what it reads
            images, labels = stored["images"], stored["labels"]
        return Split(torch.from_numpy(images), torch.from_numpy(labels))
    except Exception:  # whatever is wrong with a cache, it can be made again
        return None


def load_or_make(name: str, make: Callable[[], Split], *key: str) -> Split:
    """`make()`, or what it gave in an earlier run with the same key."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    path = runs_folder() / f"{name}-{digest}.npz"
    stored = read_cache(path)
    if stored is not None:
        return stored
    split = make()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # numpy adds .npz to a name, not to a file
            np.savez(file, images=split.images.numpy(), labels=split.labels.numpy())

    write_or_warn(path, write)
    return split


# Real data


def read_idx(path: Path) -> Tensor:
    """The numbers of a gzipped file in MNIST's idx format, uint8, as one long row."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    # Before the numbers: four bytes, of which the last one counts the dimensions, and the length of
    # each dimension in four bytes.
    dimensions = content[3]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions)


def real_mnist(split_name: str) -> Split:
    """'train' or 'test' of MNIST from its files in A3_DATA_ROOT, which are downloaded if need be.

    Raises DataError.
    """
    prefix = {"train": "train", "test": "t10k"}[split_name]
    contents = []
    for kind in ("images-idx3", "labels-idx1"):
        name = f"{prefix}-{kind}-ubyte.gz"
        path = data_root() / "MNIST" / "raw" / name
        contents.append(
            read_idx(verified_file([f"{MNIST_URL}/{name}"], path, SHA256_PREFIXES[name]))
        )
    images, labels = contents
    return Split(images.view(-1, 1, 28, 28), labels.long())


def decode_mat(file: Path) -> Split:
    """The split in SVHN's official .mat file."""
    from scipy.io import loadmat

    stored = loadmat(file)
    images = np.ascontiguousarray(stored["X"].transpose(3, 2, 0, 1))
    labels = stored["y"].ravel().astype(np.int64)
    labels[labels == 10] = 0  # the file calls the digit 0 ten
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def image_pixels(content: bytes) -> np.ndarray:
    """The pixels of an encoded image, uint8, 3 x 32 x 32.

    Raises ValueError for an image of another size, OSError for what is no image.
    """
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(content)))
    if image.shape != (32, 32, 3):
        raise ValueError(f"images must be 32 x 32 x 3; got {image.shape}")
    return image.transpose(2, 0, 1)


def decode_parquet(files: Sequence[Path]) -> Split:
    """The split in the mirror's parquet files: the encoded images and the labels of their rows."""
    tables = [pd.read_parquet(file, columns=["image", "label"]) for file in files]
    rows = pd.concat(tables)
    images = np.stack([image_pixels(image["bytes"]) for image in rows["image"]])
    labels = rows["label"].to_numpy(np.int64, copy=True)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def checked_svhn(split_name: str, files: Sequence[Path]) -> Split:
    """A split of SVHN from its official .mat file or the mirror's parquet files.

    It may be cut short: the committed run's test file holds the first 6,000 images. Raises
    DataError for a .mat with another checksum, and for images that cannot be SVHN's.
    """
    digests = [file_sha256(file) for file in files]
    if files[0].suffix == ".parquet":
        key = [*digests, fingerprint(decode_parquet)]
        split = load_or_make(f"svhn-{split_name}", lambda: decode_parquet(files), *key)
    elif digests[0].startswith(SHA256_PREFIXES[files[0].name]):
        key = [*digests, fingerprint(decode_mat)]
        split = load_or_make(f"svhn-{split_name}", lambda: decode_mat(files[0]), *key)
    else:
        raise DataError("this is not the official file; its checksum differs")
    require_svhn(split_name, split)
    return split


def require_svhn(split_name: str, split: Split) -> None:
    """Raise DataError where a split, whole or cut short, cannot be SVHN's."""
    whole = SIZES["SVHN"][split_name]
    if len(split) > whole:
        raise DataError(f"there are {len(split):,} images; SVHN has {whole:,}")
    if split_name == "test":  # no counts of its digits are known here
        return
    counts = split.counts()
    if 0 in counts:
        raise DataError(f"a digit is missing; the counts of 0 to 9 are {counts}")
    if len(split) == whole and counts != SVHN_TRAIN_COUNTS:
        raise DataError(f"the counts of the digits 0 to 9 are not those of SVHN: {counts}")


def real_svhn(split_name: str) -> Split:
    """'train' or 'test' of SVHN: files in A3_DATA_ROOT, the official address, the mirror.

    Raises DataError: what was tried, or what is wrong with the file that came.
    """
    split, failures = find_local_svhn(split_name)
    if split is not None:
        return split
    path = download_svhn(split_name, failures)
    try:
        return checked_svhn(split_name, [path])
    except Exception as error:
        raise DataError(describe_failure(path, error)) from error


def find_local_svhn(split_name: str) -> tuple[Split | None, list[str]]:
    """SVHN from files in A3_DATA_ROOT, or None, and what is wrong with those that cannot be used.

    Raises DataError where the package that reads a file is missing (scipy or pyarrow). No other
    file is tried then.
    """
    failures = []
    root = data_root()
    patterns = [
        f"{split_name}_32x32.mat",
        f"svhn/{split_name}-*.parquet",
        f"svhn/cropped_digits/{split_name}-*.parquet",  # where download_svhn leaves them
    ]
    for pattern in patterns:
        files = sorted(root.glob(pattern))
        if not files:
            failures.append(f"{root / pattern}: no such file")
            continue
        try:
            return checked_svhn(split_name, files), failures
        except ImportError as error:  # scipy or pyarrow
            raise DataError(describe_failure(root / pattern, error)) from error
        except Exception as error:  # another file, or a download, may do
            failures.append(describe_failure(root / pattern, error))
    return None, failures


def download_svhn(split_name: str, earlier_failures: list[str]) -> Path:
    """The file of SVHN that could be downloaded: the official one, else the mirror's.

    Raises DataError that lists all failures, the earlier ones first.
    """
    failures = list(earlier_failures)
    root = data_root()
    mat = f"{split_name}_32x32.mat"
    url = f"{SVHN_URL}/{mat}"
    sources = [(url, partial(download, url, root / mat, SHA256_PREFIXES[mat]))]
    parquet = f"cropped_digits/{split_name}-00000-of-00001.parquet"
    try:
        sources.append(hub_source(SVHN_MIRROR, parquet, root / "svhn", repo_type="dataset"))
    except ImportError as error:  # the official address may do
        failure = describe_failure(SVHN_MIRROR, error)
        failures.append(f"{failure}; run %pip install --upgrade huggingface_hub")
    files_needed = "train_32x32.mat and test_32x32.mat"
    hint = f"run again with an internet connection, or put {files_needed} into {root}"
    return fetch_from_any(f"SVHN ({split_name})", sources, hint, failures)


# Stand-ins, and which data a run takes


def require_offline_folder(what: str) -> None:
    """Raise DataError where the folder offline/ is missing, as it is beside a lone notebook."""
    if not OFFLINE_FOLDER.is_dir():
        raise DataError(f"{what} needs the whole project, with its folder offline/.")


def mnist_stand_in() -> DigitData:
    """The stand-in for MNIST, in its format. Raises DataError without the folder offline/."""
    require_offline_folder("The stand-in for MNIST")
    from offline import small_digits

    train, test = small_digits.load_small_digits()
    return DigitData("scikit-learn digits", Split(*train), Split(*test), real=False)


def svhn_stand_in() -> DigitData:
    """The stand-in for SVHN, in its format. Raises DataError without the folder offline/."""
    require_offline_folder("The stand-in for SVHN")
    from offline import street_numbers

    sizes = TINY_SIZES if setting("A3_PROFILE") == "tiny" else RENDERED_SIZES

    def rendered_split(split_name: str) -> Split:
        count, seed = sizes[split_name], RENDERED_SEEDS[split_name]
        key = [*street_numbers.cache_key(), str(count), str(seed)]
        render = street_numbers.render_street_numbers
        return load_or_make("rendered", lambda: Split(*render(count, seed)), *key)

    return DigitData(
        "rendered street numbers", rendered_split("train"), rendered_split("test"), real=False
    )


def real_or_stand_in(
    name: str, read: Callable[[str], Split], stand_in: Callable[[], DigitData]
) -> DigitData:
    """The data that A3_DATA asks for; with 'auto' the real data, else its stand-in with a notice.

    In a tiny run, 'auto' means the stand-in where there is one: the lone notebook has none. Raises
    DataError where what is asked for cannot be had.
    """
    choice = setting("A3_DATA")
    is_tiny = setting("A3_PROFILE") == "tiny"
    if choice == "embedded" or (choice == "auto" and is_tiny and OFFLINE_FOLDER.is_dir()):
        return stand_in()
    try:
        return DigitData(name, read("train"), read("test"), real=True)
    except DataError as error:
        if choice == "real":
            raise
        problem = str(error)
    try:
        data = stand_in()
    except DataError as error:
        raise DataError(f"{problem}\n{error}") from error
    print_notice(f"{data.name} in place of {name}.\n{problem}")
    return data


def cut_to_profile(data: DigitData) -> DigitData:
    """All of it, or its first few images in the tiny profile."""
    if setting("A3_PROFILE") != "tiny":
        return data
    train = data.train.first(TINY_SIZES["train"])
    test = data.test.first(TINY_SIZES["test"])
    return replace(data, train=train, test=test)


def load_mnist() -> DigitData:
    """MNIST, 1 x 28 x 28, or its stand-in, as A3_DATA says. Raises DataError."""
    return cut_to_profile(real_or_stand_in("MNIST", real_mnist, mnist_stand_in))


def load_svhn() -> DigitData:
    """SVHN, 3 x 32 x 32, or its stand-in, as A3_DATA says. Raises DataError."""
    return cut_to_profile(real_or_stand_in("SVHN", real_svhn, svhn_stand_in))


# Trained weights: g of Question 1 (e), the generator of Question 3

PUBLISHED_G_URLS = (
    "http://ml.cs.tsinghua.edu.cn/~chenxi/pytorch-models/svhn-f564f3d8.pth",
    "https://web.archive.org/web/20180115042531if_/"
    "http://ml.cs.tsinghua.edu.cn:80/~chenxi/pytorch-models/svhn-f564f3d8.pth",
)
MIN_G_ACCURACY = 90.0  # percent of 1,000 training images; weights below it are not used
BIGGAN_256_URL = (
    "https://s3.amazonaws.com/models.huggingface.co/biggan/biggan-deep-256-pytorch_model.bin"
)
BIGGAN_256_SHA256_PREFIX = "5900ef4065047e3a"  # the first 16 of 64 hex digits
BIGGAN_128_MIRROR = "osanseviero/BigGAN-deep-128"  # on the Hugging Face hub


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """`model` with the state dict of a file (fp16 becomes the model's type), in eval mode.

    Raises OSError where it cannot be read, RuntimeError that names a damaged or foreign file.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise RuntimeError(f"{path} is not a file of these weights: {error}") from error
    return model.eval()


def load_published_g(model: nn.Module) -> None:
    """Fill `model` with the starter's published weights. Raises DataError, RuntimeError."""
    path = verified_file(PUBLISHED_G_URLS, data_root() / "svhn-f564f3d8.pth", "f564f3d8")
    load_weights(model, path)
    # Its output i stands for the digit i + 1, the last one for 0. Rolled by one, output i stands
    # for the digit i.
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.roll(1, 0))


def load_our_g(model: nn.Module) -> None:
    """Fill `model` with the weights that offline/training/train_street_classifier.py made.

    Raises OSError without them, RuntimeError when they do not fit `model`.
    """
    load_weights(model, OFFLINE_FOLDER / "weights" / "street_classifier.pt")


@torch.inference_mode()
def classifier_accuracy(model: nn.Module, split: Split, device: torch.device) -> float:
    """Percent of `split` that `model` classifies right, without autocast.

    `model` must be in eval mode and on `device`.
    """
    chunks = split.images.split(250)
    predictions = [model(to_float(images).to(device)).argmax(1).cpu() for images in chunks]
    return 100 * (torch.cat(predictions) == split.labels).float().mean().item()


def short_reason(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def load_trained_g(model: nn.Module, street: DigitData, device: torch.device) -> str | None:
    """Fill `model`, the notebook's StreetClassifier, with trained weights, on `device`, eval mode.

    This project's weights; for real SVHN the starter's published ones first. Each is tried on up to
    1,000 training images of `street` and left out below 90 %; the reason is printed. Returns the
    origin as half a sentence, or None when no weights can be used: `model` is then of no use.
    """
    candidates: dict[str, Callable[[nn.Module], None]] = {}
    if street.real:
        candidates["the starter's published weights"] = load_published_g
    if OFFLINE_FOLDER.is_dir():
        ours = "this project's weights, offline/weights/street_classifier.pt"
        candidates[ours] = load_our_g
    trial = street.train.first(1_000)
    model.to(device)
    for origin, load in candidates.items():
        try:
            load(model)
        except (RuntimeError, OSError) as error:
            print(f"Not used: {origin}: {short_reason(error)}")
            continue
        accuracy = classifier_accuracy(model, trial, device)
        if accuracy >= MIN_G_ACCURACY:
            return origin
        print(f"Not used: {origin}: {accuracy:.1f} % right on {len(trial):,} training images.")
    return None


@dataclass(frozen=True)
class ImageGenerator:
    """A trained generator of images, in eval mode, and its sizes.

    `model(z, c, truncation)`, with z N x z_dim and c N x classes, gives N x 3 x size x size in
    -1..1.
    """

    model: nn.Module
    name: str
    title: str  # for captions: which model, whose weights
    classes: list[str]  # their names, in the order of c
    z_dim: int
    size: int


def load_biggan_deep(name: str, device: torch.device) -> ImageGenerator:
    """DeepMind's 'biggan-deep-256' or '-128' on ImageNet (Brock et al. 2019), about 0.2 GB.

    Raises ImportError without one of its packages, DataError without the file, RuntimeError
    for a file that does not fit.
    """
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig
    from torchvision.models import ResNet18_Weights

    config = BigGANConfig()  # the library's default is the 128 model
    if name == "biggan-deep-256":
        config.output_dim = 256
        # DeepMind's 256 model has these two layers more, behind the library's fifth. Each says
        # whether it doubles the size, and its channels in and out, in units of 128.
        added = [(True, 8, 8), (False, 8, 8)]
        config.layers = config.layers[:5] + added + config.layers[5:]
        path = verified_file(
            [BIGGAN_256_URL], data_root() / f"{name}.bin", BIGGAN_256_SHA256_PREFIX
        )
    else:
        path = data_root() / name / "pytorch_model.bin"
        if not path.exists():  # the hub's client gives only a whole file this name
            source = hub_source(BIGGAN_128_MIRROR, path.name, path.parent)
            fetch_from_any(name, [source], "run again with an internet connection")
    # load_weights checks all keys; the library's from_pretrained would accept any file.
    model = load_weights(BigGAN(config), path).to(device).requires_grad_(False)
    side = config.output_dim
    title = f"BigGAN-deep {side} x {side} (ImageNet, DeepMind's weights)"
    names = list(ResNet18_Weights.DEFAULT.meta["categories"])  # ImageNet's, in index order
    return ImageGenerator(model, name, title, names, config.z_dim, side)


def load_digit_generator(device: torch.device) -> ImageGenerator:
    """The digit BigGAN that offline/training/train_digit_biggan.py trained, 32 x 32.

    Raises DataError without the folder offline/, FileNotFoundError without its weights, ImportError
    without pytorch-pretrained-biggan.
    """
    require_offline_folder("The digit BigGAN")
    from offline import digit_biggan

    model = digit_biggan.load_digit_biggan(device).requires_grad_(False)
    title = "the digit BigGAN of this project"
    classes = list(digit_biggan.DIGIT_CLASSES)
    return ImageGenerator(model, "biggan-digits-32", title, classes, digit_biggan.Z_DIM, 32)


def load_digit_classifier(device: torch.device) -> nn.Module:
    """The classifier that judges the digit BigGAN's images, in eval mode: 20 classes of both sets.

    Raises as `load_digit_generator`, but for ImportError: it needs no library of BigGAN.
    """
    require_offline_folder("The classifier of generated digits")
    from offline import digit_biggan

    return digit_biggan.load_evaluation_classifier(device)


def load_generator(name: str, device: torch.device) -> ImageGenerator:
    """The generator of that name: 'digits', 'biggan-deep-256' or 'biggan-deep-128'.

    Raises ValueError for a name that is not known, or what the generator's loader raises.
    """
    if name == "digits":
        return load_digit_generator(device)
    if name in ("biggan-deep-256", "biggan-deep-128"):
        return load_biggan_deep(name, device)
    raise ValueError(f"use digits, biggan-deep-256 or biggan-deep-128; not {name!r}.")


def best_generator(
    name: str, profile: str, device: torch.device
) -> tuple[ImageGenerator | None, str]:
    """A generator, and why it is not BigGAN-deep-256 ("" if it is, or if `name` is not 'auto').

    With a name for `load_generator`: that one, or the error which `load_generator` raises. With
    'auto': BigGAN-deep in a full run (not with A3_DATA=embedded), else the digit BigGAN of
    offline/, else None.
    """
    if name != "auto":
        return load_generator(name, device), ""
    if profile == "full" and setting("A3_DATA") != "embedded":
        names = ["biggan-deep-256", "biggan-deep-128", "digits"]
        reasons = []
    else:
        names = ["digits"]
        reasons = ["BigGAN-deep is downloaded in a full run only, and not with A3_DATA=embedded"]
    for candidate in names:
        try:
            return load_generator(candidate, device), "; ".join(reasons)
        except DataError as error:  # its message names what is missing
            reasons.append(short_reason(error).removesuffix("."))
        except Exception as error:  # an optional part stops no notebook
            reasons.append(f"{candidate}: {short_reason(error).removesuffix('.')}")
    return None, "; ".join(reasons)


# ---- Training ----


def seed_of_epoch(seed: int, epoch: int) -> int:
    """A seed for each (seed, epoch)."""
    mixed = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(mixed[:7], "big")  # seven bytes fit into a signed 64-bit number


def random_stream(seed: int, epoch: int) -> torch.Generator:
    """A random stream for each (seed, epoch): a resumed run sees the same batches."""
    return torch.Generator().manual_seed(seed_of_epoch(seed, epoch))


def seed_torch(seed: int) -> None:
    """Seed torch's random numbers, and ask cuDNN for repeatable kernels."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


# One dict an epoch: 'epoch', 'seconds', the training's means ('train_loss', ...), evaluations.
History = list[dict[str, float]]
# A checkpoint is not saved after each short epoch: Google Drive keeps every version of a file for
# 30 days, which would fill it.
SECONDS_BETWEEN_SAVES = 10


@dataclass
class Training:
    """What the notebook's loop works with; `scaler` does nothing except in fp16."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


@dataclass(frozen=True)
class Plan:
    """How `fit` trains.

    name: shown in messages, 'SVHN, augmented, seed 1'. It is part of the checkpoint's name, so a
    renamed plan trains again. schedule: 'constant', or 'onecycle' (Smith and Topin 2018) with `lr`
    as its peak. weight_decay: decoupled (AdamW); 0 is plain Adam.
    evaluate(model): further numbers of each epoch, by name, for the history.
    """

    name: str
    epochs: int
    steps_per_epoch: int
    seed: int = 0
    lr: float = 1e-3
    schedule: str = "constant"
    weight_decay: float = 0.0
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None


@dataclass
class Run:
    """The current run of a process, the notebook's or a worker's: see `start_run`."""

    profile: str = ""
    first_line: str = ""
    first_line_handle: DisplayHandle | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # by the title of a stage
    resumed: list[str] = field(default_factory=list)  # names of trainings


_current_run = Run()


def start_run(profile: str, *data_names: str) -> None:
    """Begin a run: forget the last one's times and resumed trainings; show the first line.

    That line names the profile, data, machine, precision and number of trainings at a time.
    """
    global _current_run
    dtype = str(forward_dtype(default_device())).removeprefix("torch.")
    data = " and ".join(data_names)
    jobs = counted(n_jobs(), "training")
    first_line = f"Profile {profile}, on {data}: {describe_machine()}, {dtype}, {jobs} at a time."
    handle = None
    if in_kernel():
        handle = display({"text/plain": first_line}, raw=True, display_id=True)
    else:
        print(first_line, flush=True)
    _current_run = Run(profile, first_line, handle)


def resumed_trainings() -> list[str]:
    """Names of the trainings resumed from a checkpoint since `start_run`, at any epoch."""
    return list(dict.fromkeys(_current_run.resumed))


def stage_seconds() -> dict[str, float]:
    """Seconds of each stage (`title` of `run_parallel`) since `start_run`, to a tenth."""
    return {title: round(seconds, 1) for title, seconds in _current_run.seconds.items()}


def new_training(model: nn.Module, plan: Plan) -> Training:
    """Optimizer, schedule and scaler for `model`, whose weights get the layout channels_last.

    Raises ValueError for a schedule that is not known, and for epochs or steps below 1.
    """
    if plan.epochs < 1 or plan.steps_per_epoch < 1:
        wrong = f"epochs={plan.epochs}, steps_per_epoch={plan.steps_per_epoch}"
        raise ValueError(f"{plan.name}: {wrong}: at least 1 each.")
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)  # faster; same numbers but for rounding
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        fused=True,
    )
    if plan.schedule == "constant":
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    elif plan.schedule == "onecycle":
        total = plan.epochs * plan.steps_per_epoch
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, total_steps=total)
    else:
        raise ValueError(f"schedule={plan.schedule!r} is not known: 'constant' or 'onecycle'.")
    scaler = torch.amp.GradScaler("cuda", enabled=forward_dtype(device) == torch.float16)
    return Training(model, optimizer, scheduler, scaler)


class Checkpointer:
    """Stores a training and its history in one file."""

    def __init__(self, path: Path, training: Training) -> None:
        self.path = path
        self.training = training
        self.last_save_or_start = time.monotonic()

    def to_bytes(self, history: History) -> bytes:
        """A checkpoint's content."""
        checkpoint = {
            "model": self.training.model.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
            "scheduler": self.training.scheduler.state_dict(),
            "scaler": self.training.scaler.state_dict(),
            "history": history,
        }
        file = io.BytesIO()
        torch.save(checkpoint, file)
        return file.getvalue()

    def restore(self, content: bytes) -> History:
        """Put a checkpoint's state back. Raises one of many errors where it does not fit."""
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self.training.model.load_state_dict(checkpoint["model"])
        self.training.optimizer.load_state_dict(checkpoint["optimizer"])
        self.training.scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["scaler"]:  # empty where the training was not in fp16
            self.training.scaler.load_state_dict(checkpoint["scaler"])
        return list(checkpoint["history"])

    def load(self) -> History:
        """The history so far, with the state put back; empty where there is no usable file."""
        at_start = self.to_bytes([])  # to be put back where a file can be loaded only in part
        try:
            return self.restore(self.path.read_bytes())
        except FileNotFoundError:
            return []
        except Exception as error:
            kind = type(error).__name__
            print_notice(f"Checkpoint {self.path.name} is no use ({kind}): training starts again.")
            return self.restore(at_start)

    def save_if_due(self, history: History, last: bool) -> None:
        """Write the state after the last epoch, and after others if none was saved a moment ago."""
        if not last and time.monotonic() - self.last_save_or_start < SECONDS_BETWEEN_SAVES:
            return
        content = self.to_bytes(history)
        write_or_warn(self.path, lambda temporary: temporary.write_bytes(content))
        self.last_save_or_start = time.monotonic()


def fit(
    train_epoch: Callable[[Training, Iterable, Callable], dict[str, float]],
    model: nn.Module,
    batches: Callable[[int], Iterable],
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]],
    plan: Plan,
) -> History:
    """Train `model` in place by the notebook's loop `train_epoch`, with AdamW; return its history.

    `model` is left in eval mode. A training that has a checkpoint is resumed from there.

    train_epoch(training, batches, loss_fn) puts the model into train mode, steps optimizer and
    scheduler for each batch, and returns means, 'loss' among them. loss_fn(model, batch) gives the
    loss and further metrics by name.
    batches(epoch) yields `plan.steps_per_epoch` batches, for the same epoch always the same ones.

    The checkpoint, in `runs_folder`, is named after a fingerprint of the code, data and settings
    that are handed over, and of this file, so what is changed trains again. The device, its
    automatic precision and versions of packages do not count. An error or an interrupt loses the
    current epoch, and those that ended less than SECONDS_BETWEEN_SAVES after the last save.

    Raises FloatingPointError when the loss is not finite, ValueError as `new_training`.
    """
    this_module = sys.modules[__name__]
    precision = setting("A3_PRECISION")
    key = fingerprint(train_epoch, model, batches, loss_fn, plan, precision, this_module)
    file_name = re.sub(r"[^a-z0-9]+", "-", plan.name.lower()).strip("-")
    training = new_training(model, plan)
    checkpointer = Checkpointer(runs_folder() / f"{file_name}-{key}.pt", training)
    history = checkpointer.load()
    if history:
        _current_run.resumed.append(plan.name)
        report_epochs(len(history))
    for epoch in range(len(history), plan.epochs):
        started = time.perf_counter()
        seed_torch(seed_of_epoch(plan.seed, epoch))  # for dropout: so resuming is exact
        means = train_epoch(training, batches(epoch), loss_fn)
        require_finite(means["loss"], plan, epoch)
        metrics = {f"train_{name}": value for name, value in means.items()}
        if plan.evaluate:
            metrics |= plan.evaluate(model)
        # torch.load takes no numbers of numpy.
        metrics = {name: float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - started
        history.append({"epoch": epoch + 1, "seconds": seconds, **metrics})
        checkpointer.save_if_due(history, last=epoch + 1 == plan.epochs)
        report_epochs(1)
    model.eval()
    return history


def require_finite(loss: float, plan: Plan, epoch: int) -> None:
    """Raise FloatingPointError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{plan.name}: the loss became {loss} in epoch {epoch + 1}. "
            f"Use a smaller learning rate than {plan.lr:g}, or A3_PRECISION=fp32."
        )


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> Tensor:
    """Outputs for every image of `split`, in order: float32, CPU. Leaves `model` in eval mode.

    It runs where the parameters of `model` are.
    """
    device = next(model.parameters()).device
    model.eval()
    outputs = []
    with autocast(device):
        for chunk in split.images.split(512):
            images = to_float(chunk.to(device))
            images = images.contiguous(memory_format=torch.channels_last)
            outputs.append(model(images).float())
    return torch.cat(outputs).cpu()


# Fingerprints
#
# A fingerprint says whether a checkpoint is of the training that is asked for. It covers all that
# the parts reach. Values count by content. Functions count by their byte code and classes by their
# members, with the globals that they use. A module of the project, such as this one, counts by its
# text. Memory addresses, the folder of the code and devices do not count, as they change from one
# machine to the next.


UNFINISHED = b"unfinished"  # stands for a part that is met again within itself


def fingerprint(*parts: object) -> str:
    """16 hex digits that change with `parts`: values, code, and what the code uses.

    The project's own functions and classes are followed into the global values that they name.
    Functions and classes of Python and of installed packages count by name only; what a function
    imports in its body does not count. Docstrings of functions count, comments do not; in modules,
    both do. Another version of Python gives other byte code.
    """
    # By the id of a part: the part, kept so that its id is not used again, and its digest.
    known: dict[int, tuple[object, bytes]] = {}

    def digest(part: object) -> bytes:
        if id(part) in known:
            return known[id(part)][1]
        # For the time being, so that a part that holds itself is not followed for ever.
        known[id(part)] = (part, UNFINISHED)
        kind = type(part)
        pieces = [kind.__qualname__.encode(), b":"]
        if is_ours(kind):
            pieces.append(digest(kind))
        content = content_of(part)
        if isinstance(content, bytes):
            pieces.append(content)
        elif kind in (set, frozenset):  # has no order
            pieces += sorted(digest(item) for item in content)
        else:
            pieces += [digest(item) for item in content]
        known[id(part)] = (part, hashlib.sha256(b"".join(pieces)).digest())
        return known[id(part)][1]

    return digest(parts).hex()[:16]


@singledispatch
def content_of(part: object) -> bytes | list:
    """What a fingerprint covers of `part`: its bytes, or further parts."""
    return content_of_instance(part)


def content_of_instance(part: object) -> list:
    """The content of an instance without a rule of its own: what pickle would store of it."""
    content = []
    # What wraps a function (functools.cache, classmethod, staticmethod): the function inside.
    if hasattr(part, "__wrapped__"):
        content.append(part.__wrapped__)
    # Some libraries tell pickle in this table how to store their types: numpy for np.tanh.
    registered = copyreg.dispatch_table.get(type(part))
    try:
        reduced = registered(part) if registered else part.__reduce_ex__(2)
    except Exception:  # what cannot be pickled counts by its type: a lock, a file
        return content
    if isinstance(reduced, str):  # the name of a global, such as math.exp
        return [*content, getattr(part, "__module__", ""), reduced]
    # A function that rebuilds the part, its arguments, and up to three more entries: its state, and
    # iterators over what it holds as a list or as a dict.
    for entry in reduced:
        is_iterator = isinstance(entry, Iterator)
        content.append(list(entry) if is_iterator else entry)
    return content


@content_of.register
def content_of_value(part: int | float | complex | str | bytes | NoneType) -> bytes:
    return repr(part).encode()


@content_of.register
def content_of_sequence(part: list | tuple) -> list:
    if type(part) not in (list, tuple):  # a subclass may hold more than its items
        return content_of_instance(part)
    return list(part)


@content_of.register
def content_of_set(part: set | frozenset) -> list:
    if type(part) not in (set, frozenset):
        return [frozenset(part), getattr(part, "__dict__", {})]
    return list(part)


@content_of.register
def content_of_dict(part: dict) -> list:
    if type(part) is not dict:
        return content_of_instance(part)
    return list(part.items())  # in its order, which may decide, say, which loss comes first


@content_of.register
def content_of_device(part: torch.device) -> list:
    return []


@content_of.register
def content_of_array(part: np.ndarray | np.generic) -> list:
    if part.dtype.hasobject:  # its bytes are addresses
        return [part.dtype.str, part.shape, part.tolist()]
    return [part.dtype.str, part.shape, hashlib.sha256(part.tobytes()).digest()]


@content_of.register
def content_of_tensor(part: Tensor) -> list:
    content = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    shape = tuple(part.shape)
    return [str(part.dtype), shape, part.requires_grad, hashlib.sha256(content).digest()]


@content_of.register
def content_of_network(part: nn.Module) -> list:
    # The type, as `digest` adds only the name of a library's class, not its module. Of the
    # attributes those count that a plain nn.Module lacks. Hooks do not count.
    in_every_network = vars(nn.Module())
    attributes = {name: value for name, value in vars(part).items() if name not in in_every_network}
    weights = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return [type(part), part.training, list(part.named_children()), weights, attributes]


@content_of.register
def content_of_python_module(part: ModuleType) -> list:
    if not is_ours(part) or part.__name__ == "__main__":
        return [part.__name__]
    return [part.__name__, file_content(part)]


@cache  # the text at the first call, also where the file changes later
def file_content(module: ModuleType) -> bytes:
    """What a module's file holds; empty where it has none."""
    file = getattr(module, "__file__", None)
    return Path(file).read_bytes() if file else b""


@content_of.register
def content_of_property(part: property) -> list:
    return [part.fget, part.fset, part.fdel]


@content_of.register
def content_of_method(part: MethodType) -> list:
    return [part.__func__, part.__self__]


@content_of.register
def content_of_function(part: FunctionType) -> list:
    if not is_ours(part):
        # A library's function counts by its name. It may wrap one of ours, as torch.no_grad() does.
        return [module_name(part), part.__qualname__, getattr(part, "__wrapped__", None)]
    defaults = [part.__defaults__, part.__kwdefaults__]
    return [part.__code__, defaults, used_globals(part), closure_values(part), vars(part)]


@content_of.register
def content_of_class(part: type) -> list:
    if not is_ours(part):
        return [module_name(part), part.__qualname__]
    members = {name: value for name, value in vars(part).items() if counts_as_member(name, value)}
    return [part.__qualname__, part.__bases__, members]


@content_of.register
def content_of_code(part: CodeType) -> list:
    names = [part.co_names, part.co_varnames]
    counts = [part.co_argcount, part.co_posonlyargcount, part.co_kwonlyargcount, part.co_flags]
    # Functions within it are among its constants.
    return [part.co_code, part.co_exceptiontable, part.co_consts, names, counts]


def module_name(part: FunctionType | type | ModuleType) -> str:
    """The name of the module that defines a function or a class, or of the module itself."""
    if isinstance(part, ModuleType):
        return part.__name__
    if isinstance(part, FunctionType):
        # Not __module__: a decorator copies that from the function which it wraps.
        return part.__globals__.get("__name__") or "__main__"
    # Some compiled types have another thing than a string there.
    return part.__module__ if isinstance(part.__module__, str) else "builtins"


def is_ours(part: FunctionType | type | ModuleType) -> bool:
    """Whether the part is the project's own: not Python's, not an installed package's."""
    package = module_name(part).partition(".")[0]
    # The notebook or a script. The file of __main__ says nothing: in a worker it is loky's.
    if package == "__main__":
        return True
    if package in sys.stdlib_module_names:
        return False
    if package not in sys.modules:  # the notebook's definitions, as tools/notebook.py loads them
        return True
    module = sys.modules[package]
    file = getattr(module, "__file__", None)
    # A namespace package has folders in place of a file.
    places = [file] if file else getattr(module, "__path__", [])
    installed = {"site-packages", "dist-packages"}
    return not any(installed & set(Path(place).parts) for place in places)


def counts_as_member(name: str, member: object) -> bool:
    """Whether a fingerprint covers a member of one of our classes."""
    if not name.startswith("__"):
        return True
    # Of names with two underscores only methods count (__init__, __call__), not what Python adds
    # (__doc__, __dict__). A method may be wrapped: by a decorator, and __new__ by staticmethod.
    return isinstance(inspect.unwrap(member), FunctionType)


def code_within(code: CodeType) -> list[CodeType]:
    """`code`, and that of the functions and comprehensions within it."""
    found = [code]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += code_within(constant)
    return found


def used_globals(function: FunctionType) -> dict[str, object]:
    """The global values that `function` reads, by name."""
    names = set()
    for code in code_within(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.add(instruction.argval)
    # Python's own names are not among the globals. Names such as __file__ would tell the folder.
    known = [name for name in sorted(names) if name in function.__globals__]
    return {name: function.__globals__[name] for name in known if not name.startswith("__")}


def closure_values(function: FunctionType) -> dict[str, object]:
    """The values that `function` takes from the function around it."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            values[name] = cell.cell_contents
    return values


# ---- Parallel runs ----

Result = TypeVar("Result")

CONTROL_GROUPS = Path("/sys/fs/cgroup")
CONTROL_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
MEMORY_OF_A_TRAINING = 1.5e9  # bytes of one process that trains, with the libraries
# By default glibc gives freed memory back at once, and has to take it again. With these settings it
# keeps the memory, and the last one asks for huge pages: a training that took 12.2 s takes 8.9 s.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
FIRST_STAGE = "1 (b) recipes"  # its title; the notebook's first trainings
# A run's time over that of its first stage, by profile; measured with two trainings at a time.
RUN_TO_FIRST_STAGE_RATIO = {"full": 36, "short": 25}


def memory_limit_files() -> list[Path]:
    """Where the memory limits of this process's control groups would stand; none except on Linux.

    A group's limit holds for all groups below it, so those above count, too. Some of these files
    may be missing: a container may see its own group as the top of the tree.
    """
    try:
        lines = CONTROL_GROUPS_OF_PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = []
    for line in lines:  # of version 2: 0::/docker/1f2a, of version 1: 4:memory:/docker/1f2a
        _, controllers, group = line.split(":", 2)
        if not controllers:
            tree, name = CONTROL_GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            tree, name = CONTROL_GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(group.lstrip("/"))
        files += [tree / place / name for place in (own, *own.parents)]
    return files


def memory_limit() -> float:
    """Bytes that this process's control group, such as a container, may use; else infinity."""
    limits = [math.inf]
    for file in memory_limit_files():
        # OSError: no such file. ValueError: int("max"), where the group has no limit.
        with suppress(OSError, ValueError):
            limits.append(int(file.read_text(encoding="utf-8")))
    return min(limits)


@cache
def jobs_that_fit_in_memory() -> int:
    """How many trainings fit into the memory that is free at the first call; 0 where none does.

    Later, idle workers hold some of it, which the next trainings take over.
    """
    left_below_limit = memory_limit() - psutil.Process().memory_info().rss
    free = min(psutil.virtual_memory().available, left_below_limit)
    return max(0, int(free / MEMORY_OF_A_TRAINING))


def n_jobs() -> int:
    """How many trainings may run at a time: A3_JOBS, else one on a GPU, else one on each core.

    On a CPU there are no more than its free memory holds, unless A3_JOBS asks for them.
    Raises ValueError as `jobs_setting`.
    """
    chosen = jobs_setting()
    if chosen is not None:
        return chosen
    if default_device().type == "cuda":
        return 1
    # joblib counts the cores that this process may use.
    return max(1, min(joblib.cpu_count(), jobs_that_fit_in_memory()))


# Set in each process while a task runs there. All tasks of a stage share the file: each finished
# epoch adds a byte.
_epochs_file: Path | None = None


def report_epochs(count: int) -> None:
    """Tell the bar of `run_parallel` that `count` more epochs are over; elsewhere do nothing."""
    if _epochs_file is None:
        return
    with suppress(OSError), _epochs_file.open("ab") as file:
        file.write(b"." * count)  # one byte for each epoch


def run_parallel(
    tasks: dict[Hashable, Callable[[], Result]], *, title: str, epochs: int
) -> dict[Hashable, Result]:
    """Run independent trainings, `n_jobs` at a time, one thread each.

    Each task is a function without arguments, which may be defined in a notebook (joblib's loky
    sends it), and trains for `epochs` epochs. One progress bar, `title`, is over all of them.
    Results come in the order of `tasks`, and are the same whatever the number of jobs, if no task
    changes what another one was given. Raises RuntimeError that names the task that failed.
    """
    jobs = min(n_jobs(), len(tasks))
    with tempfile.TemporaryDirectory(prefix="a3-", ignore_cleanup_errors=True) as folder:
        epochs_file = Path(folder) / "epochs"
        calls = {}  # what runs, here or in other processes
        for key, task in tasks.items():
            calls[key] = partial(run_task, task, task_name(key), epochs_file)
        with (
            StageDisplay(title, len(tasks) * epochs, epochs_file) as stage,
            warnings.catch_warnings(),
        ):
            # loky replaces workers whose memory has grown.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
            if jobs <= 1:
                results = {key: call() for key, call in calls.items()}
            else:
                results = run_in_processes(calls, jobs)
            stage.record_end(len(tasks))
    return results


def task_name(key: Hashable) -> str:
    """The name of a task in messages: ('SVHN', 'tuned', 1) is 'SVHN, tuned, 1'."""
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def run_task(task: Callable[[], Result], name: str, epochs_file: Path) -> Result:
    """The task's result, from one thread; its finished epochs are counted in `epochs_file`.

    Raises RuntimeError that names the task for any exception of it.
    """
    global _epochs_file
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on any number of cores
    _epochs_file = epochs_file
    try:
        return task()
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        _epochs_file = None
        torch.set_num_threads(threads)


def run_in_processes(calls: dict[Hashable, partial], jobs: int) -> dict[Hashable, Any]:
    """The results of `calls`, from `jobs` processes.

    Raises RuntimeError that names the tasks in work where a process was ended from outside. What a
    task raises ends the other processes.
    """
    settings = {name: text for name, text in os.environ.items() if name.startswith("A3_")}
    # Where the settings changed, loky starts new workers.
    executor = get_reusable_executor(max_workers=jobs, env=MALLOC_ENVIRONMENT | settings)
    waiting = list(calls)
    running: dict[Future, Hashable] = {}
    results = {}
    try:
        while waiting or running:
            # Submit no more than can run at once: then an error names only the tasks in work.
            while waiting and len(running) < jobs:
                key = waiting.pop(0)
                running[executor.submit(result_and_resumed_names, calls[key])] = key
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                result, resumed = future.result()
                results[running[future]] = result
                _current_run.resumed += resumed
                del running[future]
    except TerminatedWorkerError as error:
        names = "; ".join(task_name(key) for key in running.values())
        raise RuntimeError(
            "The system ended a process, as it does when memory runs out, during: "
            f"{names}. Run again with A3_JOBS=1, one training at a time; finished ones are kept."
        ) from error
    except BaseException:
        executor.shutdown(wait=False, kill_workers=True)
        raise
    return {key: results[key] for key in calls}


def result_and_resumed_names(call: Callable[[], Result]) -> tuple[Result, list[str]]:
    """In a worker: the result of `call` and the names of its resumed trainings.

    `fit` adds those to the `_current_run` of its process. A worker has one of its own, which may
    still hold the names of an earlier task.
    """
    _current_run.resumed.clear()
    result = call()
    return result, _current_run.resumed


class DisplayStream:
    """A file for tqdm: what is written replaces the text of a notebook's display.

    So the saved notebook keeps one line of a stage. (A carriage return would keep every state of
    the bar there, a widget would be empty in the PDF, and stderr is shown in red.)
    """

    def __init__(self, handle: DisplayHandle) -> None:
        self.handle = handle

    def write(self, text: str) -> None:
        if text.strip():
            self.handle.update({"text/plain": text.strip()}, raw=True)

    def flush(self) -> None:
        """tqdm asks for it."""


class StageDisplay:
    """The bar of one `run_parallel`, kept up to date by a thread, and the line when it ends."""

    def __init__(self, title: str, all_epochs: int, epochs_file: Path) -> None:
        self.title = title
        self.all_epochs = all_epochs  # of all tasks together
        self.epochs_file = epochs_file
        self.resumed_before = len(_current_run.resumed)
        self.started = time.perf_counter()
        self.text = f"{title}: stopped"  # the line that stays where `record_end` is not reached
        self.ended = threading.Event()  # tells the thread
        self.thread = threading.Thread(target=self.follow, daemon=True)

    def __enter__(self) -> StageDisplay:
        self.handle = display(display_id=True) if in_kernel() else None
        if self.handle:
            file, disable = DisplayStream(self.handle), False
        else:
            file, disable = sys.stdout, None  # None: only on a terminal, not in a log file
        self.bar = tqdm(
            total=self.all_epochs,
            desc=self.title,
            unit="epoch",
            file=file,
            leave=False,
            disable=disable,
        )
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bar.close()
        if self.handle:
            self.handle.update({"text/plain": self.text}, raw=True)
        else:
            print(self.text, flush=True)

    def follow(self) -> None:
        """Until the stage ends: show how many epochs are over."""
        while not self.ended.wait(0.5):
            with suppress(OSError):  # no epoch is over yet
                self.bar.update(self.epochs_file.stat().st_size - self.bar.n)

    def record_end(self, trainings: int) -> None:
        """The stage has its results: keep its time, and compose the line that stays.

        FIRST_STAGE also tells how long the run takes.
        """
        seconds = time.perf_counter() - self.started
        resumed = len(_current_run.resumed) - self.resumed_before
        duration = f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
        self.text = f"{self.title}: {counted(trainings, 'training')} in {duration}"
        if resumed:
            self.text += f", {resumed} of them resumed: delete the checkpoints (.pt) in "
            self.text += f"{runs_folder()} to train again"
        elif self.title == FIRST_STAGE:  # a resumed one is too short to tell the run's time
            announce_time(seconds)
        _current_run.seconds[self.title] = seconds


def announce_time(first_stage_seconds: float) -> None:
    """Tell how long the run takes, from the seconds of its first stage."""
    if _current_run.profile not in RUN_TO_FIRST_STAGE_RATIO:
        return
    seconds = first_stage_seconds * RUN_TO_FIRST_STAGE_RATIO[_current_run.profile]
    minutes = max(1, round(seconds / 60))
    text = f"The whole run takes about {counted(minutes, 'minute')} on this machine."
    if _current_run.first_line_handle:
        line = f"{_current_run.first_line} {text}"
        _current_run.first_line_handle.update({"text/plain": line}, raw=True)
    else:
        print(text, flush=True)


# ---- Display ----


def in_kernel() -> bool:
    """Whether this runs in a notebook's kernel, not in a script or on a terminal."""
    return getattr(get_ipython(), "kernel", None) is not None


def show_media(data: dict[str, str], metadata: dict, at: DisplayHandle | None = None) -> None:
    """Show data by its media types, in the place `at` if given; a script prints the plain text."""
    if not in_kernel():
        print(data["text/plain"])
    elif at is None:
        display(data, raw=True, metadata=metadata)
    else:
        at.update(data, raw=True, metadata=metadata)


def set_figure_style() -> None:
    """The look of every figure of the notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "font.size": 9,
            "axes.titlesize": 9.5,
            "legend.fontsize": 8.5,
            "image.cmap": "gray",
            "svg.hashsalt": "assignment3",  # the same file from the same figure
        }
    )


def show_figure(
    figure: plt.Figure, number: int | str, name: str, caption: str, photo: bool = False
) -> None:
    """Show, save (in the runs folder's figures/) and close a figure.

    number: 3, or 'A3' in the appendix. Plots are SVG; `photo` makes a PNG of 220 dpi. The caption
    is also the alternative text.
    """
    text = f"Figure {number}. {caption}"
    kind, media_type = ("png", "image/png") if photo else ("svg", "image/svg+xml")
    content = figure_bytes(figure, kind, text)
    file = runs_folder() / "figures" / f"{name}.{kind}"
    write_or_warn(file, lambda temporary: temporary.write_bytes(content))
    output_metadata = {"caption": text, media_type: {"alt": text}}
    if photo:
        # In CSS pixels, 96 an inch.
        output_metadata[media_type]["width"] = round(96 * figure.get_figwidth())
    image = base64.b64encode(content) if photo else content
    show_media({media_type: image.decode(), "text/plain": text}, output_metadata)
    if in_kernel():  # where the image is shown, the caption follows
        show_media({"text/markdown": f"*{text}*", "text/plain": text}, {"is_caption": True})
    plt.close(figure)


def figure_bytes(figure: plt.Figure, kind: str, title: str) -> bytes:
    """A figure as a file, 'png' or 'svg', the same one from the same figure."""
    left_out = "Software" if kind == "png" else "Date"  # a version or a time: these change
    file_metadata = {"Title": title, left_out: None}
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=220, bbox_inches="tight", metadata=file_metadata)
    return file.getvalue()


def show_table(
    frame: pd.DataFrame, number: int | str, caption: str, at: DisplayHandle | None = None
) -> None:
    """Show a table below its caption; floats have two decimals.

    number: 3, or 'A3' in the appendix.
    `at`: a handle from `display(..., display_id=True)`; the table replaces what it shows.
    """
    text = f"Table {number}. {caption}"
    show_frame(frame, text, {"caption": text}, at)


def show_claims(claims: dict[str, bool]) -> None:
    """Show which of the discussions' sentences hold in this run."""
    claims = {sentence: bool(holds) for sentence, holds in claims.items()}  # numpy's bools, too
    words = ["holds" if holds else "does not hold" for holds in claims.values()]
    frame = pd.DataFrame({"claim": list(claims), "in this run": words})
    show_frame(frame, "", {"claims": claims})


def show_frame(
    frame: pd.DataFrame, caption: str, metadata: dict, at: DisplayHandle | None = None
) -> None:
    """Show a frame as an HTML table: the first column to the left, the others to the right."""
    cells = frame.map(table_entry_text)
    with pd.option_context("display.max_colwidth", None):
        soup = BeautifulSoup(cells.to_html(index=False, border=0), "html.parser")
        plain = cells.to_string(index=False)
    for row in soup("tr"):
        first, *others = row(["th", "td"])
        first["style"] = "text-align: left"
        for entry in others:
            entry["style"] = "text-align: right"
    if caption:
        heading = soup.new_tag("caption", style="caption-side: top; text-align: left")
        heading.string = caption
        soup.table.insert(0, heading)
        plain = f"{caption}\n{plain}"
    show_media({"text/html": str(soup), "text/plain": plain}, metadata, at)


def table_entry_text(value: object) -> str:
    """A table's cell: floats with two decimals, nothing for NaN, true minus signs."""
    if isinstance(value, float | np.floating):
        value = "" if math.isnan(value) else f"{value:z.2f}"  # z: 0.00, not -0.00
    # A hyphen that begins a number; those within words and ranges (1-2) stay.
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", str(value))


# ---- PDF: nbconvert makes HTML, pandoc turns it into Typst, typst sets it; no LaTeX ----

COURSE = "COMP 499/691, Special Topics: Deep Learning"
NEEDED_VERSIONS = {"nbconvert": "7.16.5", "pypandoc-binary": "1.16.2", "typst": "0.15.0"}
# Cells with these tags are left out. "submission" is the cell that assigns NAME and STUDENT_NUMBER:
# its values are printed at the top of page 1.
LEFT_OUT_TAGS = {"hide-pdf", "install", "helper-module", "export", "submission"}
OUTPUTS_ONLY_TAGS = {"hide-code", "claims"}
IMAGE_TYPES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")
# Tags that become words, with a notice; an SVG of a figure is an <img> instead.
SHOWN_AS_WORDS = ["iframe", "video", "audio", "canvas", "object", "embed", "svg"]
# What nbconvert wraps around everything.
WRAPPERS = ".cell, .inner_cell, .text_cell_render, .highlight, [class^=output]"
# The spaces in 95 %, 24 × 24, Table 4 and Figure A1, at which no line ends.
BOUND_SPACE = re.compile(r"(?<=\d) (?=[%×])|(?<=×) (?=\d)|((?<=Table)|(?<=Figure)) (?=A?\d)")
LONGEST_LINK = 1500  # letters; Typst refuses longer ones
FIRST_LINES, LAST_LINES = 26, 13  # what is shown of an output of more than 40 lines
# All but tab, line feed and carriage return; str.translate drops what has the value None.
CONTROL_CHARACTERS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])
PDF_A = "a-2b"  # a standard for archives; makes Typst report letters without glyphs
TABLE_WIDTH = 54  # what fits on the page, in em of TABLE_SIZE
TABLE_SIZE = 9  # pt
STYLE = r"""
// fit_table counts on the 9pt and 0.45em of tables, and on words that break from 80 letters on.
#set page(paper: "a4", margin: (x: 1.8cm, y: 1.7cm), footer:
  context text(8pt)[#document.title #h(1fr) #counter(page).display("1 / 1", both: true)])
#set text(10pt)
#set par(justify: true, leading: 0.55em, spacing: 0.85em)
#show heading: set block(above: 1.3em, below: 0.7em)
#show link: set text(navy)
#show quote: it => block(
  width: 100%, fill: luma(242), inset: 6pt, spacing: 8.5pt, breakable: false, it.body)
// Words of 80 letters and more may break after every eighth. Code copied from the PDF keeps these
// invisible breaks, so shorter words have none.
#show regex("\S{80,}"): it => it.text.replace(regex(".{8}"), part => part.text + sym.zws)
#set figure(supplement: none, numbering: none)
#show figure: set text(9pt)
#show figure.where(kind: image): set block(spacing: 1.6em)
#show figure.where(kind: table): set figure.caption(position: top)
// A table of less than half a page stays on one page.
#show figure.where(kind: table): set block(breakable: true)
#show figure.where(kind: table): it => layout(size => {
  let height = measure(it, width: size.width).height
  block(spacing: 1.6em, breakable: height > 50% * page.height, it)
})
#set table(stroke: (x: none, y: 0.3pt + gray), inset: (x: 0.45em, y: 0.37em))
#show table: set par(justify: false)
#show table.cell: set align(right)
#show table.cell.where(x: 0): set align(left)
#show table.cell.where(y: 0): strong
// An image is no higher than 60 % of the page.
#show image: it => layout(size => {
  let ratio = 0.6 * page.height / measure(it, width: size.width).height
  if ratio < 1 { scale(ratio * 100%, reflow: true, it) } else { it }
})
#show raw.where(block: true): set text(8pt)
#show raw.where(block: true): it => {
  set par(justify: false, leading: 0.4em, spacing: 0.4em)
  // What does not fit on a line goes on below it, four letters further in than it began.
  let hanging(line) = 0.6em * (line.text.position(regex("\S|$")) + 4)
  // The first lines stay together, so that none is alone at a page's foot.
  let lines = it.lines.map(line => block(sticky: line.number < 4,
    par(hanging-indent: hanging(line), line + sym.zws))) // an empty line needs the zws to be seen
  // A cell's code has a language and is gray; all else is white.
  block(width: 100%, inset: (x: 5pt, y: 4pt), stroke: (left: 1pt + luma(205)),
    fill: if it.lang != none { luma(246) }, breakable: lines.len() > 16, lines.join())
}
#let horizontalrule = line(length: 100%) // pandoc writes it for <hr>
"""
APPENDIX = "#show raw.where(block: true): set text(7pt)\n== Appendix: code\n"
# TeX commands that pandoc's reader of formulas lacks.
OUR_MACROS = r"""\newcommand{\rm}[1]{\mathrm{#1}} \newcommand{\bf}[1]{\mathbf{#1}}
\newcommand{\cal}[1]{\mathcal{#1}} \newcommand{\tag}[1]{\quad\text{(#1)}}
\newcommand{\label}[1]{} \newcommand{\nonumber}{}"""
BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # three deep
MACRO_COMMAND = r"\\(?:newcommand|renewcommand|def|DeclareMathOperator)\*?"
MACRO_NAME = r"\{?\\\w+\}?"
MACRO_ARGUMENTS = r"[^{}]*"  # [1], #1
# A macro's definition in a formula, e.g. \newcommand{\R}{\mathbb{R}}.
MACRO_DEFINITION = MACRO_COMMAND + r"\s*" + MACRO_NAME + MACRO_ARGUMENTS + BRACES
# What stands in HTML and Typst text where a formula will be; no cell holds such a word.
FORMULA_WORD = f"formula{os.urandom(8).hex()}"
FORMULA_PATTERN = rf"⟦{FORMULA_WORD} (\d+)⟧"


@dataclass
class Part:
    """What is typeset in one piece: a cell, or its code in the appendix."""

    cell_number: int
    soup: BeautifulSoup
    typst: str = ""


@dataclass
class Formula:
    """A formula of a cell; `typst` is all that stands in its place, dollar signs included."""

    cell_number: int
    tex: str
    is_block: bool  # stands between lines of text, not within one
    typst: str = ""


class TypstPDFExporter(HTMLExporter):
    """A PDF without LaTeX; also `jupyter nbconvert --to utils.TypstPDFExporter FILE.ipynb`.

    Tags of cells: LEFT_OUT_TAGS, OUTPUTS_ONLY_TAGS, code-in-appendix (outputs in place),
    cell-in-appendix (code and outputs). Metadata of outputs: caption;
    is_caption (left out, as the caption stands at the figure); claims, a dict of sentences and
    whether they hold.
    `notices` tells what could not be shown as it is, which claims do not hold, and what the name
    cell lacks: "cell N: what".
    """

    @property
    def default_config(self) -> Config:
        """nbconvert's settings: HTML as pandoc reads it, without code, which `read_cells` adds."""
        settings_of_classes = {
            "CoalesceStreamsPreprocessor": {"enabled": True},
            "TypstPDFExporter": {
                "template_name": "basic",
                "exclude_input": True,
                "exclude_output_prompt": True,
            },
        }
        config = Config(super().default_config)
        config.merge(Config(settings_of_classes))
        return config

    def from_file(self, file_stream, resources=None, **kwargs) -> tuple[bytes, dict]:
        """Convert an open file of any notebook format, with or without a byte order mark."""
        nb = nbformat.reads(file_stream.read().lstrip("\ufeff"), as_version=4)
        content, resources = self.from_notebook_node(nb, resources, **kwargs)
        for text in self.notices:
            self.log.warning(text)
        return content, resources

    def from_notebook_node(self, nb, resources=None, **kwargs) -> tuple[bytes, dict]:
        """PDF of a notebook of format 4; images are looked for in resources' metadata.path."""
        check_versions()
        import typst

        self.nb = with_all_fields(nb)
        self.resources = self._init_resources(resources)
        self.formulas: list[Formula] = []
        self.numbered_notices: list[tuple[int, str]] = []  # number of a cell, what about it
        self.image_numbers = itertools.count()
        with tempfile.TemporaryDirectory() as folder:
            self.typst_folder = Path(folder)
            self.compiler = typst.Compiler(root=folder)
            content = self.typeset(*self.read_cells())
        self.notices = [f"cell {number}: {text}" for number, text in sorted(self.numbered_notices)]
        return content, self.resources | {"output_extension": ".pdf"}

    def note(self, number: int, text: str) -> None:
        """Keep a notice on the cell of this number."""
        self.numbered_notices.append((number, text))

    # Cells to HTML

    def read_cells(self) -> tuple[list[Part], list[Part]]:
        """The parts of the body and of the appendix."""
        body, appendix = [], []
        for number, cell in enumerate(self.nb.cells, 1):
            if LEFT_OUT_TAGS & set(cell.metadata.tags):
                continue
            # An attribute, as nbconvert calls `markdown2html` and cannot hand the number on.
            self.cell_number = number
            if cell.cell_type == "code":
                self.keep_printable_outputs(cell)
            part, listing = self.read_cell(cell)
            if "code-in-appendix" in cell.metadata.tags:
                appendix.append(Part(number, listing))
            else:
                part.soup.insert(0, listing)
            if "cell-in-appendix" in cell.metadata.tags:
                appendix.append(part)
            else:
                body.append(part)
        appendix = [part for part in appendix if part.soup.find(True)]  # without empty ones
        self.mend_links([part.soup for part in body + appendix])
        head = self.make_head(body)  # takes the title out of the body
        return [head, *body], appendix

    def read_cell(self, cell: NotebookNode) -> tuple[Part, BeautifulSoup]:
        """The part of a cell, without its code, and the listing of its code."""
        part = Part(self.cell_number, parse_html(self.cell_html(cell)))
        self.make_printable(part)
        # Only after make_printable, which shortens long outputs and knows them by these wrappers.
        for wrapper in part.soup.select(WRAPPERS):
            wrapper.unwrap()
        listing = ""
        if cell.cell_type == "code" and not OUTPUTS_ONLY_TAGS & set(cell.metadata.tags):
            listing = code_listing(cell.source)
        return part, parse_html(listing)

    def keep_printable_outputs(self, cell: NotebookNode) -> None:
        """Drop the outputs that the PDF leaves out, and keep one form of each other one.

        Also notes claims that do not hold.
        """
        cell.outputs = [output for output in cell.outputs if is_printed(output)]
        for output in cell.outputs:
            self.note_claims(output.get("metadata", {}).get("claims", {}))
            self.keep_one_form(output)

    def cell_html(self, cell: NotebookNode) -> str:
        """HTML of a text, or of the outputs of code, by nbconvert.

        Where it cannot, a text is shown as source, and outputs are left out; a notice says so.
        """
        # Format 4.4, as 4.5 asks for ids of cells, which older notebooks lack.
        one_cell = NotebookNode(self.nb, nbformat_minor=4, cells=[cell])
        try:
            return super().from_notebook_node(one_cell, dict(self.resources))[0]
        except Exception as error:  # whatever: one cell must not cost the others
            if cell.cell_type == "code":
                self.note(self.cell_number, f"its outputs are not shown: {error}")
                return ""
            self.note(self.cell_number, f"shown as source: {error}")
            return f"<pre>{escape(cell.source)}</pre>"

    def keep_one_form(self, output: NotebookNode) -> None:
        """Reduce an output's data to the form that the PDF shows.

        Plain text alone stays. Otherwise it is the first of these that exists: image, Markdown,
        LaTeX, HTML. A remark stands in the place of anything else.
        """
        data, metadata = output.get("data", {}), output.get("metadata", {})
        if data.keys() <= {"text/plain"}:
            return  # text, a stream or an error stays as it is
        soup = BeautifulSoup(data.get("text/html", ""), "html.parser")
        for tag in soup(["script", "style"]):
            tag.decompose()
        markdown = data.get("text/markdown") or data.get("text/latex")
        image_type = next((kind for kind in IMAGE_TYPES if kind in data), "")
        if image_type:
            words = escape(metadata.get("caption", ""))
            image = figure_image(image_type, data[image_type], words)
            caption = f"<figcaption>{self.mark_formulas_in_html(words)}</figcaption>"
            output.data = {"text/html": f"<figure>{image}{caption}</figure>"}
        elif markdown:
            output.data = {"text/markdown": markdown}
        elif soup.find(["img", *SHOWN_AS_WORDS]) or soup.get_text(strip=True):
            output.data = {"text/html": self.mark_formulas_in_html(str(soup))}
        else:
            what = f"interactive output, not shown here ({', '.join(sorted(data))})"
            self.note(self.cell_number, what)
            output.data = {"text/plain": f"[{what}]"}

    def note_claims(self, claims: dict[str, bool]) -> None:
        """Name the claims that do not hold, and the cells whose text makes them."""
        failed = [sentence for sentence, holds in claims.items() if not holds]
        for sentence in failed:
            places = [
                place
                for place, cell in enumerate(self.nb.cells, 1)
                if contains_sentence(cell, sentence)
            ]
            for place in places or [self.cell_number]:
                self.note(place, f"does not hold in this run: {sentence}")
        if failed:
            self.note(self.cell_number, f"{len(failed)} of {len(claims)} claims do not hold")

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        """HTML of Markdown, with a mark in the place of each formula.

        The templates of nbconvert call it: it takes the place of their filter of this name.
        """
        from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

        renderer = IPythonRenderer(
            escape=False,
            attachments=context.get("cell", {}).get("attachments", {}),
            exclude_anchor_links=True,
        )
        renderer.block_html = self.mark_formulas_in_html
        renderer.inline_math = self.mark_formula
        renderer.block_math = partial(self.mark_formula, is_block=True)
        renderer.latex_environment = self.mark_environment
        return MarkdownWithMath(renderer=renderer).render(source)

    def mark_formula(self, tex: str, is_block: bool = False) -> str:
        """Keep a formula for later; returns the mark of its place."""
        self.formulas.append(Formula(self.cell_number, tex, is_block))
        return f"⟦{FORMULA_WORD} {len(self.formulas) - 1}⟧"

    def mark_environment(self, name: str, body: str) -> str:
        r"""The same for \begin{align} and its like."""
        return self.mark_formula(rf"\begin{{{name}}}{body}\end{{{name}}}", is_block=True)

    def mark_formulas_in_html(self, html: str) -> str:
        """HTML with a mark in the place of each formula in dollars, one or two.

        HTML with code stays as it is, as dollars within code are no formulas.
        """
        if re.search(r"<(pre|code)\b", html):
            return html

        def mark(found: re.Match) -> str:
            return self.mark_formula(unescape(found[2]), is_block=found[1] == "$$")

        spaced = r"\s[^$<>]+\s"  # $ x $, but not "5$ and 6$"
        tight = r"[^$<>\s](?:[^$<>]*[^$<>\s])?"  # $x$, but not "$5 and $"
        # No digit follows: "$5 to$6" is no formula.
        return re.sub(rf"(\$\$?)({spaced}|{tight})\1(?!\d)", mark, html)

    def make_head(self, body: list[Part]) -> Part:
        """Course, title (taken out of the body) and the values of the name cell.

        Also sets `title`, the PDF's, and notes what the name cell lacks.
        """
        number, source = self.submission_cell()
        values = assigned_values(source)
        who = {name: values.get(name, "") for name in ("NAME", "STUDENT_NUMBER", "DISCUSSED_WITH")}
        missing = [name for name, value in who.items() if not value]
        if missing:
            self.note(number, f"the name cell lacks {', '.join(missing)}: fill it in")
        heading = take_title(body)
        self.title = ", ".join(filter(None, [self.plain_text(heading), who["NAME"]]))
        facts = []
        for name, value in who.items():
            label = name.replace("_", " ").capitalize()
            facts.append(f"{label}: <b>{escape(value) or 'empty'}</b>")
        html = f"<p>{COURSE}</p>{heading}<p>{' &emsp; '.join(facts)}</p>"
        return Part(number, BeautifulSoup(html, "html.parser"))

    def submission_cell(self) -> tuple[int, str]:
        """Number and source of the last name cell; 1 and nothing where there is none."""
        found = (1, "")
        for number, cell in enumerate(self.nb.cells, 1):
            if "submission" in cell.metadata.tags:
                found = (number, cell.source)
        return found

    # HTML for paper

    def mend_links(self, soups: list[BeautifulSoup]) -> None:
        """Give headings ids, and let links lead to them; broken and very long ones become words."""
        headings = [heading for soup in soups for heading in soup(re.compile(r"^h[1-6]$"))]
        ids = {}
        for number, heading in enumerate(headings):
            heading["id"] = f"section-{number}"
            # Of headings with the same words, links lead to the first.
            ids.setdefault(slug(self.plain_text(heading)), heading["id"])
        for soup in soups:
            for link in soup("a"):
                address = self.with_tex_source(link.get("href", ""))
                if address.startswith("#"):
                    address = "#" + ids.get(slug(address), "")
                is_broken = address in ("", "#")
                if is_broken or len(address) > LONGEST_LINK:
                    link.unwrap()
                else:
                    link.attrs = {"href": address}

    def make_printable(self, part: Part) -> None:
        """Change a cell's HTML to what can be printed, and note what cannot."""
        for tag in part.soup(SHOWN_AS_WORDS):
            if tag.find_parent(SHOWN_AS_WORDS):  # gone with the one around it
                continue
            self.replace_by_words(part.cell_number, tag, f"{tag.name} {tag.get('src', '')}")
        for image in part.soup("img"):
            self.save_image(part.cell_number, image)
        for pre in part.soup("pre"):
            pre.replace_with(BeautifulSoup(printable_pre(pre), "html.parser"))
        for table in part.soup("table"):
            self.fit_table(part.cell_number, table)
        bind_words(part.soup)

    def replace_by_words(self, cell_number: int, tag: Tag, what: str) -> None:
        """Put words in the place of what cannot be shown, and note it."""
        self.note(cell_number, f"{what[:70].strip()} is not shown")
        tag.replace_with(f"[{tag.get('alt') or what[:70].strip()}: not shown]")

    def save_image(self, cell_number: int, image: Tag) -> None:
        """Write an image (data: or a file) to where Typst finds it."""
        source = unquote(image.get("src", ""))
        folder = self.resources["metadata"].get("path") or "."
        try:
            if source.startswith("data:"):
                content = base64.b64decode(source.partition(",")[2])
            else:
                content = Path(folder, source).read_bytes()
        except (OSError, ValueError):
            self.replace_by_words(cell_number, image, f"image {source}")
            return
        name = f"image{next(self.image_numbers)}"
        (self.typst_folder / name).write_bytes(content)
        image["src"] = name
        image["alt"] = self.with_tex_source(image.get("alt") or "image")

    def fit_table(self, cell_number: int, table: Tag) -> None:
        """Make the type of a table smaller where its longest words are wider than the page."""
        lengths = longest_word_lengths(table)
        # In em: half of one for a letter, and STYLE's inset of 0.45 on both sides of a column.
        # STYLE breaks words of 80 letters and more.
        width = sum(0.5 * min(80, length) + 0.9 for length in lengths)
        if width > TABLE_WIDTH:
            size = TABLE_SIZE * TABLE_WIDTH / width
            table["typst:text:size"] = f"{size:.1f}pt"  # pandoc hands it on to Typst
            self.note(
                cell_number, f"a table of {len(lengths)} columns is set small, in {size:.1f} pt"
            )

    # HTML to PDF

    def typeset(self, body: list[Part], appendix: list[Part]) -> bytes:
        """The PDF of all parts, by the first of three ways that succeeds.

        1. As PDF/A. 2. If the text is not valid Typst: formulas, images and parts that cannot be
        set become source, again as PDF/A. 3. Without PDF/A, as where no font has some letter.
        """
        self.convert_formulas()
        parts = body + appendix
        self.convert_parts(parts)
        content, problem = self.compile_typst(join_parts(body, appendix), PDF_A)
        if content is not None:
            return content
        if not refuses_pdf_a(problem):  # the text is not valid Typst
            self.repair(parts)
            content, problem = self.compile_typst(join_parts(body, appendix), PDF_A)
            if content is not None:
                return content
        return self.pdf_without_standard(body, appendix, problem)

    def pdf_without_standard(self, body: list[Part], appendix: list[Part], problem: str) -> bytes:
        """A PDF that is no PDF/A, with the names of symbols that no font has.

        `problem` is why there is no PDF/A. Raises RuntimeError where this cannot be set, either.
        """
        rules = symbol_rules(self.note_missing_letters(problem, body + appendix))
        content, problem = self.compile_typst(rules + join_parts(body, appendix))
        if content is None:
            raise RuntimeError(f"Typst cannot set the notebook: {problem}")
        return content

    def convert_formulas(self) -> None:
        """Fill in the Typst text of all formulas, at once, so that each knows all macros."""
        sources = [clean_tex(formula.tex) for formula in self.formulas]
        # pandoc reads a macro's definition outside of formulas only: all go to the front.
        macros = re.findall(MACRO_DEFINITION, " ".join(sources))
        numbered = [numbered_formula(index, tex) for index, tex in enumerate(sources)]
        try:
            text = pandoc("\n\n".join([OUR_MACROS, *macros, *numbered]), "markdown+latex_macros")
        except RuntimeError:  # a macro's definition is broken: the formulas go without any
            text = pandoc("\n\n".join([OUR_MACROS, *numbered]), "markdown+latex_macros")
        text = with_current_symbol_names(text)
        # An answer is a paragraph: 12 $ x + y $
        answers = dict(re.findall(r"(?ms)^(\d+) \$ (.*?) \$$", text))
        for index, formula in enumerate(self.formulas):
            # pandoc writes "||" for the bars of vmatrix and Vmatrix alike.
            bars = '"‖"' if "Vmatrix" in formula.tex else '"|"'
            typst = answers.get(str(index), "").replace('"||"', bars)
            formula.typst = f"$ {typst} $" if formula.is_block else f"${typst}$"
            if not typst:
                self.show_as_source(formula)

    def show_as_source(self, formula: Formula) -> None:
        """Show a formula as it was typed."""
        self.note(formula.cell_number, f"formula {formula.tex[:70]} is shown as source")
        formula.typst = f"#raw({typst_string(formula.tex)})"

    def convert_parts(self, parts: list[Part]) -> None:
        """Fill in the Typst text of parts by one call of pandoc."""
        mark = f"⟦{os.urandom(8).hex()}⟧"  # stands in no cell
        html = f"<p>{mark}</p>".join(str(part.soup) for part in parts)
        texts = pandoc(html, "html-auto_identifiers").split(mark)
        for part, text in zip(parts, texts, strict=True):
            part.typst = text

    def compile_typst(self, text: str, *standards: str) -> tuple[bytes | None, str]:
        """PDF of Typst text and "", else None and why."""
        text = re.sub(FORMULA_PATTERN, lambda found: self.formulas[int(found[1])].typst, text)
        title = f"#set document(title: {typst_string(self.title)})\n"
        source = title + STYLE + text + stubs_of_missing_labels(text)
        try:
            return self.compiler.compile(source.encode(), pdf_standards=list(standards)), ""
        except RuntimeError as error:
            return None, error.diagnostic

    def compiles(self, text: str) -> bool:
        """Whether Typst can set a text."""
        content, _ = self.compile_typst(text)
        return content is not None

    def repair(self, parts: list[Part]) -> None:
        """Show what cannot be set otherwise: a formula or part as source, an image as words."""
        for part in parts:
            if self.compiles(part.typst):
                continue
            for index in re.findall(FORMULA_PATTERN, part.typst):
                formula = self.formulas[int(index)]
                if not self.compiles(formula.typst):
                    self.show_as_source(formula)
            for image in part.soup("img"):
                if not self.compiles(f"#image({typst_string(image['src'])})"):
                    self.replace_by_words(part.cell_number, image, f"image {image['alt']}")
            self.convert_parts([part])
            if not self.compiles(part.typst):
                self.note(part.cell_number, "shown as source, as it cannot be set")
                part.typst = f"#raw({typst_string(self.plain_text(part.soup))}, block: true)"

    def plain_text(self, soup: Tag) -> str:
        """The words of HTML, with each formula as it was typed in the place of its mark."""
        return self.with_tex_source(soup.get_text())

    def with_tex_source(self, text: str) -> str:
        """Text with each formula as it was typed in the place of its mark."""
        return re.sub(FORMULA_PATTERN, lambda found: f"${self.formulas[int(found[1])].tex}$", text)

    def note_missing_letters(self, problem: str, parts: list[Part]) -> str:
        """Note the letters that no font has; returns them."""
        missing = dict.fromkeys(re.findall(r'the text `"(.+?)"` could not', problem))
        if not missing:
            return ""
        texts = [(part.cell_number, part.typst + self.plain_text(part.soup)) for part in parts]
        for letters in missing:
            numbers = [number for number, text in texts if letters in text]
            self.note(numbers[0] if numbers else 1, f"no font here has {letters}: install one")
        return "".join(missing)


def refuses_pdf_a(problem: str) -> bool:
    """Whether Typst finds a text valid, but not fit for PDF/A, as a letter has no glyph."""
    message, _, _ = problem.partition("\n")  # lines of the text follow
    return "PDF/A" in message


def stubs_of_missing_labels(text: str) -> str:
    """Typst text that defines the labels to which `text` links and which it lacks.

    A label is missing where its heading is shown as source, or where `repair` compiles a part alone
    that links to another one.
    """
    wanted = set(re.findall(r"#link\((<section-\d+>)\)", text))
    there = set(re.findall(r"(?m)^(<section-\d+>)$", text))
    return "".join(f"\n#metadata(none) {label}" for label in sorted(wanted - there))


def symbol_rules(characters: str) -> str:
    """Typst rules that put names in the place of symbols, such as emoji, but not of letters."""
    rules = ""
    for character in dict.fromkeys(characters):
        if unicodedata.category(character) == "So":
            name = unicodedata.name(character, "symbol").lower()
            rules += f"#show {typst_string(character)}: {typst_string(f'[{name}]')}\n"
    return rules


def with_current_symbol_names(typst: str) -> str:
    """Typst text with today's names of two symbols, for which pandoc writes older ones."""
    parts = re.split(r'("(?:[^"\\]|\\.)*")', typst)  # every second one is quoted text, which stays
    for number in range(0, len(parts), 2):
        renamed = re.sub(r"\bsect\b", "inter", parts[number])  # the intersection of sets
        parts[number] = re.sub(r"\.circle\b", ".o", renamed)  # times.o and the like
    return "".join(parts)


def check_versions() -> None:
    """Raise ImportError where a package of NEEDED_VERSIONS is missing or too old."""
    for package, needed in NEEDED_VERSIONS.items():
        found = "none"
        with suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(package)
        if found == "none" or Version(found) < Version(needed):
            raise ImportError(
                f"The PDF needs {package} {needed} or newer, found: {found}. Run "
                f"%pip install --upgrade {package} and restart the kernel."
            )


def pandoc(text: str, from_format: str) -> str:
    """Typst text of a text in one of pandoc's formats. Raises RuntimeError."""
    import pypandoc

    options = ["--wrap=none", "--quiet", "--sandbox"]
    return pypandoc.convert_text(text, "typst", from_format, options)


def clean_tex(tex: str) -> str:
    """A formula on one line, without comments and the old form of fonts."""
    # \% is a percent sign. In \\% the backslashes are a line break, and a comment begins.
    without_comments = re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", tex)
    # {\rm abc} becomes \mathrm{abc}; the macro \rm of OUR_MACROS would take only the a.
    with_new_fonts = re.sub(r"\{\\(rm|bf|cal)\s+([^{}]*)\}", r"\\math\1{\2}", without_comments)
    return " ".join(with_new_fonts.split())


def numbered_formula(index: int, tex: str) -> str:
    """A paragraph for pandoc: a formula behind its index, which stands in pandoc's answer too.

    The formula is without definitions of macros. Where nothing else is left, it is a space, as
    pandoc takes $$$$ for no formula.
    """
    tex = re.sub(MACRO_DEFINITION, "", tex).strip() or "~"
    return f"{index} $${tex}$$"


def typst_string(text: str) -> str:
    """A string of Typst, without control characters, which JSON writes in another way."""
    return json.dumps(text.translate(CONTROL_CHARACTERS), ensure_ascii=False)


def join_parts(body: list[Part], appendix: list[Part]) -> str:
    """Typst text of all parts."""
    texts = [part.typst for part in body]
    if appendix:
        texts += [APPENDIX, *(part.typst for part in appendix)]
    return "\n".join(texts)


def take_title(body: list[Part]) -> Tag:
    """The first heading of level 1, taken out of its part; an empty soup where there is none."""
    for part in body:
        if part.soup.h1:
            return part.soup.h1.extract()
    return BeautifulSoup("", "html.parser")


def code_listing(code: str) -> str:
    """HTML of a cell's code; a first line "# @title words" becomes a heading."""
    code = code.strip("\n")
    heading = ""
    first, _, rest = code.partition("\n")
    if first.startswith(("# @title", "#@title")):
        title = first.partition("@title")[2]
        title = re.sub(r"\{[^{}]*\}\s*$", "", title)  # Colab's options
        heading = f"<h4>{escape(title.strip())}</h4>"
        code = rest
    if not code.strip():
        return ""
    code = re.sub(r"\n\s*\n(?=\S)", "\n\n", code)  # one empty line between functions saves paper
    return f'{heading}<pre class="python"><code>{escape(code)}</code></pre>'


def parse_html(html: str) -> BeautifulSoup:
    """Parsed HTML, without control characters, which no notebook shows and no font has."""
    return BeautifulSoup(html.translate(CONTROL_CHARACTERS), "html.parser")


def printable_pre(pre: Tag) -> str:
    """HTML of preformatted text; of long outputs only the beginning and the end."""
    lines = [line.rstrip() for line in pre.get_text().strip("\n").split("\n")]
    left_out = len(lines) - FIRST_LINES - LAST_LINES
    if left_out > 1 and pre.find_parent(class_="output"):
        lines[FIRST_LINES:-LAST_LINES] = [f"[… {left_out} lines left out …]"]
    text = escape("\n".join(lines))
    return f"<pre><code>{text}</code></pre>" if text.strip() else ""


def bind_words(soup: Tag) -> None:
    """Put no-break spaces where no line should end; code keeps its spaces."""
    for words in soup(string=BOUND_SPACE):
        is_comment = isinstance(words, Comment)
        if not is_comment and not words.find_parent(["pre", "code"]):
            words.replace_with(BOUND_SPACE.sub("\N{NO-BREAK SPACE}", words))


def longest_word_lengths(table: Tag) -> list[int]:
    """Number of letters of the longest word in each column of a table."""
    rows = []
    for row in table("tr"):
        cells = [cell.get_text().split() for cell in row(["td", "th"])]
        rows.append([max(map(len, words), default=0) for words in cells])
    return [max(column) for column in itertools.zip_longest(*rows, fillvalue=0)]


def is_printed(output: NotebookNode) -> bool:
    """Whether the PDF shows an output: not an empty one, and not the caption below a figure."""
    is_caption = output.get("metadata", {}).get("is_caption", False)
    # Streams and errors have no field of that name.
    is_empty = "data" in output and all(content == "" for content in output.data.values())
    return not is_caption and not is_empty


def figure_image(media_type: str, content: str, alt: str) -> str:
    """HTML of an image: SVG comes as text, others as base64; `alt` is HTML."""
    if media_type == "image/svg+xml":
        content = base64.b64encode(content.encode()).decode()
    return f'<img alt="{alt}" src="data:{media_type};base64,{content}">'


def slug(heading: str) -> str:
    """Letters and digits of a heading or of a link to it, as Jupyter or as GitHub writes it."""
    return re.sub(r"[\W_]+", "-", unquote(heading)).strip("-").lower()


def contains_sentence(cell: NotebookNode, sentence: str) -> bool:
    """Whether a text cell holds a sentence, whatever its emphasis and line breaks."""
    if cell.cell_type != "markdown":
        return False
    words = re.escape(plain_words(sentence).rstrip("."))
    return re.search(rf"(?<!\w){words}(?!\w)", plain_words(cell.source)) is not None


def plain_words(text: str) -> str:
    """Markdown without emphasis and line breaks."""
    return " ".join(re.sub(r"[*_`]", "", text).split())


def assigned_values(source: str) -> dict[str, str]:
    """Names and the constants, as text, that a cell assigns to them; {} if it is no Python."""
    without_magics = re.sub(r"(?m)^[%!].*", "", source)  # %env A3_PROFILE=tiny
    try:
        statements = ast.parse(without_magics).body
    except SyntaxError:
        return {}
    values = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value:  # NAME: str = "Ann"
            targets = [statement.target]
        else:
            continue
        with suppress(ValueError, TypeError):  # not a constant; {[1]: 2}
            value = ast.literal_eval(statement.value)
            for target in targets:
                values[ast.unparse(target)] = value_text(value)
    return values


def value_text(value: object) -> str:
    """A value in words: the items of a list or tuple with commas between them."""
    if value is None:
        return ""
    items = value if isinstance(value, list | tuple) else [value]
    return ", ".join(map(str, items)).strip()


def with_all_fields(nb: NotebookNode) -> NotebookNode:
    """A copy of a notebook with the fields that some lack, and its name cell tagged.

    Half of an emoji, which a text cut by a program may end in, becomes a question mark.
    """
    text = json.dumps(nb, ensure_ascii=False).encode("utf-8", "replace").decode()
    nb = nbformat.from_dict(json.loads(text))
    nb.setdefault("metadata", {}).pop("widgets", None)  # nbconvert stops at Colab's form of them
    nb.setdefault("cells", [])
    for cell in nb.cells:
        cell.metadata = NotebookNode(cell.get("metadata") or {})
        cell.metadata.tags = list(cell.metadata.get("tags") or [])
        cell.source = cell.get("source") or ""
        if cell.cell_type != "code":
            continue
        cell.execution_count = cell.get("execution_count")
        cell.outputs = [with_output_fields(output) for output in cell.get("outputs") or []]
        assigns_names = {"NAME", "STUDENT_NUMBER"} <= assigned_values(cell.source).keys()
        if assigns_names and not LEFT_OUT_TAGS & set(cell.metadata.tags):
            cell.metadata.tags.append("submission")  # one retyped in Colab has no tag
    return nb


def with_output_fields(output: NotebookNode) -> NotebookNode:
    """An output with the fields that some lack or leave empty."""
    if output.output_type == "stream":
        defaults = {"name": "stdout", "text": ""}
    elif output.output_type == "error":
        words = f"{output.get('ename')}: {output.get('evalue')}"
        defaults = {"ename": "", "evalue": "", "traceback": [words]}
    else:
        defaults = {"data": {}, "metadata": {}}
    if output.output_type == "execute_result":
        defaults["execution_count"] = None
    present = {name: value for name, value in output.items() if value not in (None, [])}
    return NotebookNode({**defaults, **present})


def export_pdf(notebook: str | Path | None = None, pdf: str | Path | None = None) -> list[str]:
    """Write the executed notebook as `pdf`, or beside it; print and return the exporter's notices.

    Without `notebook`: in Colab the open one; else the saved file that VS Code or Jupyter names
    to its kernel, or the folder's only one. Raises FileNotFoundError where there is none,
    ImportError where a package is missing, RuntimeError where Typst cannot set the notebook.
    """
    opened = None if notebook else colab_notebook()
    path, nb = opened or saved_notebook(notebook)
    pdf = Path(pdf) if pdf else path.with_name(path.name.removesuffix(".ipynb") + ".pdf")
    exporter = TypstPDFExporter()
    content, _ = exporter.from_notebook_node(nb, {"metadata": {"path": str(path.parent)}})
    for text in exporter.notices:
        print(text)
    write_atomically(pdf, lambda temporary: temporary.write_bytes(content))
    state = "as it is open" if opened else "as last saved"
    print(f"PDF of {path.name} {state}: {pdf.resolve()}")
    if in_colab():
        try:
            import_module("google.colab.files").download(str(pdf))
        except Exception as error:  # in VS Code there is no browser
            print_notice(f"{pdf.resolve()} could not be downloaded ({error}).")
    return exporter.notices


def in_colab() -> bool:
    """Whether the kernel is Colab's; other places have google.colab installed, too."""
    return type(get_ipython()).__module__.startswith("google.colab")


def colab_notebook() -> tuple[Path, NotebookNode] | None:
    """The notebook open in Colab, with its name; None elsewhere, and where Colab does not say."""
    if not in_colab():
        return None
    with suppress(Exception):  # Colab's MessageError; TypeError from None when time is up
        colab = import_module("google.colab._message")
        nb = colab.blocking_request("get_ipynb", timeout_sec=60)["ipynb"]
        name = nb["metadata"].get("colab", {}).get("name", "assignment3.ipynb")
        return Path(name.replace("/", "-")), nbformat.reads(json.dumps(nb), as_version=4)
    return None


def saved_notebook(path: str | Path | None) -> tuple[Path, NotebookNode]:
    """A notebook's file: `path`, else the one that the kernel knows, else the folder's only one."""
    if path is None:
        here = sorted(Path.cwd().glob("*.ipynb"))
        main = vars(sys.modules["__main__"])
        known = [main.get("__vsc_ipynb_file__"), os.getenv("JPY_SESSION_NAME")]
        found = [Path(name) for name in known if name and Path(name).is_file()]
        if not found and len(here) == 1:
            found = here
        if not found:
            raise FileNotFoundError(
                f"Which of {[file.name for file in here]} is this notebook? Save it, then call "
                "utils.export_pdf(Path('FILE.ipynb')). In Colab, get the file by File > Download "
                "> .ipynb and upload it."
            )
        path = found[0]
    path = Path(path)
    return path, nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)
