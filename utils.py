"""Shared helpers of Assignment 3 (COMP 499/691): the plumbing, none of the answers.

The parts, top to bottom: settings, data sets, training, trainings side by side, evaluation and
figures, generators, PDF export.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import gzip
import hashlib
import html
import http.client
import importlib
import io
import json
import math
import os
import platform
import re
import socket
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import joblib
import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import display
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn

# ---- Settings: what the environment may change ----

CHOICES = {
    "A3_PROFILE": ("full", "tiny"),
    "A3_DATA": ("auto", "real", "embedded"),
    "A3_PRECISION": ("auto", "fp32", "bf16", "fp16"),
}
OFFLINE = Path(__file__).resolve().parent / "offline"  # in a clone; a lone notebook has none


def switch(name: str, default: str = "") -> str:
    """A setting in CHOICES, from the environment, else `default`, else the first choice.

    Raises ValueError that lists the valid values.
    """
    choices = CHOICES[name]
    value = os.environ.get(name, "").strip().lower() or default or choices[0]
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of: {', '.join(choices)}.")
    return value


def data_root() -> Path:
    """Folder of the data sets: A3_DATA_ROOT, else ./data."""
    return Path(os.environ.get("A3_DATA_ROOT") or "data").expanduser()


def runs_folder() -> Path:
    """Folder of all that a run writes, figures/ in it: A3_RUNS, else ./runs."""
    return Path(os.environ.get("A3_RUNS") or "runs").expanduser()


def offline_module(name: str) -> ModuleType:
    """The module offline/NAME.py of a clone. Raises FileNotFoundError where there is none."""
    if not (OFFLINE / f"{name}.py").is_file():
        raise FileNotFoundError(2, "this needs the whole project, with its folder offline/", name)
    return importlib.import_module(f"offline.{name}")


def default_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (Intel AMX, AVX512-BF16); seen on Linux only."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def precision_policy(device: torch.device) -> torch.dtype:
    """Data type of the forward pass on `device`: A3_PRECISION, else what is fast there.

    bf16 on CPUs that have it and on GPUs from Ampere on, fp16 (with a loss scaler) on older
    GPUs, fp32 elsewhere. Raises ValueError for fp16 on a CPU.
    """
    choice = switch("A3_PRECISION")
    if choice == "fp16" and device.type != "cuda":
        raise ValueError("A3_PRECISION=fp16 needs a CUDA GPU; use auto, fp32 or bf16 on a CPU.")
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif choice == "auto":
        choice = "bf16" if device.type == "cpu" and cpu_has_fast_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def machine() -> str:
    """One line on the machine, without its name: cores, kind, accelerator, torch version."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    bf16 = "bf16" if cpu_has_fast_bf16() else "no bf16"
    cores = f"{os.cpu_count()} cores {platform.machine()} ({bf16})"
    return f"{cores}, {where}, torch {torch.__version__}"


def notice(text: str) -> None:
    """Print something the reader must not miss, set off on standard output."""
    print("NOTE  " + text.strip().replace("\n", "\n      "), flush=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then rename: readers never see half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(path: Path, write: Callable[[Path], None]) -> None:
    """`write_atomically` a file of the run; where that cannot be, say so and go on."""
    try:
        write_atomically(path, write)
    except OSError as error:
        notice(f"{path.name} cannot be written ({error}); the run goes on without this file.")


# ---- Data sets: the real one, else a stand-in under a name of its own ----

PATIENCE = 10.0  # seconds of silence after which an address is given up
CUT = (RuntimeError, ConnectionError, http.client.HTTPException)  # RuntimeError: a wrong hash
SIZES = {"MNIST": (60_000, 10_000), "SVHN": (73_257, 26_032)}
FILES = {  # with the start of their sha256
    "train-images-idx3-ubyte.gz": "440fcabf73cc546f",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d",
    "train_32x32.mat": "435e94d69a87fde4",
    "test_32x32.mat": "cdce80dfb2a2c4c6",
}
MNIST_HOSTS = ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist")
SVHN_HOST = "http://ufldl.stanford.edu/housenumbers"
SVHN_COUNTS = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # training, 0 to 9


class DataError(RuntimeError):
    """Data or weights are not available; the message lists what was tried and what to do."""


@dataclass(frozen=True)
class Split:
    """Images (uint8, N x C x H x W, C 1 or 3) and labels (int64, N, 0 to 9), else ValueError."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
            found = f"{x.dtype}, {tuple(x.shape)}"
            raise ValueError(f"images must be uint8, N x C x H x W, C 1 or 3, N > 0; not {found}.")
        if y.dtype != torch.int64 or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 9:
            raise ValueError(f"labels must be int64, 0 to 9, one for each of {len(x)} images: {y}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> Split:
        """The images at `indices`, in that order. ValueError for one outside 0 to N - 1."""
        index = np.asarray(indices)
        if index.dtype.kind not in "iu" or not 0 <= index.min() <= index.max() < len(self):
            raise ValueError(f"indices must be whole numbers from 0 to {len(self) - 1}.")
        return Split(self.images[index], self.labels[index])

    def first(self, count: int) -> Split:
        """The first `count` images, or all when there are fewer. ValueError for a count below 1."""
        return Split(self.images[: max(count, 0)], self.labels[: max(count, 0)])

    def gray(self) -> Split:
        """One channel: ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B, rounded."""
        if self.images.shape[1] == 1:
            return self
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        chunks = self.images.split(4096)  # the whole set is never in memory as floats
        gray = [(c * weights).sum(1, keepdim=True).round().to(torch.uint8) for c in chunks]
        return Split(torch.cat(gray), self.labels)

    def padded(self, size: int = 32) -> Split:
        """Zeros around each (square) image up to size x size. ValueError for a larger image."""
        border = size - self.images.shape[-1]
        if border < 0:
            raise ValueError(f"size must be at least {self.images.shape[-1]}; got {size}.")
        low = border // 2
        return Split(F.pad(self.images, (low, border - low) * 2), self.labels)

    def counts(self) -> list[int]:
        """Number of images of each digit, 0 to 9."""
        return torch.bincount(self.labels, minlength=10).tolist()


@dataclass(frozen=True)
class DigitData:
    """A data set: its true name, a training and a test split, and whether it is the real one."""

    name: str
    train: Split
    test: Split
    real: bool

    def map(self, change: Callable[[Split], Split]) -> DigitData:
        """The same data with `change` applied to both splits."""
        return replace(self, train=change(self.train), test=change(self.test))


def fingerprint(*parts: object) -> str:
    """16 hex digits of all parts: tensors and splits by content, the rest by JSON or repr."""

    def plain(part: object) -> object:
        if isinstance(part, Split):
            part = part.images, part.labels
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return f"{part.dtype}{tuple(part.shape)}{hashlib.sha256(content).hexdigest()}"
        if isinstance(part, dict):
            return {"dict": plain(sorted(part.items()))}
        return [plain(one) for one in part] if isinstance(part, (list, tuple)) else part

    return hashlib.sha256(json.dumps(plain(parts), default=repr).encode()).hexdigest()[:16]


def _words(source: object, error: Exception) -> str:
    said = " ".join(str(error).split())[:300] or f"silent for {PATIENCE:.0f} s"
    return f"{source}: {type(error).__name__}: {said}"


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def first_to_deliver(
    name: str, sources: dict[str, Callable[[str], Any]], todo: str, tried: Sequence[str] = ()
) -> Any:
    """fetch(url) of the first url: fetch in `sources` that works, else DataError.

    Each has PATIENCE of its own; a cut connection is tried again.
    """
    tried, before = list(tried), socket.getdefaulttimeout()
    pool = ThreadPoolExecutor()  # as no time-out ends the wait for a name server
    for url, fetch in sources.items():
        request = urllib.request.Request(url, method="HEAD")
        for _ in range(2):
            try:
                # Any answer is a sign of life; what else is wrong shows in the download.
                answer = pool.submit(urllib.request.urlopen, request, timeout=2 * PATIENCE)
                if type(error := answer.exception(PATIENCE)) is urllib.error.URLError:
                    raise error
                print(f"Downloading {url}", flush=True)
                socket.setdefaulttimeout(PATIENCE)  # the libraries set none
                with contextlib.redirect_stderr(sys.stdout):  # progress bars
                    return fetch(url)
            except Exception as error:
                tried.append(_words(url, error))
                if isinstance(error, DataError) or not isinstance(error, CUT):
                    break
            finally:
                socket.setdefaulttimeout(before)
    lines = "".join(f"\n- {one}" for one in tried)
    raise DataError(f"{name} is not available here. Tried:{lines}\nWhat to do: {todo}.")


def _download(url: str, path: Path, sha256: str) -> Path:
    if not _sha256(path).startswith(sha256):
        get = torch.hub.download_url_to_file
        write_atomically(path, lambda part: get(url, str(part), hash_prefix=sha256))
    return path


def download_weights(urls: Sequence[str], path: str | Path, sha256_prefix: str) -> Path:
    """`path`, where a file of this sha256 is, or comes from the first url that has it.

    Raises DataError that lists every failure.
    """
    path = Path(path)
    if _sha256(path).startswith(sha256_prefix):
        return path
    sources = {url: lambda url: _download(url, path, sha256_prefix) for url in urls}
    todo = f"run again with a network, or save the file as {path} (sha256 {sha256_prefix}...)"
    return first_to_deliver(path.name, sources, todo)


def from_hub(repository: str, file: str, folder: Path, **kind: str) -> dict[str, Callable]:
    """{url: fetch} of a file of the Hugging Face hub, whose client resumes and checks.

    kind: repo_type="dataset" for a data set.
    """
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain http has time-outs
    from huggingface_hub import hf_hub_download, hf_hub_url

    place = {"endpoint": os.environ.get("HF_ENDPOINT") or "https://huggingface.co", **kind}
    fetch = partial(hf_hub_download, repository, file, local_dir=folder, **place)
    return {hf_hub_url(repository, file, **place): lambda url: Path(fetch())}


def load_cached(name: str, make: Callable[[], Split], *key: object) -> Split:
    """make(), or its result in an earlier run with this key. No fault of the cache stops a run."""
    path = runs_folder() / f"{name}-{fingerprint(*key)}.npz"
    with contextlib.suppress(Exception), np.load(path) as stored:  # checks the CRC; no pickles
        return Split(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))
    split = make()

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, images=split.images, labels=split.labels)

    keep(path, write)
    return split


def _mnist(part: str) -> Split:
    tensors, prefix = [], {"train": "train", "test": "t10k"}[part]
    for name in (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"):
        path = data_root() / "MNIST" / "raw" / name
        download_weights([f"{host}/{name}" for host in MNIST_HOSTS], path, FILES[name])
        data = bytearray(gzip.decompress(path.read_bytes()))  # idx format: data[3] is the rank
        tensors.append(torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * data[3]))
    return Split(tensors[0].view(-1, 1, 28, 28), tensors[1].long())


def _from_mat(file: Path) -> Split:
    from scipy.io import loadmat

    if not _sha256(file).startswith(FILES[file.name]):
        raise DataError("this is not the official file; its checksum differs")
    stored = loadmat(file)
    images = np.ascontiguousarray(stored["X"].transpose(3, 2, 0, 1))
    labels = stored["y"].ravel().astype(np.int64) % 10  # the file's 10 is the digit 0
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _from_parquet(files: Sequence[Path]) -> Split:
    from PIL import Image
    from pyarrow.parquet import ParquetFile

    pixels, labels, column = bytearray(), [], "image"
    for file in files:
        try:
            for batch in ParquetFile(file, pre_buffer=False).iter_batches(1000):
                column = "image"
                for one in batch[column].to_pylist():
                    image = np.asarray(Image.open(io.BytesIO(one["bytes"])))
                    if image.shape != (32, 32, 3):
                        raise ValueError(f"images must be 32 x 32 x 3, not {image.shape}")
                    pixels += image.transpose(2, 0, 1).tobytes()
                column = "label"
                labels += batch[column].to_pylist()
                if not set(labels) <= set(range(10)):
                    raise ValueError("labels must be 0 to 9")
        except Exception as error:
            raise DataError(_words(f"{file}, column {column!r}", error)) from error
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return Split(torch.from_numpy(images), torch.tensor(labels))


def _read_svhn(part: str, files: Sequence[Path]) -> Split:
    """A part of SVHN from its official .mat file, or from parquet files as the mirror has them."""
    if not files:
        raise FileNotFoundError("no such file")
    official = files[0].suffix == ".mat"
    decode = partial(_from_mat, files[0]) if official else partial(_from_parquet, files)
    split = load_cached(f"svhn-{part}", decode, *map(_sha256, files))
    counts, whole = split.counts(), SIZES["SVHN"][part == "test"]
    wrong = 0 in counts or len(split) == whole and counts != SVHN_COUNTS
    if len(split) > whole or part == "train" and wrong:
        raise DataError(f"the counts of the digits 0 to 9 are not those of SVHN: {counts}")
    return split


def _svhn(part: str) -> Split:
    """Files in A3_DATA_ROOT, official or the mirror's; the official address; the mirror."""
    root, mat, tried = data_root(), f"{part}_32x32.mat", []
    for pattern in (mat, f"svhn/{part}-*.parquet", f"svhn/cropped_digits/{part}-*.parquet"):
        try:
            return _read_svhn(part, sorted(root.glob(pattern)))
        except Exception as error:
            tried.append(_words(root / pattern, error))
    sources = {f"{SVHN_HOST}/{mat}": lambda url: _download(url, root / mat, FILES[mat])}
    parquet = f"cropped_digits/{part}-00000-of-00001.parquet"
    sources |= from_hub("ufldl-stanford/svhn", parquet, root / "svhn", repo_type="dataset")
    todo = f"run again with a network, or put train_32x32.mat and test_32x32.mat into {root}"
    return _read_svhn(part, [first_to_deliver(f"SVHN ({part})", sources, todo, tried)])


def _load(name: str, read: Callable[[str], Split], stand_in: str) -> DigitData:
    """The data set as A3_DATA asks for it; the tiny profile takes slices of 512 and 256."""
    tiny = switch("A3_PROFILE") == "tiny"
    wanted = switch("A3_DATA", "embedded" if tiny else "")
    try:
        if wanted == "embedded":
            raise DataError("A3_DATA=embedded asks for a stand-in.")
        data = DigitData(name, read("train"), read("test"), real=True)
    except DataError as problem:
        if wanted == "real":
            raise
        try:
            data = offline_module(stand_in).stand_in()
        except FileNotFoundError as error:
            raise DataError(f"{problem}\nThere is no stand-in: {error}") from error
        if wanted == "auto":
            notice(f"{data.name} in place of {name}.\n{problem}")
    if tiny:
        data = replace(data, train=data.train.first(512), test=data.test.first(256))
    sizes = [len(data.train), len(data.test)]
    if data.real and sizes != [*SIZES[name]]:
        pairs = zip(sizes, SIZES[name], strict=True)
        train, test = (f"{n:,}" + f" of {whole:,}" * (n < whole) for n, whole in pairs)
        data = replace(data, name=f"{name} ({train} training, {test} test images)")
    return data


def load_handwritten() -> DigitData:
    """MNIST, 1 x 28 x 28, or its stand-in, as A3_DATA says. Raises DataError."""
    return _load("MNIST", _mnist, "small_digits")


def load_street() -> DigitData:
    """SVHN, 3 x 32 x 32, or its stand-in, as A3_DATA says. Raises DataError."""
    return _load("SVHN", _svhn, "street_numbers")


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1: mean 0.5 and standard deviation 0.5, as the starter has it.

    Raises ValueError for anything but uint8: other numbers may lie in another range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8; got {images.dtype}.")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


# ---- Training: what stands around the notebook's optimization loop ----


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A random stream of its own for each (seed, epoch): a resumed run sees the same batches."""
    mixed = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


def seed_everything(seed: int) -> None:
    """Seed torch and NumPy, and ask cuDNN for repeatable kernels."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    torch.backends.cudnn.deterministic = True


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite. The last good epoch's checkpoint is kept."""


# One dict an epoch: 'epoch', 'seconds', training means, evaluations. The last is the one to report.
History = list[dict[str, float]]


@dataclass
class Training:
    """What the notebook's loop works with; `scaler` does nothing except in fp16."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    def checkpoint(self, history: History) -> bytes:
        """The file of this state and history."""
        states = {name: getattr(self, name).state_dict() for name in self.__dataclass_fields__}
        file = io.BytesIO()
        torch.save({"training": states, "history": history}, file)
        return file.getvalue()

    def restore(self, content: bytes) -> History:
        """Put the state of a checkpoint back; its history. Raises for another training's."""
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        for name in self.__dataclass_fields__:
            getattr(self, name).load_state_dict(state["training"][name])
        return list(state["history"])


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision where `precision_policy` wants it, else nothing."""
    dtype = precision_policy(device)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype) if enabled else contextlib.nullcontext()


def fit(
    train_epoch: Callable[[Training, Iterable, Callable], dict[str, float]],
    model: nn.Module,
    batches: Callable[[int], Iterable],
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]],
    *,
    epochs: int,
    steps_per_epoch: int,
    run: str,
    settings: object,
    lr: float = 1e-3,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    seed: int = 0,
) -> History:
    """Train `model` by the notebook's loop `train_epoch`, with AdamW; resume where it stopped.

    batches(epoch) yields `steps_per_epoch` batches, always the same ones; evaluate(model) gives
    figures after each epoch. schedule: 'constant', or 'onecycle' (Smith and Topin 2018) with `lr`
    as its peak. weight_decay: decoupled (AdamW); 0 is plain Adam.

    Checkpoints in `runs_folder` are named after `run` and a fingerprint of the arguments, the
    model's text and its first weights. `settings` must name all else that decides the numbers: the
    recipe, the fingerprint of the data. Raises TrainingDiverged when the loss is not finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}.")
    arguments = [epochs, steps_per_epoch, lr, schedule, weight_decay, seed, settings]
    key = fingerprint(arguments, repr(model), model.state_dict())
    path = runs_folder() / f"{run}-{key}.pt"
    training = _start(model, epochs * steps_per_epoch, lr, schedule, weight_decay)
    history = _resume(path, training, run)
    saved, waiting = time.monotonic(), b""

    def save() -> None:
        keep(path, lambda part: part.write_bytes(waiting))

    try:
        for epoch in range(len(history), epochs):
            started = time.perf_counter()
            # Dropout draws from the global stream; seeding it here makes resuming exact.
            seed_everything(epoch_generator(seed, epoch).initial_seed() % 2**63)
            means = train_epoch(training, batches(epoch), loss_fn)
            if not math.isfinite(means["loss"]):
                raise TrainingDiverged(
                    f"{run}: the loss became {means['loss']} in epoch {epoch + 1}. Use a smaller "
                    f"learning rate than {lr:g}, or A3_PRECISION=fp32. {len(history)} "
                    "finished epochs are kept."
                )
            row = {f"train_{name}": value for name, value in means.items()}
            row |= evaluate(model) if evaluate else {}
            seconds = time.perf_counter() - started
            history.append({"epoch": epoch + 1, "seconds": seconds, **row})
            shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
            _tell(f"{run}: epoch {epoch + 1}/{epochs}, {shown}")
            waiting = training.checkpoint(history)
            # Short epochs share a file: on a mounted Drive every replaced one is kept as trash.
            if time.monotonic() - saved > 10:
                save()
                saved, waiting = time.monotonic(), b""
    finally:
        if waiting:  # the end, an error or an interrupt: no finished epoch is lost
            save()
    model.eval()
    return history


def _start(model: nn.Module, steps: int, lr: float, schedule: str, weight_decay: float) -> Training:
    trained = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    # channels_last keeps a pixel's channels together: faster convolutions, same numbers.
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        trained, lr=lr, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda")
    )
    make_schedule = {
        "constant": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        "onecycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=lr, total_steps=steps),
    }[schedule]
    scaler = torch.amp.GradScaler("cuda", enabled=precision_policy(device) == torch.float16)
    return Training(model, optimizer, make_schedule(optimizer), scaler)


def _resume(path: Path, training: Training, run: str) -> History:
    """Load the checkpoint; without a usable one the training starts afresh."""
    if not path.exists():
        return []
    first = training.checkpoint([])  # loading may fail half way
    try:
        history = training.restore(path.read_bytes())
    except Exception as error:
        notice(f"Checkpoint {path.name} cannot be used ({type(error).__name__}); the training "
               "starts again and writes over it.")  # fmt: skip
        return training.restore(first)
    _tell(f"{run}: resumed after epoch {len(history)}")
    return history


# ---- Independent trainings side by side, and their progress ----


def progress_file() -> Path:
    """The file that receives a line an epoch, from all processes: A3_PROGRESS, else a new one."""
    if not os.environ.get("A3_PROGRESS"):
        handle, name = tempfile.mkstemp(prefix="a3-progress-", suffix=".log")
        os.close(handle)
        os.environ["A3_PROGRESS"] = name
    return Path(os.environ["A3_PROGRESS"])


def _tell(line: str) -> None:
    with contextlib.suppress(OSError), progress_file().open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def anything_resumed() -> bool:
    """Whether any training of this run came from a checkpoint."""
    return ": resumed after epoch " in progress_file().read_text(encoding="utf-8")


def jobs_at_once() -> int:
    """How many trainings run side by side: one on a GPU, else one a core that memory allows."""
    if default_device().type == "cuda":
        return 1
    return max(1, min(joblib.cpu_count(), int(psutil.virtual_memory().available / 1.5e9)))


# glibc gives freed memory back at once, and page faults then cost a quarter of a training's time
# (measured: 12.2 against 8.9 s of processor time). Read by the workers when they start.
WORKER_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def side_by_side(tasks: dict[str, Callable[[], Any]], jobs: int | None = None) -> dict[str, Any]:
    """Run independent trainings, `jobs` at a time (None: `jobs_at_once`), one thread each.

    Each task is a function without arguments; functions defined in a notebook may be used
    (joblib's loky sends them). Results come in the order of `tasks`, and are the same whatever
    the number of jobs. Raises RuntimeError that names the task that failed.
    """
    jobs = min(jobs or jobs_at_once(), len(tasks))
    with _progress_shown(len(tasks)), warnings.catch_warnings():
        if jobs <= 1:
            return {name: _run_task(name, task) for name, task in tasks.items()}
        # loky replaces a worker whose memory has grown; that costs nothing and is no fault.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
        os.environ |= {k: v for k, v in WORKER_SETTINGS.items() if k not in os.environ}
        # Futures wait without polling; joblib.Parallel takes a tenth of a core to look for results.
        executor = get_reusable_executor(max_workers=jobs)
        futures = {name: executor.submit(_run_task, name, task) for name, task in tasks.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            executor.shutdown(wait=False, kill_workers=True)
            raise


def _run_task(name: str, task: Callable[[], Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order, on any number of cores
    try:
        return task()
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
        _tell(f"{name}: done")


@contextlib.contextmanager
def _progress_shown(count: int) -> Iterator[None]:
    """One output of the notebook, rewritten while trainings run: the last line of each."""
    if not hasattr(get_ipython(), "kernel"):
        yield
        return
    stop, start = threading.Event(), progress_file().stat().st_size
    handle = display({"text/plain": "training ..."}, raw=True, display_id=True)

    def follow() -> None:
        while not stop.wait(1.0):
            lines = progress_file().read_bytes()[start:].decode("utf-8", "replace").splitlines()
            last = {line.split(":")[0]: line for line in lines if not line.endswith(": done")}
            done = sum(line.endswith(": done") for line in lines)
            text = "\n".join([f"{done} of {count} done", *list(last.values())[-4:]])
            handle.update({"text/plain": text}, raw=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        handle.update({"text/plain": ""}, raw=True)


# ---- Evaluation, figures, tables and text ----


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], split: Split, batch_size: int = 512) -> Tensor:
    """Outputs of `model` for every image of `split`, in order, float32 on the CPU.

    A module is in eval mode for the time of the call, and then as it was.
    """
    module = model if isinstance(model, nn.Module) else nn.Module()
    training = module.training
    device = next((p.device for p in module.parameters()), default_device())
    module.eval()
    outputs = []
    with autocast(device):
        for chunk in split.images.split(batch_size):
            images = to_float(chunk.to(device)).contiguous(memory_format=torch.channels_last)
            outputs.append(model(images).float())
    module.train(training)
    return torch.cat(outputs).cpu()


_figures = 0


def start_figures() -> None:
    """The look of every figure of the notebook; their numbers begin at 1."""
    global _figures
    _figures = 0
    plt.rcParams.update(
        {"figure.dpi": 100, "font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5,
         "image.cmap": "gray", "svg.hashsalt": "assignment3"}
    )  # fmt: skip


def save_figure(figure: plt.Figure, name: str, caption: str, photo: bool = False) -> None:
    """Number, save (in the runs folder's figures/) and show a figure, then close it.

    Plots are SVG; `photo` makes a PNG of 220 dpi, for images. The caption is its alternative text.
    """
    global _figures
    _figures += 1
    text, kind = f"Figure {_figures}. {caption}", "png" if photo else "svg"
    file, info = io.BytesIO(), {"Software": None} if photo else {"Date": None}
    figure.savefig(file, format=kind, dpi=220, bbox_inches="tight", metadata=info)
    data, about = file.getvalue(), {"caption": text}
    keep(runs_folder() / "figures" / f"{name}.{kind}", lambda part: part.write_bytes(data))
    if photo:
        about["image/png"] = {"width": round(96 * figure.get_figwidth())}
        bundle = {"image/png": base64.b64encode(data).decode()}
    else:
        bundle = {"image/svg+xml": data.decode()}
    _show(bundle | {"text/plain": text}, about)
    _show({"text/markdown": f"*{text}*", "text/plain": text}, {"is_caption": True})
    plt.close(figure)


def _show(bundle: dict[str, str], metadata: dict | None = None) -> None:
    display(bundle, raw=True, metadata=metadata or {})


def say(text: str) -> None:
    """Show computed text as Markdown: a paragraph of the notebook, and of the PDF."""
    _show({"text/markdown": text, "text/plain": text})


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show a table as Markdown; a column is set to the right when all its cells hold digits."""
    columns = [[str(row[n]) for row in rows] for n in range(len(header))]
    numeric = [all(re.search(r"\d|^$", cell) and len(cell) < 25 for cell in c) for c in columns]
    lines = [header, [":---", *("---:" if n else ":---" for n in numeric[1:])], *rows]
    say("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def write_results(results: dict) -> None:
    """Write results.json beside the figures. Raises ValueError when a number is not finite."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    path = runs_folder() / "figures" / "results.json"
    keep(path, lambda part: part.write_text(text, encoding="utf-8"))


# ---- Generators of Question 3 ----


@dataclass(frozen=True)
class Generator:
    """model(z: N x z_dim, c: N x classes, truncation): N x 3 x size x size in -1..1; eval mode."""

    model: nn.Module
    name: str
    title: str  # for captions: which model, whose weights
    classes: list[str]
    z_dim: int
    size: int


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a state dict key for key (fp16 becomes the model's type); the model, in eval mode.

    Raises FileNotFoundError, or RuntimeError that names the file when it is damaged or another's.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise RuntimeError(f"{path} is not a file of these weights: {error}") from error
    return model.eval()


# ---- PDF: nbconvert reads Markdown, pandoc turns its HTML into typst, typst sets it ----

_WHO = {"NAME": "Name", "STUDENT_NUMBER": "Student number", "DISCUSSED_WITH": "Discussed with"}
_FONTS = '#set text(10pt, font: ("Libertinus Serif", "New Computer Modern", "DejaVu Sans Mono"))\n'
_STYLE = r"""#set page("a4", margin: (x: 2cm, y: 1.6cm), footer: context text(8.5pt, luma(90))[
  #document.title #h(1fr) #counter(page).display("1 / 1", both: true)])
#set par(justify: true, leading: 0.56em, spacing: 0.85em)
#set table(stroke: (x: none, y: 0.3pt + luma(170)), inset: (x: 6pt, y: 2.8pt))
#show table: it => { set text(9pt); set par(justify: false); set align(right); it }
#show table.cell.where(x: 0): set align(left)
#show table.cell.where(y: 0): strong
#show figure.where(kind: table): set block(breakable: true)
#show figure.caption: it => text(9pt, it.body)
#show quote.where(block: true): it => block(width: 100%, fill: luma(242), inset: 7pt,
  spacing: 1em, it.body)
#show raw.where(block: true): set text(7.2pt)
#show raw.where(block: true): set par(justify: false, leading: 0.42em)
#show raw.where(block: true): it => context block(width: 100%, inset: 5pt, it,
  breakable: it.lines.len() > 24 or page.columns > 1,
  fill: if it.lang != "output" { luma(245) }, stroke: (left: 1pt + luma(205)))
#let horizontalrule = line(length: 100%, stroke: 0.4pt + luma(170))
#let link(to, ..body) = context if type(to) == label and query(to).len() != 1 or to == "" {
  body.at(0) } else { text(rgb("#1a4f8b"), std.link(to, ..body)) }
"""
_APPENDIX = r"""#pagebreak()
#set page(flipped: true, columns: 2, margin: 1.5cm)
#show heading: set text(0.75em)
#show raw.where(block: true): set text(5.9pt)"""
_PROBE = r"""#context { let size(c) = measure(text(top-edge: "bounds", bottom-edge: "bounds", c))
[#metadata(SIGNS.codepoints().filter(c => size(c) == size("\u{378}")))<lacking>] }"""
# What pandoc does not know, and the definition of a macro, with braces to depth three.
_MACROS = r"""\newcommand{\cfrac}[2]{\dfrac{#1}{#2}}\newcommand{\bmod}{\mathbin{\text{mod}}}
\newcommand{\textcolor}[2]{#2}\newcommand{\middle}{}
\newcommand{\rm}[1]{\mathrm{#1}}\newcommand{\bf}[1]{\mathbf{#1}}\newcommand{\cal}[1]{\mathcal{#1}}"""
_MACRO = (
    r"\\(?:(?:new|renew)command|def|DeclareMathOperator)\*?\s*\{?\\\w+\}?[^{}]*"
    r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
)
_quoted = partial(json.dumps, ensure_ascii=False)  # a string as typst writes it


def export_pdf(notebook: Path | None = None, pdf: Path | None = None) -> list[str]:
    """Write the executed notebook as a PDF; print and return what could not be set as written.

    Without `notebook`: in Colab the open one; elsewhere the saved file that VS Code or Jupyter
    names to its kernel, else the only .ipynb file of the folder. `pdf` lies beside it by default.
    Raises ImportError (what to install), FileNotFoundError (which notebook?), RuntimeError (Colab
    gave none), OSError (the PDF cannot be written there).
    """
    path, nb = _read_notebook(notebook)
    pdf = Path(pdf or path).with_suffix(".pdf")
    content, notices = notebook_to_pdf(nb, path.parent)
    try:
        write_atomically(pdf, lambda file: file.write_bytes(content))
    except OSError as error:
        elsewhere = "write elsewhere: utils.export_pdf(pdf=Path('/tmp/answers.pdf'))"
        raise OSError(f"{pdf.resolve()} cannot be written ({error}); {elsewhere}") from error
    print(*notices, f"PDF of {path.name}: {pdf.resolve()}", sep="\n")
    if "google.colab" in sys.modules:
        importlib.import_module("google.colab.files").download(str(pdf))
    return notices


def _read_notebook(notebook: Path | None) -> tuple[Path, dict]:
    if notebook is None and "google.colab" in sys.modules:
        try:
            colab = importlib.import_module("google.colab._message")
            nb = colab.blocking_request("get_ipynb", timeout_sec=60)["ipynb"]
        except Exception as error:  # None when time is up, MessageError on a refusal
            way_out = "File > Download > .ipynb, upload it, utils.export_pdf(Path('FILE.ipynb'))"
            raise RuntimeError(f"Colab is silent: run this cell again, or {way_out}") from error
        return Path(nb.get("metadata", {}).get("colab", {}).get("name") or "assignment3.ipynb"), nb
    code = vars(sys.modules["__main__"]).get("__vsc_ipynb_file__")
    named = [notebook] if notebook else [code, os.getenv("JPY_SESSION_NAME")]
    here = sorted(Path.cwd().glob("*.ipynb"))
    found = [Path(name) for name in named if name and Path(name).is_file()][:1]
    found = found or ([] if notebook else here)
    if len(found) != 1:
        raise FileNotFoundError(
            f"Looked for {notebook or 'the notebook that VS Code or Jupyter names to its kernel'}; "
            f"in {Path.cwd()}: {', '.join(path.name for path in here) or 'no .ipynb file'}. Save "
            "the notebook and name it: utils.export_pdf(Path('FILE.ipynb'))"
        )
    print(f"Reading {found[0]} as last saved.")
    nbformat = importlib.import_module("nbformat")
    nb = nbformat.from_dict(json.loads(found[0].read_text(encoding="utf-8-sig")))
    return found[0], nbformat.convert(nb, 4)


def notebook_to_pdf(nb: dict, folder: Path) -> tuple[bytes, list[str]]:
    """The PDF of a notebook of format 4, and notices: 'cell N: what, why'. Same input, same bytes.

    Images that the notebook names are looked for in `folder`.
    """
    try:
        with tempfile.TemporaryDirectory() as workshop:
            page = _Pdf(Path(folder), Path(workshop))
            return page.make(nb), [f"cell {cell}: {text}" for cell, text in sorted(page.notices)]
    except (ImportError, OSError) as error:  # OSError: no pandoc
        need = "pip install nbconvert pypandoc-binary typst"
        raise ImportError(f"The PDF needs more packages ({error}): {need}") from error


def _text(value: Any) -> str:
    """A field of a notebook (string, list or None) without control characters and colors."""
    text = "".join(value) if isinstance(value, list) else str(value or "")
    codes = "\x1b\\[[0-?]*[ -/]*[@-~]|[\0-\b\v\f\x0e-\x1f\x7f\ufe0f\ud800-\udfff\ue000-\uf8ff]"
    return re.sub(codes, "", text.replace("\r\n", "\n"))


def _listing(text: str, kind: str = "output") -> str:
    """HTML of code or output: lines wrap under their indent, long outputs lose their middle."""
    lines: list[str] = []
    for line in text.expandtabs(4).split("\n"):
        line = line.rstrip("\r").rpartition("\r")[2].rstrip()  # what a terminal shows in the end
        wrap = {
            "subsequent_indent": re.match(" {0,40}", line)[0] + "    ",
            "drop_whitespace": False,
        }
        if not re.search(r"\d%\|", line) and (line or lines[-1:] != [""]):  # no progress bars
            lines += textwrap.wrap(line, 102, break_on_hyphens=False, **wrap) or [""]
    if kind == "output" and len(lines) > 40:
        lines[26:-13] = [f"[… {len(lines) - 39} lines are left out here, not in the notebook …]"]
    text = html.escape("\n".join(lines).strip("\n"))
    return f'<pre class="{html.escape(kind)}"><code>{text}</code></pre>' if text.strip() else ""


class _Pdf:
    """One export. Formulas, images, cells wait in `snippets` as typst; marks keep their places."""

    def __init__(self, folder: Path, workshop: Path):
        import bs4
        import pypandoc
        import typst
        from nbconvert.filters import markdown_mistune as mistune

        self.folder, self.workshop, self.typst, self.title = folder, workshop, typst, ""
        self.cell, self.snippets, self.notices, self.names, self.bundled = 0, [], [], {}, True
        self.sections: dict[str, str] = {}  # number -> anchor
        self.parse = lambda source: bs4.BeautifulSoup(source, "html.parser")
        options = ["--wrap=none", "--quiet", "--sandbox"]
        self.pandoc = lambda text, kind: pypandoc.convert_text(text, "typst", kind, options)
        read, tag = mistune.IPythonRenderer(escape=False, anchor_link_text=""), bs4.Tag
        read.inline_math = lambda tex: self.mark("formula", tex.strip())
        read.block_math = lambda tex: self.mark("formula", f" {tex.strip()} ")  # display style
        read.latex_environment = lambda name, tex: self.mark(
            "formula", rf" \begin{{{name}}}{tex}\end{{{name}}} "
        )
        read.block_code = lambda code, info=None: _listing(code, (info or "text").split()[0])
        read.image = lambda alt, url, _=None: str(tag(name="img", attrs={"src": url, "alt": alt}))
        self.markdown = lambda source: mistune.MarkdownWithMath(read).render(source)

    def note(self, text: str) -> None:
        self.notices.append((self.cell, text))

    def mark(self, what: str, source: str, typst: str = "") -> str:
        self.snippets.append([self.cell, what, source, typst])
        return f"\ue000{len(self.snippets) - 1}\ue001"

    def give_up(self, snippet: list, why: str = "cannot be set") -> None:
        self.cell, what, source, _ = snippet
        source = re.sub("\ue000\\d+\ue001", "[…]", source.strip())
        snippet[3] = f"#raw({_quoted(source)});"
        self.note(f"{what} {source[:70]} {why}: shown as its source")

    def compile(self, source: str) -> bytes:
        while "\ue000" in source:
            source = re.sub("\ue000(\\d+)\ue001", lambda m: self.snippets[int(m[1])][3], source)
        source = (
            f"#set document(title: {_quoted(self.title)}, date: none)\n{_FONTS}{_STYLE}{source}"
        )
        source = source.translate(self.names).encode()
        return self.typst.compile(source, root=self.workshop, ignore_system_fonts=self.bundled)

    def make(self, nb: dict) -> bytes:
        """Cells to HTML, in the order of the pages; all HTML to typst; typst to PDF."""
        pages, who, named = [], dict.fromkeys(_WHO, ""), 1  # a page: order, cell, HTML
        for self.cell, cell in enumerate(nb.get("cells") or [], 1):
            tags = set((cell.get("metadata") or {}).get("tags") or [])
            source, kind = _text(cell.get("source")), cell.get("cell_type")
            if tags & {"hide-pdf", "helper-module", "install", "export"}:
                continue
            if "submission" in tags or all(re.search(f"(?m)^{key} *=", source) for key in _WHO):
                named = self.cell
                with contextlib.suppress(SyntaxError, ValueError, AttributeError):
                    for node in ast.parse(source).body:
                        value = ast.literal_eval(node.value)
                        value = ", ".join(value) if isinstance(value, list | tuple) else value
                        who[node.targets[0].id] = _text(value).strip()
                continue
            page = self.markdown(source) if kind == "markdown" else _listing(source, "text")
            if kind == "code":
                code = re.sub(r"(?m)^ *# ?@title.*\n?|  # fmt: \w+ *$", "", source)
                code, name = _listing(code, "python"), re.search(r"# ?@title +([^{\n]*)", source)
                if "appendix" in tags:
                    name = html.escape(name[1] if name else f"Cell {self.cell}")
                    pages.append((6, self.cell, f"<h4>{name}</h4>{code}"))
                page = "" if tags & {"appendix", "hide-code", "front-page"} else code
                page += self.outputs(cell.get("outputs") or [])
            page = self.tidy(page, cell.get("attachments") or {}, "front-page" in tags)
            pages.append((2 if "front-page" in tags else 4, self.cell, page))
        self.cell, title = named, self.title or "Assignment 3"
        self.title = f"{title}, {who['NAME']}".strip(", ")
        missing = ", ".join(label for key, label in _WHO.items() if not who[key])
        block = (
            f"<p>COMP 499/691, Special Topics: Deep Learning</p><h1>{html.escape(title)}</h1><p>"
        )
        for key, label in _WHO.items():
            block += f"{label}: <b>{html.escape(who[key]) or 'not given'}</b> &emsp; "
        if missing:
            self.note(f"the name cell lacks {missing}: fill it in and export again")
            block += f"</p><blockquote>Reminder: the name cell lacks {missing}.</blockquote><p>"
        appendix = f"<p>{self.mark('', '', _APPENDIX)}</p><h2>Appendix: code</h2>"
        for order, page in (0, block), (1, "<h2>Answers at a glance</h2>"), (5, appendix):
            if order == 0 or order + 1 in {page[0] for page in pages if page[2]}:
                pages.append((order, named, page))
        pages.sort(key=lambda page: page[0])
        self.set_formulas([snippet for snippet in self.snippets if snippet[1] == "formula"])
        whole = "<p>\ue002</p>".join(page for _, _, page in pages)
        chunks = self.pandoc(whole, "html-auto_identifiers").split("\ue002")
        marks = []
        for (_, self.cell, page), chunk in zip(pages, chunks, strict=True):
            marks.append(self.mark("cell", self.parse(page).get_text(), chunk))
        self.find_fonts()
        with contextlib.suppress(RuntimeError):
            return self.compile("\n\n".join(marks))
        for snippet in self.snippets:  # typst tells only of the first element that it cannot set
            try:
                self.compile(snippet[3])
            except RuntimeError:
                self.give_up(snippet)
        return self.compile("\n\n".join(marks))

    def outputs(self, outputs: list) -> str:
        """HTML of outputs, each in its best printable form; neighboring streams are joined."""
        page = stream = ""
        for out in [*outputs, {}]:
            about, data = out.get("metadata") or {}, out.get("data") or {}
            if out.get("output_type") == "stream":
                stream += _text(out.get("text"))
                continue
            page, stream = page + _listing(stream), ""
            if out.get("output_type") == "error":
                trace = "\n".join(map(_text, out.get("traceback") or []))
                page += _listing(trace or f"{out.get('ename')}: {out.get('evalue')}")
            elif data and not about.get("is_caption"):
                caption = html.escape(_text(about.get("caption")))
                page += self.display({kind: _text(body) for kind, body in data.items()}, caption)
        return page

    def display(self, data: dict[str, str], caption: str) -> str:
        for kind in ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp"):
            if code := data.get(kind):
                code = base64.b64encode(code.encode()).decode() if "svg" in kind else code
                image = f'<img alt="{caption or "Figure"}" src="data:{kind};base64,{code}">'
                return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        if markdown := data.get("text/markdown") or data.get("text/latex"):
            return self.markdown(markdown)
        page, plain = self.parse(data.get("text/html", "")), data.get("text/plain", "")
        for tag in page(["script", "style"]):
            tag.decompose()
        if page.table or plain[:1] in "<" and (page.get_text().strip() or page(["img", "iframe"])):
            return str(page)
        if plain and not re.search("plotly|widget", " ".join(data)):
            return _listing(plain)
        if re.search(r"\d%\|", plain) or [*data] == ["text/plain"]:  # a progress bar
            return ""
        self.note(f"an interactive output is not shown ({', '.join(data)})")
        return f"<p><i>[Interactive output, not shown here: {', '.join(data)}]</i></p>"

    def tidy(self, page: str, attached: dict, front: bool) -> str:
        """The HTML of a cell, balanced, with what pandoc cannot take replaced."""
        soup = self.parse(page)
        for tag in soup(["iframe", "video", "audio", "canvas", "object", "embed", "svg"]):
            self.note(f"{tag.name} {tag.get('src', '')} is not shown")
            tag.replace_with(f"[{tag.name} {tag.get('src', '')} is not shown here]")
        for tag in soup("input"):
            tag.replace_with("☑ " if tag.has_attr("checked") else "☐ ")
        for tag in soup("img"):
            url, alt = unquote(tag.get("src", "")), _text(tag.get("alt"))
            tag.replace_with(self.mark("image", f"[image: {alt or url[:60]}]"))
            try:
                if url.startswith("attachment:"):
                    url = "data:," + _text(next(iter(attached[url[11:]].values())))
                code = url.partition(",")[2] if url.startswith("data:") else None
                data = base64.b64decode(code) if code else (self.folder / url).read_bytes()
                name = hashlib.sha256(data).hexdigest()[:20]
                (self.workshop / name).write_bytes(data)
                self.snippets[-1][3] = f"#image({_quoted(name)}, alt: {_quoted(alt)});"
            except (OSError, LookupError, ValueError) as error:
                self.give_up(self.snippets[-1], f"was not found ({type(error).__name__})")
        section = re.compile(r"\s*(?:Question )?((\d)(?: \(\w\))?)")  # "1 (b)", "Question 2"
        for tag in soup(["h1", "h2", "h3", "h4"]):
            if found := section.match(tag.get_text()):
                self.sections.setdefault(found[1], tag.get("id"))
            if tag.name == "h1" and not self.title:
                self.title = tag.extract().get_text().strip()
        for row in soup("tr") if front else []:  # the answers at a glance lead to their sections
            found = section.match(row.get_text())
            name = found and (self.sections.get(found[1]) or self.sections.get(found[2]))
            if name and row.td and row.td.string:
                row.td.string.wrap(soup.new_tag("a", href=f"#{name}"))
        return str(soup)

    def set_formulas(self, formulas: list[list]) -> None:
        """Let pandoc turn the formulas into typst, with the macros of all cells."""
        texts = [snippet[2] for snippet in self.snippets if snippet[1] == "formula"]
        source = "\n".join([_MACROS, *re.findall(_MACRO, "".join(texts))])
        for _, _, tex, _ in formulas:
            tex = re.sub(_MACRO + r"|\\label\{[^}]*\}|\\no(number|tag)\b|\n(?=\s*\n)", "", tex)
            tex = re.sub(r"\\tag\*?\{([^}]*)\}", r"\\qquad\\text{(\1)}", tex)
            source += f"\n\n\ue002\n\n$$ {tex.strip() or '~'} $$"
        done: list[str] = []
        with contextlib.suppress(RuntimeError):
            done = self.pandoc(source, "markdown+latex_macros").split("\ue002")[1:]
        if len(done) != len(formulas) > 1:  # one of them spoils the others
            half = len(formulas) // 2
            return self.set_formulas(formulas[:half]) or self.set_formulas(formulas[half:])
        for snippet, typst in zip(formulas, done or [""] * len(formulas), strict=True):
            for old, new in (r"\b(dot|minus|times)\.circle", r"\1.o"), (r"\bsect\b", "inter"):
                typst = re.sub(old, new, typst.strip())  # pandoc's names, and typst's
            bar, space = "|‖"["{Vmatrix}" in snippet[2]], " " * snippet[2].startswith(" ")
            snippet[3] = f"${space}{typst[1:-1].strip()}{space}$".replace('"||"', f'"{bar}"')
            if not re.fullmatch(r"\$ .* \$", typst, re.DOTALL):
                self.give_up(snippet)

    def find_fonts(self) -> None:
        """Let in the system's fonts where characters need them; tell of those that none has."""
        lacking = {sign for snippet in self.snippets for sign in snippet[3] if sign > "\u024f"}
        for self.bundled in (True, False):
            probe = _FONTS + _PROBE.replace("SIGNS", _quoted("".join(sorted(lacking))))
            fonts = {"ignore_system_fonts": self.bundled}
            found = self.typst.query(probe.encode(), "<lacking>", "value", True, **fonts)
            if not (lacking := set(json.loads(found)) - {"\ue000", "\ue001"}):
                return
        emoji = {sign for sign in lacking if unicodedata.category(sign)[0] == "S"}
        self.names = {ord(e): f":{unicodedata.name(e, 'sign').lower()}:" for e in emoji}
        for snippet in self.snippets:
            if bad := set(snippet[3]) & lacking - emoji:
                self.cell = snippet[0]
                self.note(f"no font here has {' '.join(sorted(bad))}: install one that has")
