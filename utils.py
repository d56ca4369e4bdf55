"""Shared helpers of Assignment 3 (COMP 499/691): the plumbing, none of the answers.

Settings, data sets, training, trainings side by side, figures, PDF export.
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
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote

import joblib
import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
from IPython import get_ipython
from IPython.display import display
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn

# ---- Settings ----

CHOICES = {
    "A3_PROFILE": ("full", "tiny"),
    "A3_DATA": ("auto", "real", "embedded"),
    "A3_PRECISION": ("auto", "fp32", "bf16", "fp16"),
}
OFFLINE = Path(__file__).resolve().parent / "offline"  # not with a lone notebook


def switch(name: str, default: str = "") -> str:
    """A setting of the environment, else `default`, else the first of its CHOICES.

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
    """Folder of all that a run writes: A3_RUNS, else ./runs."""
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
    """Whether the CPU multiplies bf16 in hardware (AMX, AVX512-BF16); Linux only."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def precision_policy(device: torch.device) -> torch.dtype:
    """Data type of the forward pass: A3_PRECISION, else what is fast on `device`.

    bf16 on CPUs and GPUs that have it (from Ampere on), fp16 with a loss scaler on older GPUs,
    else fp32. Raises ValueError for fp16 on a CPU.
    """
    choice = switch("A3_PRECISION")
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif choice == "auto":
        choice = "bf16" if cpu_has_fast_bf16() else "fp32"
    if choice == "fp16" and device.type != "cuda":
        raise ValueError("A3_PRECISION=fp16 needs a CUDA GPU; use auto, fp32 or bf16.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def machine() -> str:
    """One line on the machine, without its name: cores, kind, accelerator, torch version."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores {platform.machine()}, {where}, torch {torch.__version__}"


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
        notice(f"{path.name} cannot be written ({error}); the run goes on.")


# ---- Data sets ----

PATIENCE = 10.0  # seconds of silence that an address may take
CUT = (RuntimeError, ConnectionError, http.client.HTTPException)  # or a wrong hash
SIZES = {"MNIST": (60_000, 10_000), "SVHN": (73_257, 26_032)}
FILES = {  # with the start of their sha256
    "train-images-idx3-ubyte.gz": "440fcabf",
    "train-labels-idx1-ubyte.gz": "3552534a",
    "t10k-images-idx3-ubyte.gz": "8d422c7b",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f9",
    "train_32x32.mat": "435e94d6",
    "test_32x32.mat": "cdce80df",
}
MNIST_HOST = "https://ossci-datasets.s3.amazonaws.com/mnist"
SVHN_HOST = "http://ufldl.stanford.edu/housenumbers"
SVHN_COUNTS = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # training, 0 to 9


class DataError(RuntimeError):
    """No data or weights; the message lists what was tried and what to do."""


@dataclass(frozen=True)
class Split:
    """Images (uint8, N x C x H x W, C 1 or 3) and labels (int64, N, 0 to 9), else ValueError."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
            raise ValueError(
                f"images: uint8, N x C x H x W, C 1 or 3, N > 0; not {x.dtype, x.shape}"
            )
        if y.dtype != torch.int64 or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 9:
            raise ValueError(f"labels: int64, 0 to 9, one for each of {len(x)} images; not {y}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> Split:
        """The images at `indices`, in that order. ValueError unless all are 0 to N - 1."""
        index = np.asarray(indices)
        if index.dtype.kind not in "iu" or not 0 <= index.min() <= index.max() < len(self):
            raise ValueError(f"indices: whole numbers from 0 to {len(self) - 1}.")
        return Split(self.images[index], self.labels[index])

    def first(self, count: int) -> Split:
        """The first `count` images, or all when there are fewer. ValueError for a count below 1."""
        return Split(self.images[: max(count, 0)], self.labels[: max(count, 0)])

    def counts(self) -> list[int]:
        """Number of images of each digit, 0 to 9."""
        return torch.bincount(self.labels, minlength=10).tolist()


@dataclass(frozen=True)
class DigitData:
    """A data set: its true name, two splits, and whether it is the real one."""

    name: str
    train: Split
    test: Split
    real: bool

    def map(self, change: Callable[[Split], Split]) -> DigitData:
        """The same data with `change` applied to both splits."""
        return replace(self, train=change(self.train), test=change(self.test))


def fingerprint(*parts: object) -> str:
    """16 hex digits of all parts: tensors and splits by content, the rest by repr."""

    def plain(part: object) -> object:
        if isinstance(part, Split):
            part = part.images, part.labels
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return f"{part.dtype}{tuple(part.shape)}{hashlib.sha256(content).hexdigest()}"
        if isinstance(part, dict):
            return "dict", plain(sorted(part.items()))
        return [plain(one) for one in part] if isinstance(part, (list, tuple)) else part

    return hashlib.sha256(repr(plain(parts)).encode()).hexdigest()[:16]


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
                # Any answer will do; what else is wrong shows in the download.
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
    """{url: fetch} of a file of the Hugging Face hub, whose client resumes and checks."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain http has time-outs
    from huggingface_hub import hf_hub_download, hf_hub_url

    place = {"endpoint": os.environ.get("HF_ENDPOINT") or "https://huggingface.co", **kind}
    fetch = partial(hf_hub_download, repository, file, local_dir=folder, **place)
    return {hf_hub_url(repository, file, **place): lambda url: Path(fetch())}


def load_cached(name: str, make: Callable[[], Split], *key: object) -> Split:
    """make(), or its result in an earlier run with this key. A faulty cache is made again."""
    path = runs_folder() / f"{name}-{fingerprint(*key)}.npz"
    with contextlib.suppress(Exception), np.load(path) as stored:  # it checks the CRC
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
        download_weights([f"{MNIST_HOST}/{name}"], path, FILES[name])
        data = bytearray(gzip.decompress(path.read_bytes()))  # idx format: data[3] is the rank
        tensors.append(torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * data[3]))
    return Split(tensors[0].view(-1, 1, 28, 28), tensors[1].long())


def _from_mat(files: Sequence[Path]) -> Split:
    from scipy.io import loadmat

    if not _sha256(files[0]).startswith(FILES[files[0].name]):
        raise DataError("this is not the official file; its checksum differs")
    stored = loadmat(files[0])
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
    """A part of SVHN from its official .mat file or the mirror's parquet files."""
    if not files:
        raise FileNotFoundError("no such file")
    decode = _from_mat if files[0].suffix == ".mat" else _from_parquet
    split = load_cached(f"svhn-{part}", lambda: decode(files), *map(_sha256, files))
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
    """The data set that A3_DATA asks for; slices of 512 and 256 in the tiny profile."""
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
            raise DataError(f"{problem}\nNo stand-in: {error}") from error
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
    """uint8 0..255 to float32 -1..1, as the starter normalizes. ValueError for other types."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8; got {images.dtype}.")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


# ---- Training, around the notebook's loop ----


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A random stream for each (seed, epoch): a resumed run sees the same batches."""
    mixed = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


def seed_everything(seed: int) -> None:
    """Seed torch, and ask cuDNN for repeatable kernels."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


# One dict an epoch: 'epoch', 'seconds', training means, evaluations.
History = list[dict[str, float]]


@dataclass
class Training:
    """What the notebook's loop works with; `scaler` does nothing except in fp16."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    def checkpoint(self, history: History) -> bytes:
        """The content of a file that holds this state and `history`."""
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
    """The forward pass's precision, by `precision_policy`."""
    dtype = precision_policy(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


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
    recipe, the fingerprint of the data. Raises FloatingPointError when the loss is not finite.
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
            # Dropout draws from the global stream: seeded here, resuming is exact.
            seed_everything(epoch_generator(seed, epoch).initial_seed() % 2**63)
            means = train_epoch(training, batches(epoch), loss_fn)
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"{run}: loss {means['loss']} in epoch {epoch + 1}; {len(history)} epochs are "
                    f"kept. Use a smaller learning rate than {lr:g}, or A3_PRECISION=fp32."
                )
            row = {f"train_{name}": value for name, value in means.items()}
            row |= evaluate(model) if evaluate else {}
            seconds = time.perf_counter() - started
            history.append({"epoch": epoch + 1, "seconds": seconds, **row})
            shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
            _tell(f"{run}: epoch {epoch + 1}/{epochs}, {shown}")
            waiting = training.checkpoint(history)
            # Short epochs share a file: a mounted Drive keeps every replaced one as trash.
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
    # A pixel's channels together: faster convolutions, same numbers.
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
    if not path.exists():
        return []
    first = training.checkpoint([])  # loading may fail half way
    try:
        history = training.restore(path.read_bytes())
    except Exception as error:
        notice(f"Checkpoint {path.name} is no use ({type(error).__name__}): training starts again.")
        return training.restore(first)
    _tell(f"{run}: resumed after epoch {len(history)}")
    return history


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """`model` with the state dict of a file (fp16 becomes the model's type), in eval mode.

    Raises FileNotFoundError, or RuntimeError that names a damaged or foreign file.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise RuntimeError(f"{path} is not a file of these weights: {error}") from error
    return model.eval()


# ---- Trainings side by side ----


def progress_file() -> Path:
    """The file with a line an epoch, of all processes: A3_PROGRESS, else a new one."""
    if not os.environ.get("A3_PROGRESS"):
        os.environ["A3_PROGRESS"] = tempfile.mkstemp(prefix="a3-progress-")[1]
    return Path(os.environ["A3_PROGRESS"])


def _tell(line: str) -> None:
    with contextlib.suppress(OSError), progress_file().open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def jobs_at_once() -> int:
    """One training on a GPU, else one a core that memory allows."""
    if default_device().type == "cuda":
        return 1
    return max(1, min(joblib.cpu_count(), int(psutil.virtual_memory().available / 1.5e9)))


# For workers: glibc gives freed memory back at once, which costs a quarter of a training's time
# in page faults (12.2 against 8.9 s).
WORKER_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def side_by_side(tasks: dict[str, Callable[[], Any]], jobs: int | None = None) -> dict[str, Any]:
    """Run independent trainings, `jobs` at a time (None: `jobs_at_once`), one thread each.

    Each task is a function without arguments, which may be defined in a notebook (joblib's loky
    sends it). Results come in the order of `tasks`, and are the same whatever the number of jobs.
    Raises RuntimeError that names the task that failed.
    """
    jobs = min(jobs or jobs_at_once(), len(tasks))
    with _progress_shown(len(tasks)), warnings.catch_warnings():
        if jobs <= 1:
            return {name: _run_task(name, task) for name, task in tasks.items()}
        # loky replaces workers whose memory has grown.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
        os.environ |= WORKER_SETTINGS | os.environ
        # Futures wait without polling; joblib.Parallel polls with a tenth of a core.
        executor = get_reusable_executor(max_workers=jobs)
        futures = {name: executor.submit(_run_task, name, task) for name, task in tasks.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            executor.shutdown(wait=False, kill_workers=True)
            raise


def _run_task(name: str, task: Callable[[], Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on any number of cores
    try:
        return task()
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
        _tell(f"{name}: done")


@contextlib.contextmanager
def _progress_shown(count: int) -> Iterator[None]:
    """One output, rewritten while trainings run: the last line of each."""
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
    """Number, save (in the runs folder's figures/), show and close a figure.

    Plots are SVG; `photo` makes a PNG of 220 dpi. The caption is also the alternative text.
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
    """Show computed text as Markdown."""
    _show({"text/markdown": text, "text/plain": text})


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show a table as Markdown; columns of numbers are set to the right."""
    columns = [[str(row[n]) for row in rows] for n in range(len(header))]
    numeric = [all(re.search(r"\d|^$", cell) and len(cell) < 25 for cell in c) for c in columns]
    lines = [header, [":---", *("---:" if n else ":---" for n in numeric[1:])], *rows]
    say("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


# ---- PDF: nbconvert reads Markdown, pandoc turns its HTML into typst, typst sets it ----

_STYLE = r"""
#set page(margin: (x: 1.7cm, y: 1.25cm), footer:
  context text(8pt)[#document.title #h(1fr) #counter(page).display("1 / 1", both: true)])
#set text(9.4pt)
#set par(justify: true, leading: 0.5em, spacing: 0.75em)
#set table(stroke: (x: none, y: 0.3pt + gray), inset: (x: 5pt, y: 2.4pt))
#show table: it => { set par(justify: false); set align(right); it }
#show table.cell.where(x: 0): set align(left)
#show table.cell.where(y: 0): strong
#set figure(placement: auto, supplement: none, numbering: none)
#show figure.where(kind: table): set figure(placement: none)
#show figure.where(kind: image): set image(width: 84%)
#show figure: set text(8.8pt)
#show quote: it => block(width: 100%, fill: luma(242), inset: 6pt, spacing: 8pt, it.body,
  breakable: false)
#show heading.where(level: 2): it => place.flush() + it
#show raw.where(block: true): it => context {
  set text(if page.columns > 1 { 5.8pt } else { 6.8pt })
  set par(justify: false, leading: 0.34em, spacing: 0.34em)
  block(width: 100%, inset: (x: 5pt, y: 3pt), stroke: (left: 1pt + luma(205)),
    fill: if it.lang != "output" { luma(245) }, breakable: it.lines.len() > 24,
    for line in it.lines { // pages break at empty ones
      let pad = 0.6em * (line.text.position(regex("\S|$")) + 4)
      block(sticky: page.columns < 2 and line.text != "", par(hanging-indent: pad, line + sym.zws))
    })
}
#let horizontalrule = line(length: 100%)
#let link(to, ..body) = context if type(to) == label and query(to).len() != 1 or to == "" {
  body.at(0) } else { text(navy, std.link(to, ..body)) }
"""
# What pandoc lacks, braces to depth three, and the definition of a macro.
_MACROS = r"""\newcommand{\rm}[1]{\mathrm{#1}} \newcommand{\bf}[1]{\mathbf{#1}}
\newcommand{\cal}[1]{\mathcal{#1}} \newcommand{\tag}[1]{\quad\text{(#1)}}
\newcommand{\label}[1]{} \newcommand{\nonumber}{}"""
_BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_MACRO = rf"\\(?:(?:re)?newcommand|def|DeclareMathOperator)\*?\s*\{{?\\\w+\}}?[^{{}}]*{_BRACES}"
_quoted = partial(json.dumps, ensure_ascii=False)


def export_pdf(notebook: Path | None = None, pdf: Path | None = None) -> list[str]:
    """Write the executed notebook as a PDF beside it; print and return what could not be set.

    Without `notebook`: in Colab the open one; else the saved file that VS Code or Jupyter names
    to its kernel, or the folder's only one.
    """
    path, nb = _read_notebook(notebook)
    pdf = Path(pdf or path).with_suffix(".pdf")
    content, notices = notebook_to_pdf(nb, path.parent)
    write_atomically(pdf, lambda file: file.write_bytes(content))
    print(*notices, f"PDF of {path.name} as last saved: {pdf.resolve()}", sep="\n")
    if "google.colab" in sys.modules:
        importlib.import_module("google.colab.files").download(str(pdf))
    return notices


def _read_notebook(path: Path | None) -> tuple[Path, dict]:
    call = "utils.export_pdf(Path('FILE.ipynb'))"
    if not path and "google.colab" in sys.modules:
        with contextlib.suppress(Exception):  # None when time is up, MessageError on a refusal
            colab = importlib.import_module("google.colab._message")
            nb = colab.blocking_request("get_ipynb", timeout_sec=60)["ipynb"]
            return Path(nb["metadata"].get("colab", {}).get("name", "assignment3.ipynb")), nb
        way_out = "run this cell again, or File > Download > .ipynb, upload it,"
        raise RuntimeError(f"Colab is silent: {way_out} {call}")
    running = vars(sys.modules["__main__"]).get("__vsc_ipynb_file__")
    here = sorted(Path.cwd().glob("*.ipynb"))
    names = [running, os.getenv("JPY_SESSION_NAME"), *here[: len(here) == 1]]
    path = path or next((Path(name) for name in names if Path(name or "").is_file()), None)
    if not path:
        raise FileNotFoundError(f"Jupyter names none of {[p.name for p in here]}: save it, {call}")
    nbformat = importlib.import_module("nbformat")
    return path, nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)


def notebook_to_pdf(nb: dict, folder: Path) -> tuple[bytes, list[str]]:
    """PDF of a notebook of format 4 with images in `folder`; notices: 'cell N: what, why'."""
    with tempfile.TemporaryDirectory() as workshop:
        page = _Pdf(folder, Path(workshop))
        return page.make(nb), page.notices


def _clean(value: Any, between: str = "") -> str:
    text = between.join(value) if isinstance(value, list | tuple) else str(value or "")
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]|[^\n\r\t -\ud7ff\uf900-\U0010ffff]|\ufe0f", "", text)


def _listing(text: str, kind: str = "output") -> str:
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    if kind == "output" and len(lines) > 40:
        lines[26:-13] = [f"[… {len(lines) - 39} lines left out …]"]
    text = html.escape("\n".join(lines).strip("\n"))
    return f'<pre class="{kind}"><code>{text}</code></pre>' if text.strip() else ""


class _Pdf:
    """Cells, formulas and images are parts; in the text, marks keep their places."""

    def __init__(self, folder: Path, workshop: Path):
        import bs4
        import pypandoc
        import typst
        from nbconvert.filters import markdown_mistune as mistune

        self.folder, self.workshop, self.title, self.cell = folder, workshop, "", 0
        self.parts, self.notices = [], []
        self.compile = typst.Compiler(root=workshop).compile
        self.parse = partial(bs4.BeautifulSoup, features="html.parser")
        options = ["--wrap=none", "--quiet", "--sandbox"]
        self.pandoc = lambda text, kind: pypandoc.convert_text(text, "typst", kind, options)
        md = mistune.IPythonRenderer(escape=False, anchor_link_text="")
        md.image = partial(mistune.HTMLRenderer.image, md)
        md.inline_math = lambda tex: self.mark("formula", tex.strip())
        md.block_math = lambda tex: self.mark("formula", f" {tex} ")  # typst's display style
        md.latex_environment = lambda env, tex: md.block_math(rf"\begin{{{env}}}{tex}\end{{{env}}}")
        self.markdown = mistune.MarkdownWithMath(md).render

    def note(self, text: str) -> None:
        self.notices.append(f"cell {self.cell}: {text}")

    def mark(self, kind: str, source: str, typst: str = "") -> str:
        self.parts.append(SimpleNamespace(cell=self.cell, kind=kind, source=source, typst=typst))
        return f"\ue000{len(self.parts) - 1}\ue001"

    def make(self, nb: dict) -> bytes:
        head = front = body = appendix = ""  # marks
        for self.cell, cell in enumerate(nb.get("cells") or [], 1):
            tags = set((cell.get("metadata") or {}).get("tags") or [])
            source = _clean(cell.get("source"))
            if "submission" in tags or source.startswith("NAME ="):
                head = self.head(source)
            elif not tags & {"hide-pdf", "helper-module", "install"}:
                page, code = self.read(cell, source)
                appendix += self.mark("cell", code) if "appendix" in tags else ""
                page = page if tags & {"appendix", "hide-code", "front-page"} else code + page
                page = self.mark("cell", self.tidy(page, cell.get("attachments") or {}))
                front, body = (front + page, body) if "front-page" in tags else (front, body + page)
        front = front and f"\n== Answers at a glance\n{front}"
        landscape = "\n#set page(flipped: true, columns: 2, margin: 1.2cm)\n== Appendix: code\n"
        body = (head or self.head("")) + front + body + (appendix and landscape + appendix)
        self.set_formulas()
        cells = [part for part in self.parts if part.kind == "cell"]
        pages = self.pandoc("<p>\ue002</p>".join(p.source for p in cells), "html-auto_identifiers")
        for part, page in zip(cells, pages.split("\ue002"), strict=True):
            part.source, part.typst = self.parse(part.source).get_text(), f"[{page}]"
        return self.typeset(body)

    def head(self, source: str) -> str:
        who = {"NAME": "", "STUDENT_NUMBER": "", "DISCUSSED_WITH": ""}
        with contextlib.suppress(Exception):
            for node in ast.parse(source).body:
                who[ast.unparse(node.targets)] = _clean(ast.literal_eval(node.value), ", ")
        page = f"<p>COMP 499/691, Special Topics: Deep Learning</p><h1>{self.title}</h1><p>"
        for key, text in who.items():
            page += f"{key.replace('_', ' ').title()}: <b>{html.escape(text) or 'empty'}</b> &emsp;"
        if missing := ", ".join(name for name in who if not who[name]):
            self.note(f"the name cell lacks {missing}: fill it in")
        self.title = f"{self.title}, {who['NAME']}".strip(", ")
        return self.mark("cell", page)

    def read(self, cell: dict, source: str) -> tuple[str, str]:
        """HTML of a cell's text or outputs, and of its code."""
        if cell.get("cell_type") == "markdown":
            return self.markdown(source), ""
        title = re.match(r"# ?@title *([^{\n]*).*\n?|", source)
        code = re.sub(r"(?m)  # fmt: \w+$", "", source[title.end() :])
        # Each definition is a listing of its own: no page cuts a short one.
        code = "".join(_listing(part, "python") for part in re.split(r"\n\s*\n(?=\S)", code))
        title = f"<h4>{html.escape(title[1])}</h4>" if title[1] else ""
        return "".join(map(self.output, cell.get("outputs") or [])), title + code

    def output(self, out: dict) -> str:
        data = {kind: _clean(content) for kind, content in (out.get("data") or {}).items()}
        about, images = out.get("metadata") or {}, [kind for kind in data if "image/" in kind]
        if images:
            kind = max(images)  # SVG rather than PNG
            code = base64.b64encode(data[kind].encode()).decode() if "svg" in kind else data[kind]
            text = html.escape(_clean(about.get("caption")))
            image = f'<img alt="{text}" src="data:{kind};base64,{code}">'
            return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
        if text := data.get("text/markdown") or data.get("text/latex"):
            return "" if about.get("is_caption") else self.markdown(text)
        page = self.parse(data.get("text/html", ""))
        if page.get_text().strip() or page(["img", "iframe"]):
            return str(page)
        if not data or "text/plain" in data:
            plain = data.get("text/plain") or _clean(out.get("text"))
            return _listing(plain or _clean(out.get("traceback") or out.get("evalue"), "\n"))
        self.note(what := f"interactive output, not shown here ({', '.join(data)})")
        return f"<p>[{what}]</p>"

    def tidy(self, page: str, attached: dict) -> str:
        part = r"(Question \d|\d \(\w\))"  # the answers at a glance lead to their sections
        page = re.sub(rf'(<h\d id=")[^"]*">{part}', r'\1\2">\2', page)
        page = re.sub(rf"(<td[^>]*>)({part}[^<]*)", r'\1<a href="#\3">\2</a>', page)
        soup = self.parse(page)
        for tag in soup(["iframe", "video", "audio", "canvas", "object", "embed", "svg"]):
            self.note(what := f"{tag.name} {tag.get('src', '')} is not shown")
            tag.replace_with(f"[{what}]")
        for tag in soup("img"):
            url, alt = unquote(tag.get("src", "")), _clean(tag.get("alt"))
            name = f"image{len(self.parts)}"
            with contextlib.suppress(Exception):  # typst will miss the file
                if url.startswith("attachment:"):
                    url = "data:," + _clean(next(iter(attached[url[11:]].values())))
                code = base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else None
                (self.workshop / name).write_bytes(code or (self.folder / url).read_bytes())
            image = f'box(image("{name}", alt: {_quoted(alt)}))'
            tag.replace_with(self.mark("image", f"[image: {alt or url[:60]}]", image))
        if soup.h1 and not self.title:
            self.title = soup.h1.extract().get_text()
        return str(soup)

    def set_formulas(self) -> None:
        formulas = [part for part in self.parts if part.kind == "formula"]
        tex = "\n".join([_MACROS, *re.findall(_MACRO, " ".join(part.source for part in formulas))])
        for n, part in enumerate(formulas):
            formula = " ".join(re.sub(_MACRO, "", part.source).split())
            tex += f"\n\n{n} $$ {formula or '~'} $$"
        typst = ""
        with contextlib.suppress(RuntimeError):  # from a macro without end
            typst = self.pandoc(tex, "markdown+latex_macros")
        typst = re.sub(r"\bsect\b", "inter", typst.replace(".circle", ".o"))  # names of typst 0.15
        done = dict(re.findall(r"(?ms)^(\d+) \$ (.*?) \$$", typst))
        for n, part in enumerate(formulas):
            bars = '"‖"' if "Vmatrix" in part.source else '"|"'
            formula = done.get(str(n), "#unknown-to-pandoc").replace('"||"', bars)
            part.typst = f"$ {formula} $" if part.source.startswith(" ") else f"${formula}$"

    def typeset(self, body: str) -> bytes:
        texts = [f"#set document(title: {_quoted(self.title)}, date: none){_STYLE}"]
        texts += [f"#let part{n} = {part.typst}\n" for n, part in enumerate(self.parts)]
        source = re.sub("\ue000(\\d+)\ue001", r"#part\1;", "".join(texts) + body)
        try:
            pdf = self.compile(source.encode())
        except RuntimeError as error:  # it tells lines, the style's too
            lines = re.findall(r"\.typ:(\d+):", error.diagnostic.partition("error: ")[2])
            owners = [n for n, text in enumerate(texts) for _ in text.splitlines()]
            part = next(self.parts[n - 1] for line in lines if (n := owners[int(line) - 1]))
            self.cell, text = part.cell, re.sub("\ue000.*?\ue001", "…", part.source)
            self.note(f"{part.kind} {text[:70]} is shown as source: {error.message}")
            part.typst = f"raw({_quoted(text)})"
            return self.typeset(body)
        try:  # PDF/A asks for a glyph of every sign
            self.compile(source.encode(), pdf_standards="a-2b")
        except RuntimeError as error:
            for sign in dict.fromkeys(re.findall(r'text `"(.+?)"`', error.diagnostic)):
                self.cell = next((part.cell for part in self.parts if sign in part.typst), 1)
                self.note(f"no font here has {sign}: install one")
        return pdf
