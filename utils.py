"""Shared helpers of Assignment 3 (COMP 499/691): the plumbing, none of the answers.

The parts, top to bottom: switches, downloads, data sets, rendered street numbers, batches and
augmentation, the training loop, evaluation, figures, BigGAN weights, PDF export.
"""

from __future__ import annotations

import ast
import base64
import binascii
import errno
import functools
import glob
import gzip
import hashlib
import html
import http.client
import importlib
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from tqdm.std import tqdm

# ======================================================================================
# Switches: what the environment may change
# ======================================================================================

CHOICES = {
    "A3_PROFILE": ("full", "tiny"),
    "A3_DATA": ("auto", "real", "embedded"),
    "A3_PRECISION": ("auto", "fp32", "bf16", "fp16"),
}


def switch(name: str, default: str | None = None) -> str:
    """Value of one of the switches in CHOICES, read from the environment each time.

    The first choice is the default, unless `default` names another. Raises ValueError that lists
    the valid values when the environment holds anything else.
    """
    choices = CHOICES[name]
    value = os.environ.get(name, "").strip().lower() or default or choices[0]
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of: {', '.join(choices)}.")
    return value


def profile() -> str:
    """'full' (the assignment's settings) or 'tiny' (a smoke run on small slices)."""
    return switch("A3_PROFILE")


def data_root() -> Path:
    """Folder of the torchvision data sets: A3_DATA_ROOT, else ./data."""
    return Path(os.environ.get("A3_DATA_ROOT") or "data").expanduser()


def runs_folder() -> Path:
    """Folder of checkpoints and rendered pictures: A3_RUNS, else ./runs. Made when missing."""
    folder = Path(os.environ.get("A3_RUNS") or "runs").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def figures_folder() -> Path:
    """Folder of pictures and results.json: ./figures, or inside A3_RUNS for the tiny profile.

    So a smoke run never overwrites the pictures of a full one. Made when missing.
    """
    folder = Path("figures") if profile() == "full" else runs_folder() / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def default_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_has_fast_bf16() -> bool:
    """True where the processor multiplies bf16 in hardware: Intel AMX, or AVX512-BF16 (AMD Zen 4).

    Without such instructions bf16 is emulated and slower than fp32. Linux only; elsewhere the
    answer is False and fp32 is used.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def precision_policy(device: torch.device) -> torch.dtype:
    """Data type of the forward pass on `device`: A3_PRECISION, else what is fast there.

    bf16 on CPUs that have it and on GPUs from Ampere on, fp16 (with a loss scaler) on older
    GPUs, fp32 elsewhere. Raises ValueError for fp16 on a CPU.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    choice = switch("A3_PRECISION")
    if choice == "fp16" and device.type != "cuda":
        raise ValueError("A3_PRECISION=fp16 needs a CUDA GPU; use auto, fp32 or bf16 on a CPU.")
    if choice != "auto":
        return named[choice]
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_fast_bf16() else torch.float32


def machine() -> str:
    """One line on the machine, without its name: cores, kind, accelerator, torch version."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    bf16 = "bf16" if cpu_has_fast_bf16() else "no bf16"
    cores = os.cpu_count()
    return f"{cores} cores {platform.machine()} ({bf16}), {where}, torch {torch.__version__}"


def shown_path(path: Path) -> str:
    """`path` for a message: from the working folder where it is inside, else in full."""
    full = path.absolute()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)


def notice(text: str) -> None:
    """Print something the reader must not miss, framed, on standard output."""
    bar = "!" * 88
    print(f"{bar}\n{text}\n{bar}", flush=True)


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`, to write to before the rename."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def remove_abandoned_parts(path: Path) -> None:
    """Delete temporary files of runs that were killed: a living one is written to all the time."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        try:
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
        except OSError:
            pass  # another process was faster, or the folder is read-only


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then rename: readers never see half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned_parts(path)
    temporary = temporary_name(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ======================================================================================
# Downloads: verified files, and the real data sets
# ======================================================================================
# A file counts only when its checksum is right. It is written under a temporary name and
# moved into place in one step, so that a half file is never seen under the true name.

USER_AGENT = "assignment3-notebook (Python urllib)"  # some hosts refuse Python's own name
OFFLINE_PATIENCE = 12.0  # seconds lost to silent hosts before we believe there is no network
SLOWEST = 1000  # bytes a second; a server below this is as good as silent

# torchvision knows the checksums of the .gz files only; these belong to the unpacked files.
MNIST_UNPACKED = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# What the process has learned of the network: seconds lost to each silent host, and the hosts
# that answered. A host that was silent once gets one second the next time, not ten.
_waited: dict[str, float] = {}
_answered: set[str] = set()


class DownloadError(RuntimeError):
    """A file could not be had. The message lists every try and says what to do next."""


class _TryFailed(Exception):
    """One address did not give the file; the next one may."""


def _parse_checksum(checksum: str) -> tuple[str, str]:
    """'sha256:<hex>', 'md5:<hex>' or 64 bare hex digits (sha256) -> (algorithm, hex digits)."""
    match = re.fullmatch(r"(?:(sha256|md5):)?([0-9a-f]+)", str(checksum).lower())
    kind, digits = (match[1], match[2]) if match else (None, "")
    if (kind is None and len(digits) == 64) or (kind == "sha256" and 8 <= len(digits) <= 64):
        return "sha256", digits
    if kind == "md5" and len(digits) == 32:
        return "md5", digits
    raise ValueError(
        "checksum must be 'sha256:' and 8 to 64 hex digits (the start of the sum is enough), "
        f"'md5:' and 32 hex digits, or the 64 digits of a sha256 alone; got {checksum!r}"
    )


def _new_digest(kind: str):
    return hashlib.new(kind, usedforsecurity=False)


def has_checksum(path: str | Path, checksum: str, size: int | None = None) -> bool:
    """True if `path` is a file of that checksum (see `download`) and, if given, size in bytes."""
    kind, digits = _parse_checksum(checksum)
    try:
        with open(path, "rb") as file:
            if size is not None and os.fstat(file.fileno()).st_size != size:
                return False
            found = hashlib.file_digest(file, lambda: _new_digest(kind)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return found.startswith(digits)


def _patience(host: str, timeout: float) -> float:
    """Seconds to wait for `host` to answer, given what was lost to silent hosts before."""
    left = timeout - _waited.get(host, 0.0)
    if not _answered:
        left = min(left, OFFLINE_PATIENCE - sum(_waited.values()))
    return max(left, min(1.0, timeout))


def _open_url(url: str, timeout: float) -> http.client.HTTPResponse:
    """`urlopen` that gives up after `timeout` seconds in all.

    urllib's own time-out covers neither the DNS look-up nor the sum over a host's addresses.
    """
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    answer: Future = Future()

    def work() -> None:
        try:
            answer.set_result(urllib.request.urlopen(request, timeout=timeout))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError:
        answer.add_done_callback(lambda late: late.exception() or late.result().close())
        raise


def _explain(error: Exception, host: str) -> str:
    """A network error in words."""
    if isinstance(error, urllib.error.HTTPError):
        meaning = {
            403: "the server refuses",
            404: "the file is not there any more",
            429: "too many requests, try later",
            503: "the server is busy, try later",
        }.get(error.code, "the server could not deliver")
        return f"HTTP {error.code}: {meaning}"
    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return f"DNS failure: the name {host} was not found (is there a network?)"
    if isinstance(cause, TimeoutError):
        return "time-out: the server is silent or too slow"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate of {host} is not valid"
    if isinstance(cause, ConnectionError | http.client.IncompleteRead):
        return "the connection was cut"
    if getattr(cause, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
        return "no network: the host cannot be reached"
    return f"{type(cause).__name__}: {cause}"


def _url_chunks(url: str, timeout: float) -> Iterator[bytes]:
    """The body of `url`, piece by piece; raises `_TryFailed` for every fault of the network."""
    host = urllib.parse.urlsplit(url).hostname
    wait, start = _patience(host, timeout), time.monotonic()
    try:
        response = _open_url(url, wait)
    except urllib.error.HTTPError as error:
        error.close()
        _answered.add(host)
        raise _TryFailed(_explain(error, host)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            _waited[host] = _waited.get(host, 0.0) + time.monotonic() - start
            _answered.discard(host)
        raise _TryFailed(_explain(error, host)) from error
    _answered.add(host)
    _waited.pop(host, None)

    with response:
        announced, received, start = response.length, 0, time.monotonic()
        try:
            while chunk := response.read1(1 << 16):
                received += len(chunk)
                yield chunk
                seconds = time.monotonic() - start
                if seconds > 2 * timeout and received < SLOWEST * seconds:
                    raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            message = f"{_explain(error, host)} (after {received:,} bytes)"
            raise _TryFailed(message) from error
        if announced is not None and received < announced:
            raise _TryFailed(f"the connection was cut after {received:,} of {announced:,} bytes")


def _try_url(url: str, path: Path, checksum: str, size: int | None, timeout: float) -> None:
    """Fetch `url` to a temporary name beside `path`, verify it, move it to `path`.

    Raises `_TryFailed` for what the server or the network did, OSError for this machine's faults.
    """
    kind, digits = _parse_checksum(checksum)
    digest, head, received = _new_digest(kind), b"", 0
    part = temporary_name(path)
    start = told = time.monotonic()
    try:
        with open(part, "xb") as file:
            for chunk in _url_chunks(url, timeout):
                head = head or chunk
                digest.update(chunk)
                received += len(chunk)
                if size is not None and received > size:
                    break
                file.write(chunk)
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    total = f" of {size / 1e6:.0f}" if size else ""
                    print(f"  {path.name}: {received / 1e6:.0f}{total} MB", flush=True)
            file.flush()
            os.fsync(file.fileno())
        if not digest.hexdigest().startswith(digits) or size not in (None, received):
            if re.match(rb"\s*(<!doctype|<html|<head|<\?xml)", head, re.IGNORECASE):
                raise _TryFailed("a web page (HTML) came in place of the file; a log-in page?")
            if size is not None and received != size:
                more = "more than " if received > size else ""
                expected = size if received > size else f"{received:,} bytes, not {size:,}"
                raise _TryFailed(f"wrong size: {more}{expected}")
            raise _TryFailed(f"wrong checksum: {kind} {digest.hexdigest()}, not {digits}")
        os.replace(part, path)
    finally:
        _remove_quietly(part)
    seconds = time.monotonic() - start
    print(f"Downloaded {path.name} ({received / 1e6:.1f} MB, {seconds:.1f} s), checksum right.")


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the fault that made us clean up is the one to report


def _right_or_set_aside(path: Path, checksum: str, size: int | None) -> bool:
    """True if the right file is at `path`. A wrong one is renamed to .bad, with a notice."""
    try:
        before = path.stat()
        if has_checksum(path, checksum, size):
            return True
        now = path.stat()
        # Another process may have put the right file there while we read the wrong one.
        if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
            bad = path.with_name(path.name + ".bad")
            os.replace(path, bad)
            print(f"Notice: {path} was damaged or another file; we set it aside as {bad.name}.")
    except (FileNotFoundError, NotADirectoryError):
        pass
    return False


def _explain_local(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full (folder {path.parent})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the folder {path.parent} cannot be written to (read-only?)"
    return f"{type(error).__name__}: {error}"


def download(
    urls: Sequence[str],
    path: str | Path,
    checksum: str,
    *,
    size: int | None = None,
    timeout: float = 10.0,
) -> Path:
    """Make sure that the file of this checksum is at `path`, and return `path`.

    If it is there already, no network is used. Otherwise the addresses are tried in turn, https
    first. A wrong file at `path` is set aside as `<name>.bad`, never used. Several processes may
    ask for the same file at once.

    urls: one or more http(s) addresses of the same file.
    checksum: 'sha256:<8 to 64 hex digits>', 'md5:<32 hex digits>', or a bare full sha256.
    size: bytes, if known. timeout: seconds > 0 for the first answer, and for each piece after it;
    less once other hosts were silent, so that a machine with no network does not wait for long.

    Raises ValueError for bad arguments, `DownloadError` if the file could not be had.
    """
    if isinstance(urls, str) or not urls or not all(_is_web_address(url) for url in urls):
        raise ValueError(f"urls must be a non-empty list of http(s) addresses, got {urls!r}")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size must be None or a whole number of bytes >= 1, got {size!r}")
    if not (isinstance(timeout, int | float) and math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout must be a finite number of seconds > 0, got {timeout!r}")
    kind, digits = _parse_checksum(checksum)
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be the name of a file, but {path} is a folder")

    urls = sorted(urls, key=lambda url: not url.lower().startswith("https:"))  # https first
    problems = []
    try:
        if _right_or_set_aside(path, checksum, size):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_parts(path)
        for url in urls:
            try:
                _try_url(url, path, checksum, size, timeout)
                return path
            except _TryFailed as problem:
                problems.append(f"  {url}\n    {problem}")
    except OSError as error:
        if has_checksum(path, checksum, size):  # another process has finished the same file
            return path
        problems.append(f"  on this machine: {_explain_local(error, path)}")
    amount = f"{size:,} bytes, " if size else ""
    raise DownloadError(
        f"We could not get the file {path.name}:\n"
        + "\n".join(problems)
        + "\nWhat to do: put this right and run again; nothing half-done is left behind. "
        + "Or fetch the file by hand, for example in a browser, from\n  "
        + "\n  ".join(urls)
        + f"\nand save it as\n  {shown_path(path)}\n({amount}{kind} {digits})"
    )


def _is_web_address(url: object) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except (AttributeError, TypeError, ValueError):
        return False


def verified_torch_load(path: str | Path) -> dict:
    """The dict of tensors and plain values in a .pt/.pth/.bin file, on the CPU.

    Only tensors and plain values are read (`weights_only=True`), so a file cannot run code. Files
    in torch's zip format are checked against the CRC of every part first; the older format has
    none, so check such a file with `has_checksum` or `download`.

    Raises FileNotFoundError if there is no file, ValueError for a damaged or foreign one.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notices on old formats; faults are raised
        try:
            if file.read(2) == b"PK":
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"wrong CRC in {damaged}")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        except Exception as error:  # torch raises a dozen kinds for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"{path} is damaged or not a file of tensors made by torch.save: {reason}. "
                "Delete it or move it away, and run again."
            ) from error
    return content


def _torchvision_datasets():
    """torchvision.datasets, or an ImportError in words.

    Not a DownloadError: a broken installation must stop us, not swap real data for a stand-in.
    """
    try:
        from torchvision import datasets
    except Exception as error:  # a torchvision built for another torch fails with RuntimeError
        raise ImportError(
            f"torchvision, which reads MNIST and SVHN, cannot be imported: {error}\n"
            "What to do: install the torch and torchvision that belong together, both from the "
            "same index: pip install --upgrade torch torchvision"
        ) from error
    return datasets


def fetch_mnist(root: str | Path) -> list[Path]:
    """The four verified MNIST files in `root`/MNIST/raw, in the order of torchvision's list.

    Each is torchvision's .gz, or the unpacked file if that is there and right. Only what is
    missing is downloaded. Raises `DownloadError`, or ImportError where torchvision is broken.
    """
    mnist, raw, files = _torchvision_datasets().MNIST, Path(root) / "MNIST" / "raw", []
    for name, md5 in mnist.resources:
        unpacked = raw / name.removesuffix(".gz")
        if has_checksum(unpacked, "sha256:" + MNIST_UNPACKED[unpacked.name]):
            files.append(unpacked)
            continue
        try:
            urls = [mirror + name for mirror in mnist.mirrors]
            files.append(download(urls, raw / name, f"md5:{md5}"))
        except DownloadError as error:
            names = ", ".join(name for name, _ in mnist.resources)
            raise DownloadError(f"{error}\nMNIST needs four files in {raw}: {names}") from error
    return files


def load_mnist(root: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Real MNIST by torchvision's own class, downloaded if need be.

    Returns {'train': (images, labels), 'test': ...}: images uint8 N x 1 x 28 x 28 (0 to 255),
    labels int64 N (0 to 9). `root` may be read-only if the four files are there: we unpack into a
    temporary folder, because torchvision would unpack, unverified, beside them.
    Raises `DownloadError`. Source: LeCun et al. 1998, http://yann.lecun.com/exdb/mnist/.
    """
    files, splits = fetch_mnist(root), {}
    try:
        with tempfile.TemporaryDirectory(prefix="mnist-") as folder:
            raw = Path(folder, "MNIST", "raw")
            raw.mkdir(parents=True)
            for file in files:
                opener = gzip.open if file.suffix == ".gz" else open
                with opener(file, "rb") as source, open(raw / file.stem, "wb") as target:
                    shutil.copyfileobj(source, target)
            for split in ("train", "test"):
                data = _torchvision_datasets().MNIST(folder, train=split == "train", download=False)
                splits[split] = (data.data.unsqueeze(1), data.targets.long())
    except OSError as error:
        raise DownloadError(
            f"MNIST is in {root}, but could not be unpacked: {error}\n"
            "What to do: set TMPDIR to a folder that can be written to, with 60 MB free."
        ) from error
    return splits


def fetch_svhn(root: str | Path) -> list[Path]:
    """The verified train_32x32.mat and test_32x32.mat in `root`; downloads what is missing.

    Raises `DownloadError`.
    """
    svhn, files = _torchvision_datasets().SVHN, []
    for split in ("train", "test"):
        url, name, md5 = svhn.split_list[split]
        try:
            secure = re.sub(r"^http:", "https:", url)
            files.append(download([secure, url], Path(root) / name, f"md5:{md5}"))
        except DownloadError as error:
            names = ", ".join(svhn.split_list[split][1] for split in ("train", "test"))
            raise DownloadError(f"{error}\nSVHN needs two files in {root}: {names}") from error
    return files


def load_svhn(root: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Real SVHN (cropped digits) by torchvision's own class, downloaded if need be.

    Returns {'train': (images, labels), 'test': ...}: images uint8 N x 3 x 32 x 32 (0 to 255),
    labels int64 N (0 to 9; the file's 10 is the digit 0). `root` may be read-only if the files are
    there. Raises `DownloadError`. Source: Netzer et al. 2011,
    http://ufldl.stanford.edu/housenumbers/.
    """
    fetch_svhn(root)
    splits = {}
    for split in ("train", "test"):
        data = _torchvision_datasets().SVHN(root, split=split, download=False)
        images = torch.from_numpy(np.ascontiguousarray(data.data))
        splits[split] = (images, torch.from_numpy(data.labels))
    return splits


# ======================================================================================
# Data sets: two roles, each real where it can be had, else an embedded stand-in
# ======================================================================================


@dataclass(frozen=True)
class Split:
    """Pictures and their labels, as tensors.

    images: uint8, N x C x H x W with C 1 or 3. labels: int64, N, digits 0 to 9.
    Raises ValueError when shapes, types or ranges are not these, or when N is 0.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "images must be uint8, N x C x H x W with C 1 or 3; "
                f"got {images.dtype}, {tuple(images.shape)}."
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64, one for each of the {len(images)} images; "
                f"got {labels.dtype}, {tuple(labels.shape)}."
            )
        if len(labels) == 0:
            raise ValueError("images must hold at least one picture; the split is empty.")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(
                f"labels must be 0 to 9; got {int(labels.min())} to {int(labels.max())}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> Split:
        """The pictures at `indices`, in that order. ValueError for one outside 0 to N - 1."""
        index = np.asarray(indices)
        if index.ndim != 1 or index.size and not np.issubdtype(index.dtype, np.integer):
            raise ValueError(
                f"indices must be a row of whole numbers; got {index.dtype}, shape {index.shape}."
            )
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise ValueError(
                f"indices must be 0 to {len(self) - 1}; got {index.min()} to {index.max()}."
            )
        index = torch.as_tensor(index, dtype=torch.int64)
        return Split(self.images[index], self.labels[index])

    def first(self, count: int) -> Split:
        """The first `count` pictures, or all of them when there are fewer.

        Raises ValueError for a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1; got {count}.")
        return Split(self.images[:count], self.labels[:count])

    def gray(self) -> Split:
        """One channel: ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B, rounded."""
        if self.images.shape[1] == 1:
            return self
        return Split(luma(self.images), self.labels)

    def padded(self, size: int = 32) -> Split:
        """Zeros around each picture up to size x size, the picture in the middle."""
        height, width = self.images.shape[2:]
        if max(height, width) > size:
            raise ValueError(f"size must be at least {max(height, width)}; got {size}.")
        top, left = (size - height) // 2, (size - width) // 2
        border = (left, size - width - left, top, size - height - top)
        return Split(F.pad(self.images, border), self.labels)

    def counts(self) -> list[int]:
        """Number of pictures of each digit, 0 to 9."""
        return torch.bincount(self.labels, minlength=10).tolist()


def luma(images: Tensor) -> Tensor:
    """uint8 N x 3 x H x W to uint8 N x 1 x H x W by the ITU-R 601 weights.

    In chunks, so that a large set never stands in memory as floats. Raises ValueError for anything
    but three channels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be N x 3 x H x W; got {tuple(images.shape)}.")
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    chunks = [(chunk * weights).sum(1, keepdim=True).round() for chunk in images.split(4096)]
    return torch.cat([chunk.to(torch.uint8) for chunk in chunks])


@dataclass(frozen=True)
class DigitData:
    """One data set: its true name, a train and a test split, and whether it is the real one.

    `unseen` is a second test split where there is one: rendered digits in held-out fonts.
    """

    name: str
    train: Split
    test: Split
    real: bool
    unseen: Split | None = None

    def map(self, change: Callable[[Split], Split]) -> DigitData:
        """The same data with `change` applied to every split."""
        unseen = change(self.unseen) if self.unseen else None
        return replace(self, train=change(self.train), test=change(self.test), unseen=unseen)


SIZES = {"full": (24_000, 5_000, 2_000), "tiny": (512, 256, 128)}


def load_handwritten() -> DigitData:
    """MNIST, or scikit-learn's handwritten digits as its stand-in, by the A3_DATA switch.

    1 x 28 x 28. Raises DownloadError when A3_DATA=real and MNIST cannot be had.
    """
    return _load("MNIST", load_mnist, _sklearn_digits)


def load_street() -> DigitData:
    """SVHN (cropped digits), or rendered street numbers as its stand-in, by the A3_DATA switch.

    3 x 32 x 32. Raises DownloadError when A3_DATA=real and SVHN cannot be had.
    """
    return _load("SVHN", load_svhn, _rendered_street)


def _load(
    name: str, load_real: Callable[[Path], dict], load_embedded: Callable[[], DigitData]
) -> DigitData:
    wanted = switch("A3_DATA", default="embedded" if profile() == "tiny" else None)
    if wanted == "embedded":
        return _sliced(load_embedded())
    try:
        parts = load_real(data_root())
    except DownloadError as error:
        if wanted == "real":
            raise
        stand_in = _sliced(load_embedded())
        why = str(error).split("What to do")[0].strip()
        notice(
            f"{name} cannot be had here; using the stand-in: {stand_in.name}.\n{why}\n"
            "A3_DATA=real stops here instead, and says how to put it right."
        )
        return stand_in
    splits = {part: Split(*parts[part]) for part in ("train", "test")}
    return _sliced(DigitData(name, splits["train"], splits["test"], real=True))


def _sliced(data: DigitData) -> DigitData:
    if profile() == "full":
        return data
    train, test, unseen = SIZES["tiny"]
    unseen_split = data.unseen.first(unseen) if data.unseen else None
    return replace(
        data, train=data.train.first(train), test=data.test.first(test), unseen=unseen_split
    )


def _sklearn_digits() -> DigitData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pictures, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pictures).float().view(-1, 1, 8, 8)
    # The 8 x 8 digits fill their frame; MNIST's fill 20 of 28 pixels.
    digits = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad((digits / 16 * 255).round().clamp(0, 255).to(torch.uint8), (4, 4, 4, 4))
    whole = Split(images, torch.from_numpy(labels).long())
    train, test = train_test_split(
        np.arange(len(whole)), test_size=360, random_state=0, stratify=labels
    )
    return DigitData("scikit-learn digits", whole.take(train), whole.take(test), real=False)


def _rendered_street() -> DigitData:
    train, test, unseen = SIZES[profile()]
    return DigitData(
        "rendered street numbers",
        _rendered(train, 1, SEEN_FAMILIES),
        _rendered(test, 2, SEEN_FAMILIES),
        real=False,
        unseen=_rendered(unseen, 3, UNSEEN_FAMILIES),
    )


def _rendered(count: int, seed: int, families: Sequence[str]) -> Split:
    """Rendered digits from the cache, or rendered now and cached under what made them."""
    key = fingerprint(_renderer_versions(), count, seed, list(families))
    path = runs_folder() / f"street-{key}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return Split(*(torch.from_numpy(stored[part]) for part in ("images", "labels")))
        except Exception as error:  # a damaged cache must never stop a run: it can be made again
            notice(f"{path.name} is damaged ({error}); rendering it again.")
    images, labels = render_street_numbers(count, seed, families)

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, images=images.numpy(), labels=labels.numpy())

    write_atomically(path, write)
    return Split(images, labels)


@functools.cache
def _renderer_versions() -> list[str]:
    """What decides how a crop looks: the renderer's own code, and the libraries that draw.

    The code stands for itself, so no one has to remember a version number after a change.
    """
    import matplotlib
    import PIL

    source = Path(__file__).read_text(encoding="utf-8")
    code = source.partition("\nSTREET_VERSION = ")[2].partition("\n# Batches and augmentation\n")[0]
    return [code, matplotlib.__version__, PIL.__version__, torch.__version__]


def validation_split(data: DigitData, count: int, seed: int = 0) -> tuple[Split, Split]:
    """Cut the training split in two, at random: what to fit on, and `count` to choose by.

    The test split stays untouched. Raises ValueError unless 0 < count < size of the split.
    """
    size = len(data.train)
    if not 0 < count < size:
        raise ValueError(f"count must be between 1 and {size - 1}; got {count}.")
    order = np.random.RandomState(seed).permutation(size)
    return data.train.take(order[count:]), data.train.take(order[:count])


def fingerprint(*parts: object) -> str:
    """Sixteen hex digits that change when any part does.

    Tensors and splits count by content, also inside lists, tuples and dicts; anything else by its
    JSON (or repr) text.
    """
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, Split):
            part = [part.images, part.labels]
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous()
            digest.update(f"{content.dtype}{tuple(content.shape)}".encode())
            digest.update(content.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            add(sorted(part.items()))
        elif isinstance(part, (list, tuple)):
            digest.update(f"[{len(part)}".encode())
            for piece in part:
                add(piece)
        else:
            digest.update(json.dumps(part, default=repr).encode())
        digest.update(b"|")

    add(parts)
    return digest.hexdigest()[:16]


# ======================================================================================
# Rendered street numbers: the offline stand-in for SVHN
# ======================================================================================
# The idea is that of Synthetic Digits -> SVHN (Ganin & Lempitsky 2015, section 4): font glyphs
# with the nuisances of a street photograph. Glyphs are kept as signed distance fields, so that
# stroke weight, outlines and shadows are one addition each, and a whole batch of crops is
# composed at once: geometry -> plate -> digits -> light -> camera.


STREET_VERSION = "2"  # change it with the look: weights/street_classifier.pt belongs to one

# A face is a font file of matplotlib's mpl-data/fonts/ttf and its glyphs for 0..9, a bare "1" (I)
# and a flat-topped "3" (the letter ezh, where the font has one).
_PLAIN, _EZH = "0123456789I3", "0123456789I\u01b7"
_STIX_SANS = "".join(chr(0x1D7E2 + i) for i in range(10)) + chr(0x1D5A8) + chr(0x1D7E5)
_STIX_SANS_BOLD = "".join(chr(0x1D7EC + i) for i in range(10)) + chr(0x1D5DC) + chr(0x1D7EF)
_STIX_MONO = "".join(chr(0x1D7F6 + i) for i in range(10)) + chr(0x1D678) + chr(0x1D7F9)
_MONO_O = "O" + _EZH[1:]  # DejaVu Sans Mono dots its zero, house numbers do not

FONT_FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "DejaVu Sans": (
        ("DejaVuSans.ttf", _EZH),
        ("DejaVuSans-Bold.ttf", _EZH),
        ("DejaVuSans-Oblique.ttf", _EZH),
        ("DejaVuSans-BoldOblique.ttf", _EZH),
        ("DejaVuSansMono.ttf", _MONO_O),
        ("DejaVuSansMono-Bold.ttf", _MONO_O),
    ),
    "DejaVu Serif": (
        ("DejaVuSerif.ttf", _EZH),
        ("DejaVuSerif-Bold.ttf", _EZH),
        ("DejaVuSerif-Italic.ttf", _EZH),
        ("DejaVuSerif-BoldItalic.ttf", _EZH),
    ),
    "STIX": (
        ("STIXGeneral.ttf", _PLAIN),
        ("STIXGeneralBol.ttf", _PLAIN),
        ("STIXGeneralItalic.ttf", _PLAIN),
        ("STIXGeneralBolIta.ttf", _PLAIN),
    ),
    "STIX Sans": (("STIXGeneral.ttf", _STIX_SANS), ("STIXGeneral.ttf", _STIX_SANS_BOLD)),
    "STIX Mono": (("STIXGeneral.ttf", _STIX_MONO),),
    "Computer Modern": (("cmr10.ttf", _PLAIN), ("cmb10.ttf", _PLAIN)),
    "Computer Modern Sans": (("cmss10.ttf", _PLAIN),),
    "Computer Modern Typewriter": (("cmtt10.ttf", _PLAIN),),
}
UNSEEN_FAMILIES = ("DejaVu Serif", "Computer Modern Sans")
SEEN_FAMILIES = tuple(name for name in FONT_FAMILIES if name not in UNSEEN_FAMILIES)

NUMBER_LENGTHS = (0.08, 0.42, 0.34, 0.16)  # digits that belong to numbers of 1, 2, 3, 4 digits

_SIZE = 32  # pixels of a crop's side
_CANVAS, _HALF = 64, 0.8  # a glyph's field: 64 x 64 samples over +-0.8 digit heights
_CHUNK = 250


@functools.cache
def _glyph_fields(filename: str, characters: str) -> tuple[Tensor, Tensor, float]:
    """Signed distance fields of one face: K x 64 x 64, half widths K, and half stroke width.

    Lengths are in digit heights; the field is positive inside the ink. Every glyph is scaled to
    height 1 and centred on its ink, so that old-style figures come out even too.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / filename
    font = ImageFont.truetype(str(path), 200)
    side, height = 2 * _CANVAS, _CANVAS / _HALF  # draw at twice the field's resolution
    fields, half_widths, strokes = [], [], []
    for character in characters:
        left, top, right, bottom = font.getbbox(character)
        ink = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=font)
        ink = ink.crop(ink.getbbox())
        width = max(1, round(ink.width * height / ink.height))
        canvas = Image.new("L", (side, side), 0)
        corner = ((side - width) // 2, round((side - height) / 2))
        canvas.paste(ink.resize((width, round(height)), Image.Resampling.LANCZOS), corner)
        inside = np.asarray(canvas) > 127
        distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
        field = torch.from_numpy(distance / height).float()
        fields.append(F.avg_pool2d(field[None, None], 2)[0, 0])
        half_widths.append(width / 2 / height)
        edge = inside & (distance < 1.5)
        strokes.append(inside.sum() / edge.sum() / height)
    return torch.stack(fields), torch.tensor(half_widths), float(np.median(strokes))


def _uniform(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=rng)


def _normal(rng: torch.Generator, std: float, *shape: int) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=rng)


def _chance(rng: torch.Generator, probability: float, *shape: int) -> Tensor:
    """1.0 with the given probability, else 0.0."""
    return (torch.rand(shape, generator=rng) < probability).float()


def _smooth_noise(rng: torch.Generator, n: int, channels: int, cells: int) -> Tensor:
    """n x channels x 32 x 32 of smooth noise, about unit variance, with `cells` bumps a side."""
    coarse = _normal(rng, 1.0, n, channels, cells, cells)
    return F.interpolate(coarse, size=_SIZE, mode="bicubic", align_corners=False)


def _pixel_grid() -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, 1 x 32 x 32 each, in -1..1."""
    line = (torch.arange(_SIZE) + 0.5) * 2 / _SIZE - 1
    return line.view(1, 1, -1).expand(1, _SIZE, -1), line.view(1, -1, 1).expand(1, -1, _SIZE)


def _text_plane(rng: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pixel falls on the sign: u, v (n x 32 x 32) in digit heights; pixels a height."""
    x, y = _pixel_grid()
    size = _uniform(rng, 0.52, 0.94, n, 1, 1)
    depth = 1 + _normal(rng, 0.07, n, 1, 1) * x + _normal(rng, 0.05, n, 1, 1) * y
    x = x / depth - _normal(rng, 0.07, n, 1, 1)
    y = y / depth - _normal(rng, 0.06, n, 1, 1)
    turn = _normal(rng, 0.10, n, 1, 1)
    u = turn.cos() * x + turn.sin() * y
    v = turn.cos() * y - turn.sin() * x
    u = u + _normal(rng, 0.16, n, 1, 1) * v  # slant
    v = v + _normal(rng, 0.06, n, 1, 1) * u  # the baseline climbs
    u, v = u / (2 * size), v / (2 * size)
    wobble = _smooth_noise(rng, n, 2, 5) * _uniform(rng, 0.0, 0.035, n, 1, 1, 1)
    return u + wobble[:, 0], v + wobble[:, 1], size * _SIZE


def _choose_digits(
    rng: torch.Generator, labels: Tensor, lengths: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Glyphs in the five places around the target (n x 5) and which of them exist (n x 5)."""
    n = len(labels)
    share = torch.tensor(lengths, dtype=torch.float32)
    length = torch.multinomial(share, n, replacement=True, generator=rng) + 1
    position = (torch.rand(n, generator=rng) * length).long()
    place = position[:, None] + torch.arange(-2, 3)
    digits = torch.randint(0, 10, (n, 5), generator=rng)
    digits[:, 2] = labels
    digits[(digits == 1) & (torch.rand(n, 5, generator=rng) < 0.25)] = 10  # a bare stroke
    digits[(digits == 3) & (torch.rand(n, 5, generator=rng) < 0.15)] = 11  # a flat top
    return digits, (place >= 0) & (place < length[:, None])


def _choose_faces(
    rng: torch.Generator, n: int, families: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All glyph fields (faces x 12 x 64 x 64), half widths (faces x 12), stroke half widths
    (faces), and the face of each crop (n)."""
    faces = [(i, face) for i, name in enumerate(families) for face in FONT_FAMILIES[name]]
    fields, half_widths, strokes = zip(*(_glyph_fields(*face) for _, face in faces), strict=True)
    family_of = torch.tensor([i for i, _ in faces])
    share = 1.0 / torch.bincount(family_of)[family_of].float().sqrt()  # small families count too
    face = torch.multinomial(share, n, replacement=True, generator=rng)
    return torch.stack(fields), torch.stack(half_widths), torch.tensor(strokes), face


def _place_digits(
    rng: torch.Generator, half: Tensor, exists: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres of the five places (u and v, n x 5 each), the number's ends on u (n x 1 x 1 each)."""
    n = len(half)
    gap = _uniform(rng, -0.02, 0.2, n, 1) + 0.1 * _normal(rng, 1.0, n, 1).clamp(min=0)
    step = half[:, :-1] + half[:, 1:] + gap  # between neighbouring centres
    left, right = -step[:, 1:2], step[:, 2:3]
    centre = torch.cat(
        [left - step[:, :1], left, torch.zeros(n, 1), right, right + step[:, 3:]], dim=1
    )
    stairs = torch.arange(-2, 3) * _normal(rng, 0.15, n, 1) * _chance(rng, 0.1, n, 1)
    drop = _normal(rng, 0.02, n, 5) + stairs
    drop[:, 2] = 0
    low = torch.where(exists, centre - half, 9.0).amin(1).view(n, 1, 1)
    high = torch.where(exists, centre + half, -9.0).amax(1).view(n, 1, 1)
    return centre, drop, low, high


def _digit_field(
    rng: torch.Generator,
    labels: Tensor,
    families: Sequence[str],
    lengths: Sequence[float],
    u: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance to the ink (n x 32 x 32), and the number's ends on the u axis (n x 1 x 1)."""
    n = len(labels)
    fields, half_widths, strokes, face = _choose_faces(rng, n, families)
    digits, exists = _choose_digits(rng, labels, lengths)
    stretch = 0.85 * _normal(rng, 0.25, n, 1).exp().clamp(0.5, 1.5)
    half = half_widths[face[:, None], digits] * stretch
    centre, drop, low, high = _place_digits(rng, half, exists)

    # Few fonts, many shapes: the waist moves up or down, the head widens, the bowls fill out.
    waist = _uniform(rng, -0.35, 0.35, n, 1, 1)
    taper, bowl = _normal(rng, 0.10, n, 1, 1), _normal(rng, 0.25, n, 1, 1)
    field = torch.full((n, _SIZE, _SIZE), -1.0)
    for k in range(5):
        gu = (u - centre[:, k].view(n, 1, 1)) / stretch.view(n, 1, 1)
        gv = v - drop[:, k].view(n, 1, 1)
        inner = (0.25 - gv * gv).clamp(min=0)  # zero at the head and the foot
        gu = gu * (1 + taper * gv.clamp(-0.6, 0.6) + bowl * (inner - 0.125))
        grid = torch.stack([gu, gv + waist * inner], dim=-1) / _HALF
        glyph = fields[face, digits[:, k]].unsqueeze(1)
        one = F.grid_sample(glyph, grid, padding_mode="border", align_corners=False)[:, 0]
        one = one - (grid.abs().amax(-1) - 1).clamp(min=0)  # beyond the canvas: far from the ink
        field = torch.where(exists[:, k].view(n, 1, 1), torch.maximum(field, one), field)

    stroke = strokes[face].view(n, 1, 1)
    thinner, thicker = 0.25 * stroke, (0.105 - stroke).clamp(min=0.005, max=0.05)
    return field + _uniform(rng, 0, 1, n, 1, 1) * (thinner + thicker) - thinner, low, high


def _colours(rng: torch.Generator, n: int, luminance: Tensor) -> Tensor:
    """n x 3 x 1 x 1 colours of the given luminance (n): mostly dull, often blue or brown."""
    pick = torch.rand(n, generator=rng)
    any_hue = _uniform(rng, -np.pi, np.pi, n)
    hue = torch.where(pick < 0.45, -0.6 + 0.3 * any_hue / np.pi, any_hue)  # towards blue
    hue = torch.where(pick > 0.65, 2.4 + 0.35 * any_hue / np.pi, hue)  # towards brown
    vivid = torch.rand(n, generator=rng)
    chroma = 0.07 * vivid + 0.35 * (vivid - 0.75).clamp(min=0) * 2
    chroma = torch.where((pick > 0.45) & (pick < 0.65), chroma / 2, chroma)  # seldom pink or green
    cb, cr = chroma * hue.cos(), chroma * hue.sin()
    rgb = torch.stack(
        [luminance + 1.402 * cr, luminance - 0.344 * cb - 0.714 * cr, luminance + 1.772 * cb], 1
    )
    return rgb.clamp(0, 1).view(n, 3, 1, 1)


def _mix(below: Tensor, above: Tensor, cover: Tensor) -> Tensor:
    """Paint `above` over `below` (n x 3 x ...), with `cover` (n x 32 x 32) in 0..1."""
    return torch.lerp(below.expand(-1, -1, _SIZE, _SIZE), above, cover.unsqueeze(1))


def _shift(field: Tensor, du: Tensor, dv: Tensor) -> Tensor:
    """The field moved by (du, dv) in half images (n x 1 x 1 each)."""
    x, y = _pixel_grid()
    grid = torch.stack([x - du, y - dv], dim=-1)
    return F.grid_sample(field.unsqueeze(1), grid, padding_mode="border", align_corners=False)[:, 0]


def _paint(
    rng: torch.Generator, field: Tensor, low: Tensor, high: Tensor, u: Tensor, v: Tensor, px: Tensor
) -> tuple[Tensor, Tensor]:
    """Wall, plate, shadow, outline and digits (n x 3 x 32 x 32 in 0..1), and ink contrast (n)."""
    n = len(field)
    x, y = _pixel_grid()
    contrast = torch.exp(_uniform(rng, np.log(0.15), np.log(0.85), n))
    middle = _uniform(rng, 0.0, 1.0, n) * (1 - contrast) + contrast / 2
    sign = 1 - 2 * _chance(rng, 0.45, n)  # +: dark digits on light ground
    ground_level, ink_level = middle + sign * contrast / 2, middle - sign * contrast / 2
    ground, ink = _colours(rng, n, ground_level), _colours(rng, n, ink_level)
    wall = _colours(rng, n, 0.5 * torch.rand(n, generator=rng) + 0.5 * ground_level)

    # The plate's edge, sometimes with a frame: distance to a rectangle around the number.
    margin_u, margin_v = _uniform(rng, 0.08, 0.6, n, 1, 1), _uniform(rng, 0.08, 0.5, n, 1, 1)
    inset = torch.minimum(torch.minimum(u - low, high - u) + margin_u, 0.5 + margin_v - v.abs())
    inset = inset + 4.0 * (1 - _chance(rng, 0.4, n, 1, 1))  # most plates reach beyond the crop
    paint = _mix(wall, ground, (inset * px + 0.5).clamp(0, 1))
    frame_at, frame_width = _uniform(rng, 0.0, 0.08, n, 1, 1), _uniform(rng, 0.02, 0.06, n, 1, 1)
    frame = ((frame_width - (inset - frame_at).abs()) * px + 0.5).clamp(0, 1)
    paint = _mix(paint, ink, frame * _chance(rng, 0.4, n, 1, 1))

    grain = _smooth_noise(rng, n, 1, 4) * 0.12 + _smooth_noise(rng, n, 1, 11) * 0.06
    angle = _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    across = angle.cos() * x + angle.sin() * y
    wave = (across * _uniform(rng, 4, 22, n, 1, 1) + 2 * angle).sin() * 0.12
    wave = wave * _chance(rng, 0.2, n, 1, 1)
    texture = (grain[:, 0] + wave) * torch.rand(n, 1, 1, generator=rng) * contrast.view(n, 1, 1)
    paint = paint + texture.unsqueeze(1)

    # A shadow or the side of a raised digit: the same ink, shifted.
    reach, towards = _uniform(rng, 0.04, 0.22, n, 1, 1), _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    du, dv = reach * towards.cos(), reach * towards.sin()
    softness = _uniform(rng, 0.3, 1.0, n, 1, 1)
    shadow = torch.maximum(_shift(field, du, dv), _shift(field, du / 2, dv / 2))
    shadow = (shadow * px * softness + 0.5).clamp(0, 1) * _uniform(rng, 0.2, 0.9, n, 1, 1)
    shade = _colours(rng, n, (ground_level * _uniform(rng, 0.1, 0.8, n)).clamp(0, 1))
    paint = _mix(paint, shade, shadow * _chance(rng, 0.35, n, 1, 1))

    glint = (_shift(field, -du / 2, -dv / 2) * px + 0.5).clamp(0, 1) * _chance(rng, 0.15, n, 1, 1)
    lit = _colours(rng, n, 1 - (1 - ground_level) * _uniform(rng, 0.2, 0.9, n))
    paint = _mix(paint, lit, glint * _uniform(rng, 0.2, 0.9, n, 1, 1))

    ring = ((field + _uniform(rng, 0.02, 0.07, n, 1, 1)) * px + 0.5).clamp(0, 1)
    away = torch.where(torch.rand(n, generator=rng) < 0.5, ground_level, 1 - ink_level)
    rim = _colours(rng, n, (away + _normal(rng, 0.15, n)).clamp(0, 1))
    paint = _mix(paint, rim, ring * _chance(rng, 0.15, n, 1, 1))

    sheen = (v * _normal(rng, 0.25, n, 1, 1) + u * _normal(rng, 0.12, n, 1, 1)).unsqueeze(1)
    sheen = sheen * contrast.view(n, 1, 1, 1)
    wear = (1 + _smooth_noise(rng, n, 1, 6)[:, 0] * _uniform(rng, 0, 0.15, n, 1, 1)).clamp(0, 1)
    cover = (field * px + 0.5).clamp(0, 1) * wear
    return _mix(paint, ink + sheen, cover), contrast


def _light(rng: torch.Generator, image: Tensor, contrast: Tensor) -> Tensor:
    """Uneven light: a slope, a cast shadow with an edge, a vignette; weaker on faint digits."""
    n, amount = len(image), contrast.view(-1, 1, 1)
    x, y = _pixel_grid()
    slope = (_normal(rng, 0.25, n, 1, 1) * x + _normal(rng, 0.25, n, 1, 1) * y) * amount
    angle = _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    side = angle.cos() * x + angle.sin() * y - _uniform(rng, -0.9, 0.9, n, 1, 1)
    edge = (side * _uniform(rng, 1, 10, n, 1, 1) + 0.5).clamp(0, 1)
    cast = edge * _uniform(rng, 0.2, 0.7, n, 1, 1) * amount * _chance(rng, 0.15, n, 1, 1)
    vignette = (x * x + y * y) * _uniform(rng, 0, 0.25, n, 1, 1) * amount
    return image * ((1 + slope) * (1 - cast) * (1 - vignette)).unsqueeze(1)


def _kernel_rows(weight: Tensor) -> Tensor:
    """Each row scaled to sum 1: a resampling matrix."""
    return weight / weight.sum(-1, keepdim=True)


def _dct_matrix() -> Tensor:
    """Orthonormal 8-point DCT-II in each of the four 8-pixel blocks: 32 x 32."""
    k, t = torch.arange(8.0).view(-1, 1), torch.arange(8.0).view(1, -1)
    block = torch.cos(np.pi * (2 * t + 1) * k / 16) / 2
    block[0] /= 2**0.5
    return torch.block_diag(*[block] * (_SIZE // 8))


def _camera(rng: torch.Generator, image: Tensor, px: Tensor, contrast: Tensor) -> Tensor:
    """Blur, few source pixels, sensor noise, JPEG blocks, enlargement, sharpening.

    Every linear step along one axis is a 32 x 32 matrix, one for each crop, so the whole batch
    is a few matrix products. A crop of r < 32 source pixels lives in rows and columns 0..r-1.
    """
    n, amount = len(image), contrast.view(-1, 1, 1, 1)
    i = torch.arange(_SIZE, dtype=torch.float32)
    digit_height = torch.exp(_uniform(rng, np.log(9.5), np.log(36), n, 1, 1))  # in source pixels
    source = (_SIZE * digit_height / px).clamp(max=_SIZE)
    scale = _SIZE / source
    inside = torch.minimum(i.view(1, -1, 1), (source - 1).ceil())  # rows beyond r repeat the last
    offset = i.view(1, 1, -1) - ((inside + 0.5) * scale - 0.5)
    blur = _uniform(rng, 0.004, 0.055, n, 1, 1) * px
    smear = torch.exp(_normal(rng, 0.25, n, 1, 1))  # blurs differ along the two axes

    def shrink(sigma: Tensor) -> Tensor:
        width = (sigma**2 + (0.35 * scale) ** 2).sqrt()
        return _kernel_rows(torch.exp(-0.5 * (offset / width) ** 2))

    rows, columns = shrink(blur * smear), shrink(blur / smear)

    def both_axes(left: Tensor, picture: Tensor, right: Tensor) -> Tensor:
        """left @ picture @ right for pictures kept as n x rows x 3 x columns: no copies."""
        tall = (left @ picture.reshape(n, _SIZE, 3 * _SIZE)).view(n, 3 * _SIZE, _SIZE)
        return (tall @ right).view(n, _SIZE, 3, _SIZE)

    image = both_axes(rows, image.permute(0, 2, 1, 3), columns.mT)
    image = (
        image + _normal(rng, 1.0, n, _SIZE, 1, _SIZE) * _uniform(rng, 0, 0.05, n, 1, 1, 1) * amount
    )
    image = (
        image + _normal(rng, 1.0, n, _SIZE, 3, _SIZE) * _uniform(rng, 0, 0.04, n, 1, 1, 1) * amount
    )

    to_ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    dct = _dct_matrix()
    order = torch.arange(_SIZE) % 8
    steps = 1 + 0.6 * (order.view(-1, 1, 1) + order)
    strength = torch.exp(_uniform(rng, np.log(0.01), np.log(0.1), n, 1, 1, 1)) * amount
    table = strength * steps * torch.tensor([1.0, 1.8, 1.8]).view(1, 1, 3, 1)
    coded = both_axes(dct.expand(n, -1, -1), to_ycc @ image, dct.mT)
    coded = (coded / table).round_().mul_(table)
    image = torch.linalg.inv(to_ycc) @ both_axes(dct.mT.expand(n, -1, -1), coded, dct)

    # Enlargement by Keys' cubic kernel, which also gives the halos of a sharpened photograph.
    distance = (i.view(1, 1, -1) - ((i.view(1, -1, 1) + 0.5) / scale - 0.5)).abs()
    a = -_uniform(rng, 0.0, 0.9, n, 1, 1)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    enlarge = _kernel_rows(torch.where(i.view(1, 1, -1) < source.ceil(), cubic, 0.0))
    return both_axes(enlarge, image, enlarge.mT).permute(0, 2, 1, 3).contiguous()


def _render_chunk(
    rng: torch.Generator, n: int, families: Sequence[str], lengths: Sequence[float]
) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 10, (n,), generator=rng)
    u, v, px = _text_plane(rng, n)
    field, low, high = _digit_field(rng, labels, families, lengths, u, v)
    image, contrast = _paint(rng, field, low, high, u, v, px)
    image = _camera(rng, _light(rng, image, contrast), px, contrast)
    return (image * 255).round().clamp(0, 255).to(torch.uint8), labels


def render_street_numbers(
    count: int,
    seed: int,
    families: Sequence[str] = SEEN_FAMILIES,
    lengths: Sequence[float] = NUMBER_LENGTHS,
) -> tuple[Tensor, Tensor]:
    """Rendered crops of house numbers in SVHN's cropped-digit format.

    Returns `count` x 3 x 32 x 32 uint8 images and int64 labels 0..9, drawn uniformly. The label is
    the digit in the middle; its neighbours are cut off by the crop. `lengths`: how often the digit
    belongs to a number of 1, 2, 3, 4 digits; (1.0,) gives digits without neighbours. Same seed,
    same bytes, whatever the number of threads: the work is done in one. Torch's own random state
    is left alone. About 0.65 s a thousand crops.

    Raises ValueError for a count below 1, no family, a family not in FONT_FAMILIES, or lengths
    that are not one to four shares of at least 0, one of them above.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    unknown = [name for name in families if name not in FONT_FAMILIES]
    if isinstance(families, str) or not families or unknown:
        valid = ", ".join(FONT_FAMILIES)
        raise ValueError(f"families must be a sequence of some of: {valid}; got {families!r}")
    shares = torch.tensor(lengths, dtype=torch.float32)  # as the draw will see them
    if not 1 <= len(lengths) <= 4 or min(lengths) < 0 or not 0 < shares.sum() < math.inf:
        raise ValueError(f"lengths must be one to four shares, not all zero; got {lengths!r}")
    rng = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
        images, labels = zip(
            *(_render_chunk(rng, n, families, lengths) for n in sizes), strict=True
        )
    finally:
        torch.set_num_threads(threads)
    return torch.cat(images), torch.cat(labels)


# ======================================================================================
# Batches and augmentation
# ======================================================================================


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1: mean 0.5 and standard deviation 0.5, as the starter has it.

    Raises ValueError for anything but uint8: other numbers may lie in another range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8; got {images.dtype}.")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def random_affine(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 10.0,
    shift: float = 0.1,
    zoom: float = 0.1,
    shear: float = 0.1,
) -> Tensor:
    """Rotate, shift, zoom and shear each picture of a batch by amounts of its own.

    images: float, N x C x H x W. `shift` is a share of the width; `zoom` and `shear` are shares
    of one. Borders repeat, so a street crop gets no black edge and MNIST stays black outside.
    Raises ValueError for pictures of another form, and for a bound below 0 or (zoom) not below 1.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be float, N x C x H x W; got {images.dtype}, {tuple(images.shape)}."
        )
    bounds = {"degrees": degrees, "shift": shift, "zoom": zoom, "shear": shear}
    for name, bound in bounds.items():
        most = 1.0 if name == "zoom" else math.inf
        if not 0 <= bound < most:
            raise ValueError(f"{name} must be at least 0 and below {most:g}; got {bound}.")
    count = len(images)

    def uniform(bound: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * bound

    angle, slant = uniform(math.radians(degrees)), uniform(shear)
    wide, tall = 1 + uniform(zoom), 1 + uniform(zoom)
    theta = torch.empty(count, 2, 3)
    theta[:, 0, 0] = wide * torch.cos(angle)
    theta[:, 0, 1] = wide * (slant * torch.cos(angle) - torch.sin(angle))
    theta[:, 1, 0] = tall * torch.sin(angle)
    theta[:, 1, 1] = tall * (slant * torch.sin(angle) + torch.cos(angle))
    theta[:, :, 2] = torch.stack([uniform(2 * shift), uniform(2 * shift)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_erase(images: Tensor, generator: torch.Generator, size: int = 8) -> Tensor:
    """Paint a square of each picture, at a place of its own, in that picture's mean.

    images: float, N x C x H x W. Squares near a border are cut off by it. Source: Zhong et al.
    2020, *Random Erasing Data Augmentation*. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}.")
    count, _, height, width = images.shape
    inside = []
    for side in (height, width):
        centre = torch.randint(0, side, (count, 1), generator=generator)
        inside.append((torch.arange(side) - centre).add(size // 2))
    down, right = ((offset >= 0) & (offset < size) for offset in inside)
    square = (down[:, None, :, None] & right[:, None, None, :]).to(images.device)
    return torch.where(square, images.mean((1, 2, 3), keepdim=True), images)


def random_negative(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn every other picture, by chance, into its negative: float images in -1..1 change sign."""
    sign = 1 - 2 * torch.randint(0, 2, (len(images), 1, 1, 1), generator=generator)
    return images * sign.to(images)


class Loader:
    """Shuffled mini-batches of one split, cut from tensors by index.

    Iterating one epoch yields (float images in -1..1, int64 labels) on `device`; the last, smaller
    batch is kept. Epoch e of a seed is always the same batches, so a resumed run sees what an
    uninterrupted one would. Raises ValueError when batch_size is below 1.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.split, self.batch_size, self.seed, self.augment = split, batch_size, seed, augment
        self.device = device or default_device()

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The pictures at `index`, as floats, augmented."""
        images = to_float(self.split.images[index].to(self.device))
        if self.augment:
            images = self.augment(images, generator)
        return images, self.split.labels[index].to(self.device)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one pass over the split, in the order that belongs to this epoch."""
        generator = epoch_generator(self.seed, number)
        order = torch.randperm(len(self.split), generator=generator)
        for index in order.split(self.batch_size):
            yield self.batch(index, generator)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A random stream of its own for each (seed, epoch)."""
    mixed = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


# ======================================================================================
# Training: one loop for every model of the notebook
# ======================================================================================

ENGINE_VERSION = 1


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite. The last good epoch's checkpoint is kept."""


@dataclass
class History:
    """What a run measured: one dict a epoch ('epoch', 'seconds', train means, evaluations)."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One quantity over the epochs."""
        return [row[name] for row in self.rows]

    def of_task(self, name: str) -> History:
        """The figures of one task of a multi-task run: 'test_acc_street' becomes 'test_acc'."""
        if not any(key.endswith(f"_{name}") for row in self.rows for key in row):
            raise ValueError(f"name must be a task of this run; nothing is recorded of {name!r}.")
        keep = {"epoch": "epoch", "seconds": "seconds"}
        for key in self.rows[0]:
            if key.endswith(f"_{name}"):
                keep[key] = key.removesuffix(f"_{name}")
        return History([{keep[k]: v for k, v in row.items() if k in keep} for row in self.rows])

    @property
    def last(self) -> dict[str, float]:
        """The figures of the final epoch: the ones to report, never the best of all epochs."""
        return self.rows[-1]

    @property
    def seconds(self) -> float:
        """Time of all epochs, those of an interrupted run included."""
        return sum(self.column("seconds"))


def seed_everything(seed: int) -> None:
    """Seed torch and NumPy, and ask cuDNN for repeatable kernels."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    torch.backends.cudnn.deterministic = True


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable],
    loss_fn: Callable[[nn.Module, object], tuple[Tensor, dict[str, Tensor]]],
    *,
    epochs: int,
    steps_per_epoch: int,
    run: str,
    lr: float = 1e-3,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    seed: int = 0,
    settings: dict | None = None,
) -> History:
    """Train the parameters of `model` that require gradients, with Adam; resume where it stopped.

    batches(epoch) yields the batches of one epoch, always the same ones; loss_fn(model, batch)
    gives the loss and scalar figures to average over the epoch; evaluate(model) gives figures
    after each epoch.
    schedule: 'constant', or 'onecycle' (Smith and Topin 2018) with `lr` as its peak.
    weight_decay: decoupled from the gradient (AdamW); 0 is plain Adam.

    Every epoch ends with a checkpoint under A3_RUNS, named after `run` and a fingerprint of the
    recipe, `settings`, the first batch (and with it the augmentation), the code of `loss_fn`, the
    model's text and its first weights, so that a changed setting never finds another run's
    checkpoint. `settings` should hold whatever else decides the numbers, such as the fingerprint
    of all the data. A finished run is not trained again.
    Raises ValueError for bad arguments, or an epoch that has not `steps_per_epoch` batches, and
    TrainingDiverged when the loss is not finite.
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"epochs and steps_per_epoch must be at least 1; got {epochs}, {steps_per_epoch}."
        )
    if schedule not in ("constant", "onecycle"):
        raise ValueError(f"schedule must be 'constant' or 'onecycle'; got {schedule!r}.")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0 and finite; got {lr}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0 and finite; got {weight_decay}.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model has no parameter that requires a gradient; nothing to train.")
    device = trained[0].device
    dtype = precision_policy(device)
    recipe = [epochs, steps_per_epoch, lr, schedule, weight_decay, seed, str(dtype), device.type]
    made_by = [settings, next(iter(batches(0)), None), code_of(loss_fn), repr(model)]
    key = fingerprint(ENGINE_VERSION, recipe, *made_by, model.state_dict())
    path = runs_folder() / f"{run}-{key}.pt"

    # channels_last keeps a pixel's channels together: faster convolutions, same numbers.
    model.to(memory_format=torch.channels_last)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=fused)
    scheduler = None
    if schedule == "onecycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=lr, total_steps=epochs * steps_per_epoch
        )
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    history = _resume(path, parts)

    with Progress(run, epochs, steps_per_epoch, len(history.rows)) as progress:
        for epoch in range(len(history.rows), epochs):
            started = time.perf_counter()
            # Dropout draws from the global stream; seeding it here makes resuming exact.
            seed_everything(epoch_generator(seed, epoch).initial_seed() % 2**63)
            totals: dict[str, Tensor | float] = {}
            model.train()
            steps = 0
            for steps, batch in enumerate(batches(epoch), start=1):
                if steps > steps_per_epoch:
                    break
                with autocast(device, dtype):
                    loss, figures = loss_fn(model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"{run}: the loss became {value} in epoch {epoch + 1}. Use a smaller "
                        f"learning rate than {lr:g}, or A3_PRECISION=fp32. "
                        f"{len(history.rows)} finished epochs are kept in {path.name}."
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if scheduler:
                    scheduler.step()
                for name, figure in {"loss": value, **figures}.items():
                    totals[name] = totals.get(name, 0.0) + figure
                progress.step()
            if steps != steps_per_epoch:
                more = "more than " if steps > steps_per_epoch else f"{steps}, not "
                raise ValueError(
                    f"batches must give steps_per_epoch batches; epoch {epoch + 1} of {run} has "
                    f"{more}{steps_per_epoch}."
                )
            row = {f"train_{name}": float(v) / steps_per_epoch for name, v in totals.items()}
            if evaluate:
                row.update(evaluate(model))
            seconds = time.perf_counter() - started
            history.rows.append({"epoch": epoch + 1, "seconds": seconds, **row})
            _save_checkpoint(path, parts, history)
            progress.epoch(history.last)
    model.eval()
    return history


def code_of(function: Callable) -> list[str]:
    """The compiled code of a Python function and of those it calls in its own module, as text.

    Comments and line numbers do not count. What a closure or a partial carries does not either:
    that belongs in the settings.
    """
    found: dict[str, str] = {}

    def constant(value: object) -> str:
        # The order of a set differs from process to process.
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    def visit(function: object) -> None:
        function = getattr(function, "func", function)  # of a partial
        function = getattr(function, "__func__", function)  # of a method
        if not isinstance(function, types.FunctionType) or function.__qualname__ in found:
            return
        codes, names, text = [function.__code__], set(), []
        while codes:
            code = codes.pop()
            inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
            codes += inner
            text += [code.co_code.hex(), *code.co_names]
            text += [constant(c) for c in code.co_consts if c not in inner]
            names |= set(code.co_names)
        found[function.__qualname__] = "|".join(text)
        for name in sorted(names):
            visit(function.__globals__.get(name))

    visit(function)
    return [f"{name}: {text}" for name, text in sorted(found.items())]


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision for `dtype`, or nothing at all for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _save_checkpoint(path: Path, parts: dict, history: History) -> None:
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    state["rows"] = history.rows
    try:
        write_atomically(path, lambda target: torch.save(state, target))
    except OSError as error:
        notice(f"No checkpoint of epoch {len(history.rows)} ({error}); training goes on without.")


def _resume(path: Path, parts: dict) -> History:
    """Load the checkpoint into `parts`; a damaged one is set aside and training starts afresh."""
    if not path.exists():
        return History()
    # Loading may fail half way: keep what was there, so that 'afresh' means the same start.
    first = {name: _copy(part.state_dict()) for name, part in parts.items() if part is not None}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in first:
            parts[name].load_state_dict(state[name])
        return History(list(state["rows"]))
    except Exception as error:
        for name, saved in first.items():
            parts[name].load_state_dict(saved)
        aside = path.with_suffix(".bad")
        os.replace(path, aside)
        notice(f"Checkpoint {path.name} cannot be used ({type(error).__name__}); it is now "
               f"{aside.name}, and training starts again.")  # fmt: skip
        return History()


def _copy(state: object) -> object:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return type(state)((k, _copy(v)) for k, v in state.items())
    return [_copy(v) for v in state] if isinstance(state, list) else state


class _DisplayLine:
    """A file for tqdm that rewrites one line of a notebook's output, and keeps stderr clean."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": "..."}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.show(text)

    def show(self, text: str) -> None:
        """Replace the line; an empty text leaves nothing to read."""
        self.handle.update({"text/plain": text}, raw=True)

    def flush(self) -> None:
        """Nothing to do: each write is shown at once."""


class Progress:
    """A tqdm bar over the steps of a run, gone when the run is done.

    In a notebook it is one line that is rewritten; in a terminal, tqdm's bar. The file named by
    A3_PROGRESS, when set, receives a line an epoch: `make` shows it while the notebook runs.
    """

    def __init__(self, run: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        from IPython import get_ipython

        self.run, self.epochs, self.log = run, epochs, os.environ.get("A3_PROGRESS")
        self.line = _DisplayLine() if hasattr(get_ipython(), "kernel") else None
        total = epochs * steps_per_epoch
        self.bar = tqdm(
            total=total, initial=done * steps_per_epoch, desc=run, unit="step", ncols=88,
            file=self.line or sys.stderr, mininterval=1.0, leave=False, disable=None,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def step(self) -> None:
        """One more step."""
        self.bar.update()

    def epoch(self, row: dict[str, float]) -> None:
        """One more epoch, with its figures."""
        shown = {k: v for k, v in row.items() if k not in ("epoch", "seconds")}
        figures = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.bar.set_postfix_str(figures, refresh=False)
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{self.run}: epoch {row['epoch']}/{self.epochs}, {figures}\n")

    def __exit__(self, kind: object, *_: object) -> None:
        self.bar.close()
        if self.line and kind is None:
            self.line.show("")


# ======================================================================================
# Evaluation
# ======================================================================================


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], split: Split, batch_size: int = 512) -> Tensor:
    """Outputs of `model` for every picture of `split`, in order, float32 on the CPU.

    A module is put into eval mode for the time of the call and back as it was after. Raises
    ValueError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    device = default_device()
    module = model if isinstance(model, nn.Module) else None
    training = module.training if module else False
    if module:
        device = next(module.parameters()).device
        module.eval()
    outputs = []
    with autocast(device, precision_policy(device)):
        for chunk in split.images.split(batch_size):
            images = to_float(chunk.to(device)).contiguous(memory_format=torch.channels_last)
            outputs.append(model(images).float().cpu())
    if module:
        module.train(training)
    return torch.cat(outputs)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is at the label, in percent."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            "logits must be N x classes and labels N, and not none; "
            f"got {tuple(logits.shape)}, {tuple(labels.shape)}."
        )
    if not logits.isfinite().all():
        raise ValueError("logits must be finite; they hold NaN or infinity (a diverged model?).")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be 0 to {logits.shape[1] - 1}; "
            f"got {int(labels.min())} to {int(labels.max())}."
        )
    return 100.0 * (logits.argmax(1).cpu() == labels.cpu()).double().mean().item()


def mean_and_std(values: Sequence[float]) -> dict[str, object]:
    """Mean, sample standard deviation and the values: the form results.json uses for seeds."""
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must hold at least one number, all finite; got {list(values)}.")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "per_seed": [float(v) for v in values]}


# ======================================================================================
# Figures and tables
# ======================================================================================


def save_figure(figure: plt.Figure, name: str) -> None:
    """Save a figure as NAME.png in the folder of figures and show it in the notebook, once."""
    path = figures_folder() / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": ""})
    plt.show()
    plt.close(figure)


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table as Markdown: a real table in Colab, on GitHub and in the PDF."""
    from IPython.display import Markdown, display

    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def start_figures() -> None:
    """The look of every figure of the notebook."""
    plt.rcParams.update(
        {"figure.dpi": 100, "font.size": 9, "axes.titlesize": 10, "image.cmap": "gray"}
    )


def plot_curves(histories: dict[str, History], *, title: str, name: str) -> None:
    """Loss and error over the epochs: training dashed, test solid, a marker for each run.

    Error is 100 % minus accuracy, on a log axis: there 99.2 and 99.6 % lie well apart.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.7), layout="constrained")
    for number, (label, history) in enumerate(histories.items()):
        look = {"marker": "osv^"[number % 4], "markersize": 3.5, "color": f"C{number}"}
        for part, style in [("train", "--"), ("test", "-")]:
            if f"{part}_acc" not in history.last:
                continue
            epochs, shown = history.column("epoch"), f"{label}, {part}"
            error = [max(100 - accuracy, 0.01) for accuracy in history.column(f"{part}_acc")]
            axes[0].plot(epochs, history.column(f"{part}_loss"), style, label=shown, **look)
            axes[1].plot(epochs, error, style, label=shown, **look)
    axes[0].set(ylabel="cross-entropy (nats)")
    axes[1].set(ylabel="error = 100 − accuracy (%)")
    for axis in axes:
        axis.set(xlabel="epoch", yscale="log")
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    # Beside the lines, not on top of them.
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save_figure(figure, name)


def write_results(results: dict) -> None:
    """Write results.json into the folder of figures.

    Raises ValueError when a number in it is not finite.
    """
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomically(figures_folder() / "results.json", lambda path: path.write_text(text + "\n"))


def summary(results: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Question 1 in one table: the header with the data sets' names, and one row a question."""
    roles = ("handwritten", "street")

    def percent(part: dict, key: str = "test_acc") -> list[str]:
        return [f"{part[role][key]:.2f} %" for role in roles]

    def spread(part: dict) -> list[str]:
        return [f"{part[role]['mean']:.2f} ± {part[role]['std']:.2f} %" for role in roles]

    single, joint = results["single_task"], results["joint_embedding"]
    few = next(key for key in results if key.startswith("single_task_"))
    size = few.removeprefix("single_task_")
    rows = [
        ("(b) single task, suggested settings", *percent(single, "suggested_test_acc")),
        ("(b) single task, our recipe", *percent(single)),
        ("(c) multi-task, our recipe", *percent(results["multi_task"])),
        (f"(d) {size} samples each, single task", *spread(results[few])),
        (f"(d) {size} samples each, multi-task", *spread(results[f"multi_task_{size}"])),
        ("(e) joint embedding, top-1 (as query)", f"{joint['top1_all']:.2f} %",
         f"{joint['reverse_top1']:.2f} %"),
    ]  # fmt: skip
    return ("test accuracy", *(results["data"][role]["name"] for role in roles)), rows


def results_rows(results: dict) -> list[tuple[str, str]]:
    """The figures of `results`, one row each, named in words; lists are left to the file."""
    rows: list[tuple[str, str]] = []

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}, {key}" if name else key, inner)
        elif not isinstance(value, list):
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            rows.append((name.replace("_", " "), shown))

    walk("", results)
    return rows


# ======================================================================================
# BigGAN: fetching and loading (Question 3)
# ======================================================================================
# The library's own from_pretrained loads with strict=False, so that a wrong file loads in
# silence, and asks the network even for a cached file. We build its model class ourselves.

BIGGAN_BUCKET = "https://s3.amazonaws.com/models.huggingface.co/biggan"
BIGGAN_HUB_128 = "https://huggingface.co/osanseviero/BigGAN-deep-128"
BIGGAN_LIBRARY = "pytorch-pretrained-biggan==0.1.1"
# (double the size?, channels in, channels out), in units of 128 channels
_DEEP_128 = [(False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8), (False, 8, 8)]
_DEEP_128 += [(True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1)]
_DEEP_256 = [*_DEEP_128[:5], (True, 8, 8), (False, 8, 8), *_DEEP_128[5:]]
BIGGAN_DEEP: dict[str, dict] = {
    "biggan-deep-256": {
        "config": {"output_dim": 256, "layers": _DEEP_256, "attention_layer_position": 8},
        "urls": [f"{BIGGAN_BUCKET}/biggan-deep-256-pytorch_model.bin"],
        "checksum": "sha256:5900ef4065047e3aa0d1b66197b7f2664dceb59b27080e414ad57e203c485bc5",
        "size": 234_411_737,
    },
    "biggan-deep-128": {
        "config": {"output_dim": 128, "layers": _DEEP_128, "attention_layer_position": 8},
        "urls": [
            f"{BIGGAN_HUB_128}/resolve/main/pytorch_model.bin",
            f"{BIGGAN_BUCKET}/biggan-deep-128-pytorch_model.bin",
        ],
        # The hub stores the checksum and size of a large file in a small text file of git-lfs.
        "pointer": f"{BIGGAN_HUB_128}/raw/main/pytorch_model.bin",
    },
}

WEIGHTS = Path("weights")
DIGIT_Z = 16  # numbers in the digit model's noise vector
DIGIT_CLASSES = [f"{kind} {digit}" for kind in ("street", "handwritten") for digit in range(10)]
_DIGIT_LAYERS = [(True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)]  # of 16 channels


@dataclass(frozen=True)
class BigGANModel:
    """A generator in eval mode and what one must know to use it.

    `model(z, c, truncation)` takes noise N x z_dim, class weights N x len(classes) and a
    truncation in (0, 1]; it gives pictures N x 3 x size x size in -1..1.
    """

    model: nn.Module
    name: str
    title: str  # for figures: whose weights these are
    classes: list[str]
    z_dim: int
    size: int


def imagenet_classes() -> list[str]:
    """The 1,000 ImageNet class names in index order, from torchvision; no network, no WordNet."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def require_biggan_library() -> None:
    """Makes sure pytorch-pretrained-biggan can be imported; installs it with pip if it is not.

    Raises ImportError that says what to do when it cannot be installed.
    """
    try:
        import pytorch_pretrained_biggan  # noqa: F401
    except ImportError:
        command = [sys.executable, "-m", "pip", "install", "-q", BIGGAN_LIBRARY]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ImportError(
                f"the library {BIGGAN_LIBRARY} is missing and pip could not install it; "
                f"with a network, run: pip install {BIGGAN_LIBRARY}"
            ) from None


def digit_biggan_config():
    """The library's configuration of our digit model: 4 x 4 -> 8 -> 16 -> 32, width 16."""
    from pytorch_pretrained_biggan import BigGANConfig

    return BigGANConfig(
        output_dim=32,
        z_dim=DIGIT_Z,
        class_embed_dim=DIGIT_Z,
        channel_width=16,
        num_classes=len(DIGIT_CLASSES),
        layers=_DIGIT_LAYERS,
        attention_layer_position=2,
    )


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads a state dict into `model`, key for key and shape for shape, and returns it in eval.

    Stored fp16 numbers become the model's own type. Raises FileNotFoundError; ValueError for a
    damaged file, or one that does not fit: it names the first missing, unknown and misshapen
    entries.
    """
    state = verified_torch_load(path)
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [k for k in own if k in state and own[k].shape != state[k].shape],
    }
    if any(faults.values()):
        found = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in faults.items()
            if keys
        )
        raise ValueError(f"{path} does not fit the model. Entries: {found}")
    model.load_state_dict(state)
    return model.eval()


def save_half(model: nn.Module, path: str | Path) -> None:
    """Saves a model's state dict for `load_weights`, its floating point numbers as fp16."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    write_atomically(Path(path), lambda target: torch.save(half, target))


def _sum_and_size(spec: dict) -> tuple[str, int]:
    """Checksum and size of a model's file: known to us, or from its git-lfs pointer on the hub."""
    if "pointer" not in spec:
        return spec["checksum"], spec["size"]
    try:
        text = b"".join(_url_chunks(spec["pointer"], 10.0))[:1000].decode(errors="replace")
    except _TryFailed as problem:
        message = f"We could not get the file's checksum at {spec['pointer']}:\n  {problem}"
        raise DownloadError(message) from problem
    match = re.search(r"oid sha256:([0-9a-f]{64})\s+size (\d+)", text)
    if not match:
        raise DownloadError(f"{spec['pointer']} holds no checksum of the file we want")
    return f"sha256:{match[1]}", int(match[2])


def load_biggan_deep(name: str = "biggan-deep-256", device: str | torch.device = "cpu"):
    """DeepMind's BigGAN-deep on ImageNet (Brock et al. 2019), as a `BigGANModel` on `device`.

    The file (210 to 235 MB) is kept in the runs folder and verified each time.
    Raises ValueError for an unknown name or a file that does not fit the model,
    `DownloadError` if the file cannot be had, ImportError without the library.
    """
    if name not in BIGGAN_DEEP:
        raise ValueError(f"name must be one of {', '.join(BIGGAN_DEEP)}; got {name!r}")
    require_biggan_library()
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    spec = BIGGAN_DEEP[name]
    checksum, size = _sum_and_size(spec)
    path = download(spec["urls"], runs_folder() / f"{name}.bin", checksum, size=size, timeout=20)
    config = BigGANConfig(**spec["config"])
    model = load_weights(BigGAN(config), path).to(device).requires_grad_(False)
    side = config.output_dim
    title = f"BigGAN-deep {side} x {side}, ImageNet (DeepMind's weights)"
    return BigGANModel(model, name, title, imagenet_classes(), config.z_dim, side)


def load_digit_biggan(folder: str | Path | None = None, device: str | torch.device = "cpu"):
    """The digit BigGAN of weights/biggan_digits.py, as a `BigGANModel` on `device`.

    Raises FileNotFoundError when the weights are not in `folder` (None: WEIGHTS).
    """
    require_biggan_library()
    from pytorch_pretrained_biggan import BigGAN

    model = load_weights(
        BigGAN(digit_biggan_config()), Path(folder or WEIGHTS) / "biggan_digits.pt"
    )
    model = model.to(device).requires_grad_(False)
    title = "digit BigGAN 32 x 32 (trained in this project)"
    return BigGANModel(model, "biggan-digits-32", title, DIGIT_CLASSES, DIGIT_Z, 32)


def _little_memory() -> bool:
    """True on a Linux machine with less than 4 GB of memory to spare."""
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return False
    return available is not None and int(available[1]) < 4_000_000


def find_biggan(wanted: str = "auto", device: str | torch.device = "cpu") -> BigGANModel | None:
    """The BigGAN to draw with: the one named, or with 'auto' the best to be had here.

    'auto' is biggan-deep-256 (128 on a CPU with little memory) where it can be downloaded, else
    the digit model; the profile `tiny` and A3_DATA=embedded ask no network. None, with a notice,
    where not even the digit model's weights are at hand. A model asked for by name is never
    replaced by another: then the errors of the loaders come through.
    """
    if wanted not in ("auto", "digits", *BIGGAN_DEEP):
        valid = ", ".join(["auto", "digits", *BIGGAN_DEEP])
        raise ValueError(f"wanted must be one of {valid}; got {wanted!r}")
    if wanted == "digits":
        return load_digit_biggan(device=device)
    if wanted != "auto":
        return load_biggan_deep(wanted, device)
    why = ""
    if profile() == "full" and switch("A3_DATA") != "embedded":
        small = torch.device(device).type == "cpu" and _little_memory()
        try:
            return load_biggan_deep("biggan-deep-128" if small else "biggan-deep-256", device)
        except (DownloadError, ImportError) as error:
            why = "\nWhy: " + str(error).split("What to do")[0].strip()
    try:
        gan = load_digit_biggan(device=device)
    except (FileNotFoundError, ImportError) as error:
        notice(
            "Question 3 has no generator here and shows no pictures. It needs a network (for "
            "BigGAN-deep)\nor the file weights/biggan_digits.pt of this project's repository, "
            f"in a folder weights/ beside the notebook.\nWhy: {error}{why}"
        )
        return None
    if why:
        notice(f"BigGAN-deep cannot be had here; using our {gan.title}.{why}")
    return gan


class DigitJudge(nn.Module):
    """A small classifier of 32 x 32 colour digits in the digit BigGAN's 20 classes.

    Trained by weights/biggan_digits.py on real pictures alone. Input N x 3 x 32 x 32 in -1..1,
    output N x 20 logits; `features` gives the 64 numbers before the last layer.
    """

    def __init__(self, classes: int = 20) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        self.features = nn.Sequential(
            *block(3, 24), *block(24, 48), *block(48, 96), nn.Flatten(), nn.Linear(96 * 16, 64)
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.features(x)))


def load_judge(folder: str | Path | None = None, device: str | torch.device = "cpu") -> DigitJudge:
    """The judge of the digit BigGAN; raises FileNotFoundError when its weights are missing."""
    judge = load_weights(DigitJudge(), Path(folder or WEIGHTS) / "judge_digits.pt")
    return judge.to(device).requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features (N x D and M x D), each taken as a Gaussian.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, equation (6), in
    float64; the last trace from the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric.
    Raises ValueError for fewer than two rows, different widths, or numbers that are not finite.
    """
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] >= 1
    if not fits or min(len(a), len(b)) < 2:
        raise ValueError(
            "a and b must be N x D and M x D with N and M at least 2, D at least 1; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a and b must be finite; they hold NaN or infinity.")
    a, b = a.double(), b.double()
    cov_a, cov_b = (x.T.cov().reshape(x.shape[1], -1) for x in (a, b))  # a matrix for D = 1 too
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


# =====================================================================================
# PDF export: notebook -> pandoc -> typst -> PDF (no LaTeX, no network)
#
#   in the notebook    utils.export_pdf(Path("assignment3.ipynb"))
#   in a shell         jupyter nbconvert --to utils.TypstPDFExporter FILE.ipynb
#
# Cell tags: `hide-pdf` leaves a cell out; `submission` marks the settings cell the title block
# is read from; `pdf-appendix` moves a cell's code, not its outputs, to an appendix (for the code
# of figures); `helper-module` marks the copy of this file, which becomes the last appendix.
# =====================================================================================

SUBMISSION_DEFAULTS = {
    "course": "COMP 499/691 · Special Topics: Deep Learning",
    "assignment": "Assignment 3",
    "name": "",
    "student_number": "",
    "discussed_with": "",
}
_PDF_WHEELS = {"nbformat": "nbformat", "nbconvert": "nbconvert", "PIL.Image": "pillow",
               "pypandoc": "pypandoc_binary", "typst": "typst"}  # fmt: skip
_PDF_LINES = 40  # a longer text output is cut in the middle
_PDF_COLUMNS = 112  # characters of code type on a line of the page
_PDF_FIGURE_CM = (15.0, 17.0)  # largest width and height of a figure

_PDF_STYLE = r"""
#let ink = rgb("#1c2330")
#let accent = rgb("#1f4068")
#let quiet = rgb("#66707d")
#let hairline = rgb("#d5dae1")
#let mono = "DejaVu Sans Mono"
#set document(title: details.assignment, author: details.name, date: none)
#set text(font: ("Libertinus Serif", "New Computer Modern", mono), size: 10pt, fill: ink,
  lang: "en", hyphenate: false)
#set par(justify: true, leading: 0.58em, spacing: 0.9em)
#set list(indent: 0.6em, spacing: 0.55em)
#set enum(indent: 0.6em, spacing: 0.55em)
#set smartquote(enabled: false)
#set page(
  paper: "us-letter", margin: (x: 2cm, top: 1.9cm, bottom: 1.6cm),
  header-ascent: 35%,
  header: context if counter(page).get().first() > 1 {
    set text(size: 8.5pt, fill: quiet)
    [#details.course #h(1fr) #details.assignment#if details.name != "" [ · #details.name]]
    v(-0.55em)
    line(length: 100%, stroke: 0.4pt + hairline)
  },
  footer: context align(center, text(size: 8.5pt, fill: quiet,
    counter(page).display("1 / 1", both: true))),
)
#show heading: set text(fill: accent, weight: "semibold")
#show heading: set par(justify: false)
#show heading: set block(sticky: true)
#show heading.where(level: 1): it => block(above: 2.1em, below: 1em, sticky: true, width: 100%, {
  text(size: 15pt, it.body)
  v(-0.55em)
  line(length: 100%, stroke: 0.6pt + accent)
})
#show heading.where(level: 2): it => block(above: 1.7em, below: 0.85em, text(size: 12.5pt, it.body))
#show heading.where(level: 3): it => block(above: 1.4em, below: 0.75em, text(size: 11pt, it.body))
#show link: set text(fill: rgb("#1a4f8b"))
#show math.equation: set text(font: ("New Computer Modern Math", "New Computer Modern", mono))
#show math.equation.where(block: true): set block(above: 1.05em, below: 1.05em)
#show quote.where(block: true): it => block(
  above: 1.1em, below: 1.2em, inset: (left: 0.9em, y: 0.3em),
  stroke: (left: 2pt + hairline), it.body)
#let horizontalrule = line(length: 100%, stroke: 0.4pt + hairline)

// Tables: three rules, no boxes; the head is set bold.
#set table(stroke: none, inset: (x: 7pt, y: 3.6pt))
#show table.cell.where(y: 0): strong
#show table: it => block(stroke: (top: 0.9pt + ink, bottom: 0.9pt + ink), inset: (y: 1.5pt), it)
#set table.hline(stroke: 0.5pt + ink)
#show figure.where(kind: table): set text(size: 9.5pt)
#show figure.where(kind: table): set par(justify: false)
#show figure.where(kind: table): set block(above: 1.2em, below: 1.3em)

// Code and text outputs: a long line wraps under its own indent, never beyond the margin.
#show raw: set text(font: mono, size: 1em / 0.8)  // raw text is 0.8em by itself
#show raw.where(block: false): set text(size: 0.84em)
#show raw.where(block: true): it => {
  set par(justify: false, leading: 0.4em, spacing: 0.4em)
  for (number, line) in it.lines.enumerate() {
    // Three lines at least stay together at either end of a page.
    set block(spacing: 0.4em, sticky: number < 2 or number >= it.lines.len() - 3)
    let indent = line.text.len() - line.text.trim(at: start).len()
    if line.text.trim() == "" { block(height: 0.2em) }
    else if line.text.len() < 60 { block(line.body) }
    else {
      show regex("\S{60,}"): it => it.text.clusters().join(h(0.01pt))
      show regex("[(/=]"): it => box(it) + h(0.01pt)  // a place where the line may break
      block(par(hanging-indent: (indent + 4) * 0.602em, line.body))
    }
  }
}
#let code(source, lang: "python") = block(
  fill: rgb("#f5f6f8"), inset: (x: 7pt, y: 6pt), radius: 2pt, width: 100%,
  above: 0.9em, below: 0.9em, breakable: source.split("\n").len() > 14,
  sticky: source.split("\n").len() < 6, {
    set text(size: 6.9pt)
    raw(source, block: true, lang: lang)
  })
#let output(source) = block(
  inset: (left: 7pt, y: 2pt), stroke: (left: 1.6pt + hairline), width: 100%,
  above: 0.9em, below: 1em, breakable: source.split("\n").len() > 14, {
    set text(size: 6.9pt, fill: rgb("#333b47"))
    raw(source, block: true)
  })
#let picture(file, width, alt, caption) = block(
  breakable: false, width: 100%, above: 1em, below: 1.1em, align(center, {
    image(file, width: width, alt: alt)
    if caption != none {
      set text(size: 9pt, fill: quiet)
      set par(justify: false)
      block(above: 0.7em, width: 88%, caption)
    }
  }))

#let title-block(title) = {
  set par(justify: false)
  block(below: 1.1em, text(size: 10pt, fill: quiet, tracking: 0.03em, details.course))
  block(below: 1em, text(size: 22pt, fill: accent, weight: "semibold", title))
  line(length: 100%, stroke: 0.9pt + accent)
  let entry(label, value) = {
    text(size: 8.5pt, fill: quiet, label)
    linebreak()
    if value == "" { text(fill: rgb("#a33b00"), style: "italic")[not filled in yet] }
    else { value }
  }
  grid(columns: (auto, auto, auto, 1fr), column-gutter: 2.4em,
    entry([Assignment], details.assignment), entry([Name], details.name),
    entry([Student number], details.student_number),
    entry([Discussed with], details.discussed_with))
  if details.missing.len() > 0 {
    block(width: 100%, inset: 8pt, radius: 2pt, fill: rgb("#fff4e5"),
      stroke: 0.7pt + rgb("#d98200"))[
      *Reminder before handing in:* fill in #details.missing.join(", ", last: " and ") in the
      settings cell at the top of the notebook, then export again. Where nobody was asked, "nobody"
      is the answer.]
  }
}
#let contents(depth) = {
  set text(size: 9.5pt)
  set par(leading: 0.5em, justify: false)
  set outline.entry(fill: text(fill: hairline, repeat(gap: 0.3em)[.]))
  show outline.entry.where(level: 1): set block(above: 0.7em)
  block(above: 1.5em, below: 0.8em, text(fill: accent, weight: "semibold")[Contents])
  outline(title: none, depth: depth, indent: 1.2em)
  line(length: 100%, stroke: 0.4pt + hairline)
}
#let appendix(title, name, note, sources) = {
  set page(flipped: true, columns: 2, margin: (x: 1.5cm, top: 1.9cm, bottom: 1.6cm))
  set columns(gutter: 0.8cm)
  place(top, float: true, scope: "parent")[#heading(level: 1, title) #label(name) #note]
  show raw.where(block: true): set text(size: 5.9pt)
  sources.map(source => raw(source, block: true, lang: "python")).join(
    block(above: 1.2em, below: 1.2em, line(length: 100%, stroke: 0.4pt + hairline)))
}
#let figure-code(sources) = appendix([Appendix: supporting code], "figure-code",
  [The code that draws, in the order of the notebook.], sources)
#let helper-code(sources) = appendix([Appendix: helper module], "helper-code",
  [The file `utils.py`, as the notebook carries it: data, training loop, downloads, export.],
  sources)
"""


def export_pdf(notebook: Path, pdf: Path | None = None) -> Path:
    """Write an executed notebook as a designed PDF; in Colab also offer it for download.

    In Colab the open notebook is asked for its present state. Elsewhere the file on disk is
    read, so save the notebook first. The PDF is complete or absent, never half written.

    Args:
        notebook: the .ipynb file; in Colab only its name matters.
        pdf: where the PDF goes; next to the notebook, with the suffix .pdf, when None.
    Returns:
        The path of the PDF.
    Raises:
        ValueError: `notebook` does not end in .ipynb or `pdf` not in .pdf.
        FileNotFoundError: there is no such notebook.
        RuntimeError: a package is missing (the message says what to install), or typst could
            not set the document (the message is typst's own).
    """
    notebook = Path(notebook)
    pdf = Path(pdf) if pdf is not None else notebook.with_suffix(".pdf")
    if notebook.suffix != ".ipynb":
        raise ValueError(f"notebook must be a file ending in .ipynb, not {str(notebook)!r}")
    if pdf.suffix != ".pdf":
        raise ValueError(f"pdf must be a file ending in .pdf, not {str(pdf)!r}")
    nbformat = _pdf_import("nbformat")
    text = _colab_notebook()
    if text is None:
        if not notebook.is_file():
            raise FileNotFoundError(f"no notebook {notebook.resolve()}; save it there first")
        text = notebook.read_text(encoding="utf-8")
    content = notebook_to_pdf(nbformat.reads(text, as_version=4), notebook.parent)
    pdf.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pdf.with_name(f".{pdf.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(pdf)
    finally:
        unfinished.unlink(missing_ok=True)
    if "google.colab" in sys.modules:
        from google.colab import files

        files.download(str(pdf))
    return pdf


def notebook_to_pdf(nb: Any, folder: Path) -> bytes:
    """The PDF of a notebook node; `folder` is where its relative picture paths start.

    The same notebook gives the same bytes: the PDF carries no date.
    """
    typst = _pdf_import("typst")
    with tempfile.TemporaryDirectory(prefix="a3_pdf_") as workshop:
        source = notebook_to_typst(nb, Path(folder), Path(workshop))
        page = Path(workshop) / "notebook.typ"
        page.write_text(source, encoding="utf-8")
        # The fonts inside typst make the design the same everywhere. Other scripts (a name in
        # Chinese, say) are not in them, so only then the system's fonts are let in.
        other_script = re.search("[\u0590-\u1dff\u2e80-\ufaff]", source)
        try:
            return typst.compile(str(page), root=workshop, ignore_system_fonts=not other_script)
        except Exception as error:
            raise RuntimeError(f"typst could not set the PDF: {error}") from error


def __getattr__(name: str) -> Any:
    """Build the nbconvert exporter when it is asked for, so nbconvert is only needed then."""
    if name != "TypstPDFExporter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    exporters = _pdf_import("nbconvert").exporters

    class TypstPDFExporter(exporters.Exporter):
        """`jupyter nbconvert --to utils.TypstPDFExporter`: what `export_pdf` writes."""

        export_from_notebook = "PDF by typst"
        output_mimetype = "application/pdf"
        file_extension = ".pdf"

        def from_notebook_node(self, nb: Any, resources: Any = None, **kwargs: Any) -> Any:
            nb, resources = super().from_notebook_node(nb, resources, **kwargs)
            folder = resources.get("metadata", {}).get("path") or "."
            return notebook_to_pdf(nb, Path(folder)), resources

    TypstPDFExporter.__module__ = __name__
    globals()[name] = TypstPDFExporter
    return TypstPDFExporter


def _pdf_import(module: str) -> Any:
    try:
        found = importlib.import_module(module)
        if module == "pypandoc" and int(found.get_pandoc_version().split(".")[0]) < 3:
            raise OSError("pandoc is older than version 3")
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"the PDF export needs {_PDF_WHEELS[module]} ({error}); install what it uses with\n"
            "    pip install nbformat nbconvert pillow pypandoc_binary typst"
        ) from error
    return found


def _colab_notebook() -> str | None:
    """The notebook open in Colab as JSON text, or None where there is none to ask for."""
    if "google.colab" not in sys.modules:
        return None
    try:
        from google.colab import _message

        answer = _message.blocking_request("get_ipynb", timeout_sec=60)
    except (ImportError, AttributeError):
        return None
    return json.dumps(answer["ipynb"]) if answer and "ipynb" in answer else None


# ---- What is shown: the notebook's cells as Markdown, pictures and typst calls ----


def submission_details(nb: Any) -> dict[str, str]:
    """Course, assignment, name, student number and collaborators of a notebook.

    They come from `metadata.submission` and from the cell tagged `submission`, where
    `NAME = "..."` and `{"name": "..."}` both count; a value in that cell wins.
    """
    details = dict(SUBMISSION_DEFAULTS)
    found = [dict(nb.metadata.get("submission", {}))]
    for cell in nb.cells:
        if cell.cell_type == "code" and "submission" in _cell_tags(cell):
            found.append(_literals(cell.source))
    for values in found:
        for key, value in values.items():
            if isinstance(value, list | tuple):
                value = ", ".join(map(str, value))
            if key.lower() in details and str(value or "").strip():
                details[key.lower()] = clean_text(str(value)).strip()
    return details


def _literals(source: str) -> dict[str, Any]:
    """Every `NAME = literal` and every `"name": literal` of a piece of Python."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return {}
    pairs: list[tuple[Any, ast.expr]] = []
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            pairs.append((node.targets[0].id, node.value))
        elif isinstance(node, ast.keyword):
            pairs.append((node.arg, node.value))
        elif isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            pairs.extend(zip(keys, node.values, strict=True))
    values = {}
    for key, value in pairs:
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, TypeError):
            continue
    return {key: value for key, value in values.items() if isinstance(key, str)}


def clean_text(text: str) -> str:
    """Text without terminal colours, control characters and emoji the fonts cannot draw.

    An emoji becomes its name between colons, so nothing is lost.
    """
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufe0e\ufe0f\u200d\ud800-\udfff]", "", text)
    return re.sub(
        "[\U0001f000-\U0010ffff]",
        lambda match: f":{unicodedata.name(match[0], 'symbol').lower()}:",
        text,
    )


def shorten_text(text: str, lines: int = _PDF_LINES) -> str:
    """A text output as the page shows it: final state of rewritten lines, no progress bars,
    long lines wrapped, and at most `lines` lines, with a marked cut before the last third.

    ValueError unless `lines` is at least 3.
    """
    if lines < 3:
        raise ValueError(f"lines must be at least 3, got {lines}")
    shown = []
    for line in text.replace("\r\n", "\n").split("\n"):
        line = clean_text(line.rstrip("\r").rsplit("\r", 1)[-1]).expandtabs(8).rstrip()
        if re.search(r"\d%\|[\s#█▉▊▋▌▍▎▏-]*\|", line):
            continue
        shown += textwrap.wrap(line, _PDF_COLUMNS, drop_whitespace=False,
                               break_on_hyphens=False) or [""]  # fmt: skip
    while shown and not shown[-1]:
        shown.pop()
    while shown and not shown[0]:
        shown.pop(0)
    if len(shown) > lines:
        tail = lines // 3
        head = lines - tail - 1
        mark = f"[… {len(shown) - head - tail} lines left out here; the notebook has them all …]"
        shown = [*shown[:head], mark, *shown[-tail:]]
    return "\n".join(shown)


def _cell_tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def _output_piece(output: Any) -> tuple[str, Any] | None:
    """One output as ('picture', (bytes, alt)), ('markdown', text) or ('text', text)."""
    if output.output_type == "stream":
        return ("text", output.text) if output.name == "stdout" else None
    if output.output_type == "error":
        return "text", "\n".join(output.traceback) or f"{output.ename}: {output.evalue}"
    data = output.data
    if any("widget" in kind or "javascript" in kind for kind in data):
        return None
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            about = output.metadata.get(kind, {})
            alt = about.get("alt", "") if isinstance(about, dict) else ""
            return "picture", (data[kind], alt)
    for kind in ("text/markdown", "text/latex"):
        if kind in data:
            return "markdown", data[kind]
    plain = data.get("text/plain", "")
    if "text/html" in data and (not plain or plain.startswith("<IPython.core.display.HTML")):
        page = re.sub(r"(?s)<(style|script).*?</\1>|<!--.*?-->", "", data["text/html"])
        plain = html.unescape(re.sub(r"<[^>]+>", " ", page))
    return "text", plain


def _pdf_pieces(nb: Any, folder: Path, workshop: Path) -> tuple[list[list], dict[str, list[str]]]:
    """The notebook in order, as [kind, content] pairs, and the sources for each appendix.

    Kinds: 'markdown' (source), 'typst' (finished typst), 'picture' (file name and alt text).
    """
    pieces: list[list] = []
    appendix: dict[str, list[str]] = {"figure-code": [], "helper-code": []}
    section = ""
    for cell in nb.cells:
        tags = _cell_tags(cell)
        if "hide-pdf" in tags or "submission" in tags or not cell.source.strip():
            continue
        if cell.cell_type == "markdown":
            pieces.append(["markdown", _attached(cell, workshop)])
            section = (re.findall(r"(?m)^#+ +(.+)", cell.source) or [section])[-1]
        elif cell.cell_type == "code" and "helper-module" in tags:
            appendix["helper-code"] += _listing(cell.source)
            pieces.append(["markdown", "*The helper module stands here in the notebook; in this "
                           "document it is [the last appendix](#helper-code).*"])  # fmt: skip
        elif cell.cell_type == "code":
            source = clean_text(cell.source).expandtabs(4)
            if "pdf-appendix" in tags:
                appendix["figure-code"].append(f"# --- {clean_text(section)} ---\n{source}")
                pieces.append(["markdown", "*Code: [appendix](#figure-code).*"])
            else:
                pieces.append(["typst", _typst_call("code", source)])
            pieces += _output_pieces(cell.outputs, workshop)
    return pieces, appendix


def _output_pieces(outputs: list, workshop: Path) -> list[list]:
    pieces: list[list] = []
    for output in outputs:
        piece = _output_piece(output)
        if piece is None:
            continue
        if piece[0] == "picture":
            data, alt = piece[1]
            file = _store_picture(_decoded(data), workshop)
            pieces.append(["picture", [file, alt]] if file else ["text", "[unreadable picture]"])
        elif pieces and piece[0] == pieces[-1][0] == "text":  # one listing, not one per print
            pieces[-1][1] += piece[1] if output.output_type == "stream" else "\n" + piece[1]
        else:
            pieces.append(list(piece))
    for piece in pieces:
        if piece[0] == "text":
            text = shorten_text(piece[1])
            piece[:] = ["typst", _typst_call("output", text) if text else ""]
        elif piece[0] == "markdown":
            piece[1] = clean_text(piece[1])
    return pieces


def _listing(source: str) -> list[str]:
    """The Python of a helper cell: a module kept in one long string is listed as itself."""
    source = re.sub(r"\A%%writefile[^\n]*\n", "", source)
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:
        nodes = iter(())
    strings = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    longest = max(strings, key=lambda node: len(node.value), default=None)
    if longest is None or len(longest.value) < len(source) / 2:
        parts = [source]
    else:
        lines = source.splitlines()
        before = [*lines[: longest.lineno - 1], "# (the text of the module, listed below)"]
        parts = ["\n".join([*before, *lines[longest.end_lineno :]]), longest.value]
    return [clean_text(part).expandtabs(4).strip("\n") for part in parts]


# ---- Pictures ----


def _decoded(data: str) -> bytes:
    try:
        return base64.b64decode(data)
    except binascii.Error:
        return b""


def _store_picture(data: bytes, workshop: Path) -> str | None:
    """Keep a PNG or JPEG for typst; its file name, or None when it cannot be read."""
    image = _pdf_import("PIL.Image")
    try:
        with image.open(io.BytesIO(data)) as picture:
            suffix = {"PNG": "png", "JPEG": "jpg"}[picture.format]
            picture.load()
    except (OSError, SyntaxError, ValueError, KeyError):
        return None
    file = f"picture-{len(list(workshop.glob('picture-*'))) + 1}.{suffix}"
    (workshop / file).write_bytes(data)
    return file


def _picture_width(file: Path) -> float:
    """Width on the page in cm: a 9 inch figure fills the line, smaller ones in proportion."""
    with _pdf_import("PIL.Image").open(file) as picture:
        columns, rows = picture.size
        dpi = float(picture.info.get("dpi", (110, 110))[0]) or 110.0
    width = min(_PDF_FIGURE_CM[0], max(columns / dpi / 9 * _PDF_FIGURE_CM[0], 3.0))
    return round(min(width, _PDF_FIGURE_CM[1] * columns / rows), 2)


def _attached(cell: Any, workshop: Path) -> str:
    """A Markdown cell's source with its attachments stored as files."""
    source = clean_text(cell.source)
    for name, kinds in cell.get("attachments", {}).items():
        for data in kinds.values():
            file = _store_picture(_decoded(data), workshop)
            source = source.replace(f"attachment:{name}", file or "unreadable")
    return source


def _local_picture(target: str, folder: Path, workshop: Path) -> str | None:
    """The stored file of a Markdown picture: an attachment, a data: address or a local file."""
    if re.fullmatch(r"picture-\d+\.(png|jpg)", target):
        return target
    if target.startswith("data:"):
        return _store_picture(_decoded(target.partition(",")[2]), workshop)
    path = folder / unquote(target)
    if "://" in target or not path.is_file():
        return None
    return _store_picture(path.read_bytes(), workshop)


# ---- How it is shown: pandoc's tree, then typst ----


def notebook_to_typst(nb: Any, folder: Path, workshop: Path) -> str:
    """The typst source of a notebook; its pictures are written to the folder `workshop`."""
    pieces, appendix = _pdf_pieces(nb, folder, workshop)
    tree = _pandoc_cells([content for kind, content in pieces if kind == "markdown"])
    cells = [cell["c"][1] for cell in tree["blocks"]]
    anchors = _label_cells(cells, {name: name for name, sources in appendix.items() if sources})
    title = _take_title(cells)
    depth = _lift_headings(cells)
    change = _page_changes(anchors, folder, workshop)
    shown = iter([_mapped(cell, change) for cell in cells])
    blocks = [_raw("#title-block["), {"t": "Plain", "c": _mapped(title, change)}, _raw("]")]
    blocks.append(_raw(f"#contents({depth})"))
    waiting: list[str] = []  # a picture waits for the next block, which may be its caption
    for kind, content in pieces:
        new = next(shown) if kind == "markdown" else []
        if waiting:
            caption = [new.pop(0)] if new and _words(new[0]).startswith("Figure") else []
            blocks += _picture_blocks(*waiting, caption, workshop)
            waiting = []
        if kind == "picture":
            waiting = content
        blocks += new if kind == "markdown" else [_raw(content)] if kind == "typst" else []
    if waiting:
        blocks += _picture_blocks(*waiting, [], workshop)
    for name, sources in appendix.items():
        if sources:
            blocks.append(_raw(f"#{name}(({''.join(_typst_string(s) + ', ' for s in sources)}))"))
    body = _pandoc(json.dumps(tree | {"blocks": blocks}), "typst", "json")
    return f"#let details = {_typst_details(nb)}\n{_PDF_STYLE}\n{body}"


def _typst_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _typst_call(function: str, text: str) -> str:
    return f"#{function}({_typst_string(text)})" if text else ""


def _typst_details(nb: Any) -> str:
    details = submission_details(nb)
    missing = [key.replace("_", " ") for key, value in details.items() if not value]
    entries = [f"{key}: {_typst_string(value)}, " for key, value in details.items()]
    names = "".join(_typst_string(name) + ", " for name in missing)
    return f"({''.join(entries)}missing: ({names}))"


def _pandoc(source: str, to: str, form: str) -> str:
    pypandoc = _pdf_import("pypandoc")
    logging.getLogger("pypandoc").setLevel(logging.ERROR)
    return pypandoc.convert_text(source, to, format=form, extra_args=["--sandbox"])


def _pandoc_cells(sources: list[str]) -> dict:
    """Pandoc's tree of Markdown cells, a Div each: one unclosed fence cannot spoil the next."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": source} for source in sources]
    nb = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    return json.loads(_pandoc(json.dumps(nb), "json", "ipynb+raw_tex"))


def _raw(code: str) -> dict:
    return {"t": "RawBlock", "c": ["typst", code]}


def _nodes(tree: Any) -> list[dict]:
    """Every element of a pandoc tree, in reading order."""
    if isinstance(tree, list):
        return [node for item in tree for node in _nodes(item)]
    if not isinstance(tree, dict):
        return []
    return ([tree] if "t" in tree else []) + _nodes(list(tree.values()))


def _mapped(tree: Any, change: Callable[[dict], list | None]) -> Any:
    """A pandoc tree with `change` applied to each element: None keeps it, a list replaces it."""
    if isinstance(tree, list):
        result = []
        for item in tree:
            new = change(item) if isinstance(item, dict) and "t" in item else None
            result += [_mapped(item, change)] if new is None else new
        return result
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    return tree


def _words(tree: Any) -> str:
    """The plain text of a pandoc tree."""
    words = []
    for node in _nodes(tree):
        if node["t"] in ("Space", "SoftBreak", "LineBreak"):
            words.append(" ")
        elif node["t"] == "Str":
            words.append(node["c"])
        elif node["t"] in ("Code", "Math"):
            words.append(node["c"][1])
    return "".join(words)


def heading_anchors(heading: str) -> tuple[str, str]:
    """The anchor of a heading by GitHub's rule (Colab's too), and by JupyterLab's."""
    plain = heading.strip()
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"), plain.replace(" ", "-")


def _label_cells(cells: list[list[dict]], anchors: dict[str, str]) -> dict[str, str]:
    """Label each heading; `anchors` with the label that each anchor name leads to added.

    An explicit `<a id="...">` leads to its cell's first heading, or to the start of the cell.
    """
    for index, blocks in enumerate(cells):
        names, labels = [], []
        for node in _nodes(blocks):
            if node["t"] == "Header":
                labels.append(f"heading-{index}-{len(labels)}")
                node["c"][1] = [labels[-1], [], []]
                for name in heading_anchors(_words(node["c"][2])):
                    anchors.setdefault(name, labels[-1])
            elif node["t"].startswith("Raw") and node["c"][0] == "html":
                names += re.findall(r"<a\s[^>]*?(?:id|name)=[\"']?([^\"'\s>]+)", node["c"][1])
        if names and not labels:
            labels = [f"cell-{index}"]
            blocks.insert(0, _raw(f"#metadata(none) <{labels[0]}>"))
        anchors.update({name: labels[0] for name in names})
    return anchors


def _take_title(cells: list[list[dict]]) -> list[dict]:
    """Take a `# Title` that opens the first Markdown cell out of the text; else a default."""
    for position, block in enumerate(cells[0] if cells else []):
        if block["t"] == "Header" and block["c"][0] == 1:
            title = cells[0].pop(position)
            cells[0].insert(position, _raw(f"#metadata(none) <{title['c'][1][0]}>"))
            return title["c"][2]
    return [{"t": "Str", "c": SUBMISSION_DEFAULTS["assignment"]}]


def _lift_headings(cells: list[list[dict]]) -> int:
    """Make the highest heading level 1; the depth that keeps the table of contents short."""
    headings = [node for node in _nodes(cells) if node["t"] == "Header"]
    lift = min((node["c"][0] for node in headings), default=1) - 1
    for node in headings:
        node["c"][0] -= lift
    return 2 if sum(node["c"][0] <= 2 for node in headings) <= 30 else 1


def _page_changes(
    anchors: dict[str, str], folder: Path, workshop: Path
) -> Callable[[dict], list | None]:
    """What to change in pandoc's tree: links, pictures, code, raw TeX and raw HTML."""

    def change(node: dict) -> list | None:
        kind, content = node["t"], node.get("c")
        if kind == "Link":
            target = content[2][0]
            label = anchors.get(unquote(target[1:])) if target.startswith("#") else target
            if not label:  # a place that is not in the PDF: the words stay, the link goes
                return _mapped(content[1], change)
            content[2][0] = f"#{label}" if target.startswith("#") else target
        elif kind in ("Para", "Plain") and [part["t"] for part in content] == ["Image"]:
            _, caption, (target, _title) = content[0]["c"]
            if file := _local_picture(target, folder, workshop):
                shown = [{"t": "Plain", "c": _mapped(caption, change)}] if caption else []
                return _picture_blocks(file, _words(caption), shown, workshop)
        if kind == "Image":
            file = _local_picture(content[2][0], folder, workshop)
            if not file:
                return [{"t": "Str", "c": f"[picture: {_words(content[1]) or content[2][0]}]"}]
            content[2][0] = file
        elif kind == "CodeBlock":
            language = (content[0][1] or ["txt"])[0]
            return [_raw(f"#code({_typst_string(content[1])}, lang: {_typst_string(language)})")]
        elif kind.startswith("Raw") and content[0] == "html":
            is_break = re.match(r"<br\b", content[1]) and kind == "RawInline"
            return [{"t": "LineBreak"}] if is_break else []
        elif kind.startswith("Raw") and content[0] in ("tex", "latex"):
            math = {"t": "Math", "c": [{"t": "DisplayMath"}, content[1]]}
            formula = math if content[1].startswith("\\begin{") else {"t": "Str", "c": content[1]}
            return [{"t": "Para", "c": [formula]} if kind == "RawBlock" else formula]
        return None

    return change


def _picture_blocks(file: str, alt: str, caption: list[dict], workshop: Path) -> list[dict]:
    width = _picture_width(workshop / file)
    start = f'#picture("{file}", {width}cm, {_typst_string(alt)}, '
    return [_raw(start + "["), *caption, _raw("])")] if caption else [_raw(start + "none)")]
