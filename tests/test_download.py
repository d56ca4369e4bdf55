"""Downloads and files: a bad day's faults, one by one. Network: loopback only."""

import ast
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared" / "data"
BODY = bytes(range(256)) * 400  # 102,400 bytes: more than one piece
SHA = "sha256:" + hashlib.sha256(BODY).hexdigest()
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()


# ---------------------------------------------------------------------------- loopback server
class Server:
    """`routes[path]` is a function of the request handler; `hits` counts requests."""

    def __init__(self):
        self.routes, self.hits, self.agents = {}, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.hits.append(self.path)
                outer.agents.append(self.headers.get("User-Agent"))
                try:
                    outer.routes[self.path](self)
                except (ConnectionError, TimeoutError):
                    pass  # the client has gone, as it should

            def log_message(self, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def url(self, path="/file", route=None):
        if route:
            self.routes[path] = route
        return f"http://127.0.0.1:{self.httpd.server_port}{path}"

    def close(self):
        self.httpd.shutdown()
        self.httpd.server_close()


def sends(body=BODY, announced=None, content_type="application/octet-stream"):
    def route(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(body)

    return route


def refuses(code):
    return lambda handler: handler.send_error(code)


def trickles(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def stalls_midway(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    handler.wfile.write(BODY[:1000])
    handler.wfile.flush()
    time.sleep(3)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def fresh_network(monkeypatch):
    """Every test starts with no memory of silent hosts, and without a proxy for loopback."""
    monkeypatch.setattr(utils, "_waited", {})
    monkeypatch.setattr(utils, "_answered", set())
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


def only_files(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def assert_fails_then_recovers(server, path, says, urls=None, timeout=5.0):
    """The failure speaks plainly and leaves nothing; the next run, with a good server, ends well"""
    urls = urls or [server.url()]
    with pytest.raises(utils.DownloadError) as caught:
        utils.download(urls, path, SHA, timeout=timeout)
    message = str(caught.value)
    assert says in message
    assert all(url in message for url in urls)
    assert str(path) in message and "by hand" in message and SHA[7:] in message
    assert not path.parent.exists() or only_files(path.parent) == []
    utils.download([server.url("/good", sends())], path, SHA)
    assert path.read_bytes() == BODY and only_files(path.parent) == [path.name]


# ---------------------------------------------------------------------------- download: good
@pytest.mark.parametrize(
    "checksum", [SHA, MD5, SHA[7:], SHA[:15], SHA.upper().replace("SHA", "sha")]
)
def test_downloads_and_verifies(server, tmp_path, checksum):
    path = tmp_path / "new" / "folder" / "file.bin"
    assert utils.download([server.url(route=sends())], path, checksum, size=len(BODY)) == path
    assert path.read_bytes() == BODY and only_files(path.parent) == ["file.bin"]
    assert "assignment3" in server.agents[0]


def test_right_file_needs_no_network(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    path.write_bytes(BODY)
    monkeypatch.setattr(utils, "_open_url", lambda *a: pytest.fail("network used"))
    assert utils.download(["https://example.invalid/x"], path, SHA, size=len(BODY)) == path


def test_https_first_then_the_others_in_turn(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(utils, "_open_url", lambda url, t: tried.append(url) or bad())

    def bad():
        raise ConnectionResetError

    urls = ["http://a.invalid/1", "https://b.invalid/2", "http://c.invalid/3"]
    with pytest.raises(utils.DownloadError):
        utils.download(urls, tmp_path / "f", SHA)
    assert tried == [urls[1], urls[0], urls[2]]


def test_second_address_serves_when_the_first_fails(server, tmp_path):
    urls = [server.url("/gone", refuses(404)), server.url("/file", sends())]
    utils.download(urls, tmp_path / "f", SHA)
    assert server.hits == ["/gone", "/file"]


# ---------------------------------------------------------------------------- download: network
@pytest.mark.parametrize("code", [403, 404, 500, 503])
def test_http_errors(server, tmp_path, code):
    server.url(route=refuses(code))
    assert_fails_then_recovers(server, tmp_path / "f.bin", f"HTTP {code}")


def test_connection_cut_half_way(server, tmp_path):
    server.url(route=sends(BODY[:50_000], announced=len(BODY)))
    assert_fails_then_recovers(server, tmp_path / "f.bin", "cut after 50,000 of 102,400 bytes")


def test_chunked_body_cut(server, tmp_path):
    def route(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"ffff\r\n" + BODY[:500])
        handler.close_connection = True

    server.url(route=route)
    assert_fails_then_recovers(server, tmp_path / "f.bin", "cut")


def test_server_hangs_up_without_an_answer(server, tmp_path):
    server.url(route=lambda handler: handler.connection.shutdown(socket.SHUT_RDWR))
    assert_fails_then_recovers(server, tmp_path / "f.bin", "the connection was cut")


def test_answer_is_not_http(server, tmp_path):
    server.url(route=lambda handler: handler.wfile.write(b"220 smtp ready\r\n"))
    assert_fails_then_recovers(server, tmp_path / "f.bin", "BadStatusLine")


@pytest.mark.parametrize("route", [lambda h: time.sleep(3), stalls_midway, trickles])
def test_slow_server_times_out(server, tmp_path, route):
    server.url(route=route)
    start = time.monotonic()
    assert_fails_then_recovers(server, tmp_path / "f.bin", "time-out", timeout=0.3)
    assert time.monotonic() - start < 2.5


def test_connection_refused(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/f"
    assert_fails_then_recovers(server, tmp_path / "f.bin", "connection refused", [url])


def test_dns_failure(server, tmp_path, monkeypatch):
    def no_name(host, *args, **kwargs):
        if host == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **kwargs)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    urls = ["https://nowhere.invalid/f"]
    assert_fails_then_recovers(server, tmp_path / "f.bin", "DNS failure", urls)


def test_dns_hangs(tmp_path, monkeypatch):
    """urllib's time-out does not cover the look-up of the name; ours does."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3) or [])
    start = time.monotonic()
    with pytest.raises(utils.DownloadError, match="time-out"):
        utils.download(["https://nowhere.invalid/f"], tmp_path / "f", SHA, timeout=0.3)
    assert time.monotonic() - start < 1.5


def test_no_network(server, tmp_path, monkeypatch):
    def unreachable(address, *args, **kwargs):
        if address[0] == "10.1.2.3":
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return real(address, *args, **kwargs)

    real = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert_fails_then_recovers(server, tmp_path / "f.bin", "no network", ["http://10.1.2.3/f"])


def test_offline_waiting_is_capped(tmp_path, monkeypatch):
    """All hosts silent: after OFFLINE_PATIENCE seconds in all, each try gets 1 s at most."""
    clock, asked = [0.0], []

    def silent(url, timeout):
        asked.append(timeout)
        clock[0] += timeout
        raise TimeoutError

    monkeypatch.setattr(utils, "_open_url", silent)
    monkeypatch.setattr(utils.time, "monotonic", lambda: clock[0])
    for host in "abcd":
        urls = [f"https://{host}.invalid/f"]
        with pytest.raises(utils.DownloadError):
            utils.download(urls, tmp_path / "f", SHA, timeout=10)
    assert asked == [10, 2, 1, 1]
    assert sum(asked) <= 15
    utils._answered.add("e.invalid")  # the network is back: strangers get the full time again
    assert utils._patience("f.invalid", 10) == 10
    assert utils._patience("a.invalid", 10) == 1


# ---------------------------------------------------------------------------- download: content
def test_wrong_checksum(server, tmp_path):
    server.url(route=sends(BODY[:-1] + b"!"))
    assert_fails_then_recovers(server, tmp_path / "f.bin", "wrong checksum")


@pytest.mark.parametrize("html", [b"<!DOCTYPE html><title>Log in</title>", b"\n <HTML></HTML>"])
def test_html_in_place_of_the_file(server, tmp_path, html):
    server.url(route=sends(html, content_type="text/html"))
    assert_fails_then_recovers(server, tmp_path / "f.bin", "web page (HTML)")


@pytest.mark.parametrize("change, says", [(-1, "more than 102399"), (1, "not 102,401")])
def test_wrong_size(server, tmp_path, change, says):
    with pytest.raises(utils.DownloadError, match="wrong size") as caught:
        utils.download([server.url(route=sends())], tmp_path / "f", SHA, size=len(BODY) + change)
    assert says in str(caught.value) and only_files(tmp_path) == []


@pytest.mark.parametrize("wrong", [b"", BODY[:500], b"<html>"])
def test_wrong_file_is_set_aside(server, tmp_path, capsys, wrong):
    path = tmp_path / "f.bin"
    path.write_bytes(wrong)
    utils.download([server.url(route=sends())], path, SHA)
    assert path.read_bytes() == BODY
    assert (tmp_path / "f.bin.bad").read_bytes() == wrong
    assert "Notice" in capsys.readouterr().out


def test_wrong_file_is_never_left_in_place(server, tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"damaged")
    with pytest.raises(utils.DownloadError):
        utils.download([server.url(route=refuses(404))], path, SHA)
    assert only_files(tmp_path) == ["f.bin.bad"]


# ---------------------------------------------------------------------------- download: machine
class FullDisk(io.FileIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full(server, tmp_path, monkeypatch):
    def full(path, mode="r", *args):
        if "x" in mode:
            return io.BufferedWriter(FullDisk(str(path), "x"))  # fails in write, flush and close
        return open(path, mode, *args)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "open", full, raising=False)
        with pytest.raises(utils.DownloadError, match="disk is full"):
            utils.download([server.url(route=sends())], tmp_path / "f", SHA)
    assert only_files(tmp_path) == []
    utils.download([server.url()], tmp_path / "f", SHA)
    assert only_files(tmp_path) == ["f"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_read_only_folder(server, tmp_path, monkeypatch, code):
    def denied(path, mode="r", *args):
        if "x" in mode:
            raise OSError(code, os.strerror(code))
        return open(path, mode, *args)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "open", denied, raising=False)
        with pytest.raises(utils.DownloadError, match="cannot be written to"):
            utils.download([server.url(route=sends())], tmp_path / "f", SHA)
    assert server.hits == [] and only_files(tmp_path) == []
    utils.download([server.url()], tmp_path / "f", SHA)


def test_read_only_when_moving_into_place(server, tmp_path, monkeypatch):
    def denied(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "replace", denied)
        with pytest.raises(utils.DownloadError, match="cannot be written to"):
            utils.download([server.url(route=sends())], tmp_path / "f", SHA)
    assert only_files(tmp_path) == []


def test_folder_is_a_file(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(utils.DownloadError, match="on this machine"):
        utils.download([server.url(route=sends())], tmp_path / "file" / "f", SHA)


# ---------------------------------------------------------------------------- download: two at once
CHILD = """
import sys, utils
utils.download([sys.argv[1]], sys.argv[2], sys.argv[3])
print("ended well")
"""


def child(url, path):
    search_path = os.pathsep.join([str(Path(utils.__file__).parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, url, str(path), SHA]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_at_once(server, tmp_path):
    both = threading.Barrier(2, timeout=60)

    def together(handler):
        both.wait()  # no body before both have asked
        sends()(handler)

    url, path = server.url(route=together), tmp_path / "f.bin"
    path.write_bytes(b"damaged")
    runs = [child(url, path) for _ in range(2)]
    for run in runs:
        out, _ = run.communicate(timeout=90)
        assert run.returncode == 0 and "ended well" in out, out
    assert path.read_bytes() == BODY and only_files(tmp_path) == ["f.bin", "f.bin.bad"]


def test_killed_download_is_cleaned_up_by_a_later_run(server, tmp_path):
    path = tmp_path / "f.bin"
    run = child(server.url(route=stalls_midway), path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".f.bin.*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    (left,) = tmp_path.iterdir()  # nothing under the true name
    young = tmp_path / ".f.bin.0000.part"  # of a living process
    young.write_bytes(b"")
    os.utime(left, (time.time() - 7200,) * 2)
    utils.download([server.url("/good", sends())], path, SHA)
    assert path.read_bytes() == BODY and only_files(tmp_path) == [young.name, "f.bin"]


def test_interrupt_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        utils.download([server.url(route=sends())], tmp_path / "f", SHA)
    assert only_files(tmp_path) == []


def test_right_file_arriving_meanwhile_is_not_set_aside(server, tmp_path, monkeypatch):
    """We read a wrong file; before we rename it, another process puts the right one there."""
    path, real = tmp_path / "f", utils.has_checksum
    path.write_bytes(b"wrong")

    def other_is_faster(*args):
        verdict = real(*args)
        (tmp_path / "new").write_bytes(BODY)
        os.replace(tmp_path / "new", path)
        return verdict

    monkeypatch.setattr(utils, "has_checksum", other_is_faster)
    utils.download([server.url(route=sends())], path, SHA)
    assert path.read_bytes() == BODY and only_files(tmp_path) == ["f"]


def test_other_process_finished_first(server, tmp_path, monkeypatch):
    """Where a file in use cannot be replaced (Windows), the other's right file will do."""

    def in_use(source, target):
        Path(target).write_bytes(BODY)
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(utils.os, "replace", in_use)
    utils.download([server.url(route=sends())], tmp_path / "f", SHA)
    assert only_files(tmp_path) == ["f"]


# ---------------------------------------------------------------------------- download: arguments
@pytest.mark.parametrize(
    "argument, change",
    [
        ("urls", {"urls": []}),
        ("urls", {"urls": "https://example.invalid/f"}),
        ("urls", {"urls": ["file:///etc/passwd"]}),
        ("urls", {"urls": ["ftp://example.invalid/f"]}),
        ("urls", {"urls": [None]}),
        ("checksum", {"checksum": ""}),
        ("checksum", {"checksum": "md5:12"}),
        ("checksum", {"checksum": "sha256:1234567"}),
        ("checksum", {"checksum": "sha1:" + "0" * 40}),
        ("checksum", {"checksum": "0" * 32}),
        ("checksum", {"checksum": None}),
        ("size", {"size": 0}),
        ("size", {"size": 1.5}),
        ("timeout", {"timeout": 0}),
        ("timeout", {"timeout": float("nan")}),
        ("timeout", {"timeout": "5"}),
    ],
)
def test_bad_arguments(tmp_path, argument, change):
    good = {"urls": ["https://example.invalid/f"], "path": tmp_path / "f", "checksum": SHA}
    with pytest.raises(ValueError, match=argument):
        utils.download(**{**good, **change})


def test_path_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match="path"):
        utils.download(["https://example.invalid/f"], tmp_path, SHA)


# ---------------------------------------------------------------------------- torch files
def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


STATE = {"weight": torch.arange(300.0).view(10, 30), "step": 7, "name": "base"}
ZIP_FILE, OLD_FILE = saved(STATE), saved(STATE, _use_new_zipfile_serialization=False)


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(b[k]) else a[k] == b[k] for k in b
    )


@pytest.mark.parametrize("data", [ZIP_FILE, OLD_FILE])
def test_torch_load(tmp_path, data):
    (tmp_path / "f.pt").write_bytes(data)
    assert same(utils.verified_torch_load(tmp_path / "f.pt"), STATE)


def test_torch_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        utils.verified_torch_load(tmp_path / "none.pt")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a file was run')",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"<html>not found</html>",
        BODY,
        ZIP_FILE[:-40],
        ZIP_FILE[: len(ZIP_FILE) // 2],
        OLD_FILE[: len(OLD_FILE) // 2],
        saved([1, 2]),
        saved({"a": Evil()}),
        saved({"a": Evil()}, _use_new_zipfile_serialization=False),
        saved(torch.nn.Linear(2, 2)),
    ],
)
def test_torch_load_damaged_or_foreign(tmp_path, data):
    (tmp_path / "f.pt").write_bytes(data)
    with pytest.raises(ValueError, match="f.pt is damaged or not a file of tensors"):
        utils.verified_torch_load(tmp_path / "f.pt")


def damaged_copy(data, content: bytes, folder):
    """Writes `content` with a few bytes changed, at a place and with values that `data` draws."""
    place = data.draw(st.integers(0, len(content) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=8))
    path = folder / "fuzz.pt"
    path.write_bytes(content[:place] + noise + content[place + len(noise) :])
    return path


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_torch_load_fuzz(tmp_path_factory, data):
    """Any damage to a zip file is either told or harmless: never a wrong number."""
    path = damaged_copy(data, ZIP_FILE, tmp_path_factory.getbasetemp())
    try:
        assert same(utils.verified_torch_load(path), STATE)
    except ValueError as error:
        assert "fuzz.pt" in str(error)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_torch_load_fuzz_old_format(tmp_path_factory, data):
    """The old format has no CRC of its own: damage gives a dict or a ValueError, nothing else."""
    path = damaged_copy(data, OLD_FILE, tmp_path_factory.getbasetemp())
    try:
        assert isinstance(utils.verified_torch_load(path), dict)
    except ValueError as error:
        assert "fuzz.pt" in str(error)


# ---------------------------------------------------------------------------- MNIST
def idx(array):
    """An array in the official idx format (big-endian sizes, then uint8)."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_mnist(server, monkeypatch):
    """Four small files in MNIST's format on a loopback mirror; returns (arrays, unpacked files)."""
    datasets = pytest.importorskip("torchvision.datasets")
    rng = np.random.default_rng(0)
    arrays, unpacked, resources, plain_sums = {}, {}, [], {}
    for split, name, count in (("train", "train", 12), ("test", "t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28))
        labels = rng.integers(0, 10, count)
        arrays[split] = images, labels
        for file, content in (
            (f"{name}-images-idx3-ubyte", idx(images)),
            (f"{name}-labels-idx1-ubyte", idx(labels)),
        ):
            packed = gzip.compress(content)
            unpacked[file] = content
            resources.append((file + ".gz", hashlib.md5(packed).hexdigest()))
            plain_sums[file] = hashlib.sha256(content).hexdigest()
            server.url(f"/mnist/{file}.gz", sends(packed))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [server.url("/mnist/")])
    monkeypatch.setattr(utils, "MNIST_UNPACKED", plain_sums)
    return arrays, unpacked


def assert_is(splits, arrays):
    assert list(splits) == ["train", "test"]
    for split, (images, labels) in arrays.items():
        got_images, got_labels = splits[split]
        assert got_images.dtype == torch.uint8 and got_labels.dtype == torch.int64
        assert got_images.shape == (len(images), 1, 28, 28)
        assert np.array_equal(got_images[:, 0], images) and np.array_equal(got_labels, labels)


def test_mnist_download_then_no_network(server, tiny_mnist, tmp_path):
    arrays, _ = tiny_mnist
    assert_is(utils.load_mnist(tmp_path), arrays)
    assert len(server.hits) == 4
    before = only_files(tmp_path / "MNIST" / "raw")
    assert_is(utils.load_mnist(tmp_path), arrays)
    assert len(server.hits) == 4 and only_files(tmp_path / "MNIST" / "raw") == before
    assert all(name.endswith(".gz") for name in before)


def test_mnist_files_serve_torchvision_too(server, tiny_mnist, tmp_path):
    """After fetch_mnist, torchvision's own download=True needs no network."""
    from torchvision.datasets import MNIST

    utils.fetch_mnist(tmp_path)
    assert len(MNIST(tmp_path, download=True)) == 12 and len(server.hits) == 4


def test_mnist_unpacked_files_are_enough(server, tiny_mnist, tmp_path):
    arrays, unpacked = tiny_mnist
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in unpacked.items():
        (raw / name).write_bytes(content)
    assert_is(utils.load_mnist(tmp_path), arrays)
    assert server.hits == []


def test_mnist_damaged_files_are_replaced(server, tiny_mnist, tmp_path):
    """torchvision takes unpacked files as they are, unverified; we do not."""
    arrays, unpacked = tiny_mnist
    utils.fetch_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    for name, content in unpacked.items():
        (raw / name).write_bytes(content[:-1] + b"\xff")
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"<html>")
    assert_is(utils.load_mnist(tmp_path), arrays)
    assert len(server.hits) == 5


def test_mnist_read_only_root(server, tiny_mnist, tmp_path, monkeypatch):
    """With the .gz there, nothing is written under root."""
    arrays, _ = tiny_mnist
    utils.fetch_mnist(tmp_path)

    def watch(path, mode="r", *args):
        if set(mode) & set("wxa+") and str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EROFS, "Read-only file system")
        return open(path, mode, *args)

    monkeypatch.setattr(utils, "open", watch, raising=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert_is(utils.load_mnist(tmp_path), arrays)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_mnist_cannot_be_had(server, tiny_mnist, tmp_path):
    for route in list(server.routes):
        server.routes[route] = refuses(503)
    with pytest.raises(utils.DownloadError) as caught:
        utils.load_mnist(tmp_path)
    message = str(caught.value)
    assert "HTTP 503" in message and "t10k-labels-idx1-ubyte.gz" in message
    assert str(tmp_path / "MNIST" / "raw") in message


@pytest.mark.skipif(not (SHARED / "MNIST/raw").exists(), reason="real MNIST is not on this machine")
def test_real_mnist_counts(monkeypatch):
    monkeypatch.setattr(utils, "_open_url", lambda *a: pytest.fail("network used"))
    before = sorted(SHARED.rglob("*"))
    splits = utils.load_mnist(SHARED)
    assert sorted(SHARED.rglob("*")) == before
    known = {
        "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    }
    for split, counts in known.items():
        images, labels = splits[split]
        assert images.shape == (sum(counts), 1, 28, 28) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == counts
        assert images.min() == 0 and images.max() == 255


# ---------------------------------------------------------------------------- SVHN
@pytest.fixture
def tiny_svhn(server, monkeypatch):
    """Two small .mat files in the official format on a loopback host; returns the arrays."""
    scipy_io = pytest.importorskip("scipy.io")
    svhn = pytest.importorskip("torchvision.datasets").SVHN
    rng, arrays, split_list = np.random.default_rng(0), {}, dict(svhn.split_list)
    for split, count in (("train", 21), ("test", 11)):
        x = rng.integers(0, 256, (32, 32, 3, count)).astype(np.uint8)
        y = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # 1 to 10, 10 for the digit 0
        buffer = io.BytesIO()
        scipy_io.savemat(buffer, {"X": x, "y": y})
        arrays[split] = x, y
        name, md5 = f"{split}_32x32.mat", hashlib.md5(buffer.getvalue()).hexdigest()
        split_list[split] = [server.url(f"/{name}", sends(buffer.getvalue())), name, md5]
    monkeypatch.setattr(svhn, "split_list", split_list)
    return arrays


def test_svhn_through_torchvision(server, tiny_svhn, tmp_path):
    for _ in range(2):  # the second time with no network
        splits = utils.load_svhn(tmp_path)
        assert server.hits == ["/train_32x32.mat", "/test_32x32.mat"]
        for split, (x, y) in tiny_svhn.items():
            images, labels = splits[split]
            assert images.dtype == torch.uint8 and labels.dtype == torch.int64
            assert images.shape == (x.shape[3], 3, 32, 32) and images.is_contiguous()
            assert np.array_equal(images[4].permute(1, 2, 0), x[..., 4])
            assert labels.tolist() == [int(v) % 10 for v in y[:, 0]]


def test_svhn_damaged_file_is_replaced(server, tiny_svhn, tmp_path):
    (tmp_path / "test_32x32.mat").write_bytes(b"\0" * 500)
    assert len(utils.load_svhn(tmp_path)["test"][1]) == 11
    assert only_files(tmp_path) == ["test_32x32.mat", "test_32x32.mat.bad", "train_32x32.mat"]


def test_svhn_cannot_be_had(server, tiny_svhn, tmp_path):
    server.routes["/test_32x32.mat"] = refuses(404)
    with pytest.raises(utils.DownloadError) as caught:
        utils.load_svhn(tmp_path)
    message = str(caught.value)
    assert "HTTP 404" in message and "test_32x32.mat" in message and str(tmp_path) in message


@pytest.mark.parametrize("error", [ImportError("no torchvision"), RuntimeError("nms missing")])
def test_broken_torchvision_is_told(tmp_path, monkeypatch, error):
    """A torchvision built for another torch fails on import with RuntimeError. That must stop
    `auto` too: it is no reason to leave real data on the disk unused."""

    class Broken:
        def find_spec(self, name, *args):
            if name.split(".")[0] == "torchvision":
                raise error

    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match="belong together"):
        utils.load_mnist(tmp_path)


# ---------------------------------------------------------------------------- security
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
FORBIDDEN_CALLS |= {"torch.hub.load", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load"}
FORBIDDEN_METHODS = {"extractall", "unpack_archive"}


def dangers(source):
    """The dangerous constructs in Python source, as a list of strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(full & (FORBIDDEN_CALLS | {"torch.load"}))
        found += [name for name in modules if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS or name.split(".")[-1] in FORBIDDEN_METHODS:
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if options.get("shell", "False") != "False":
            found.append("shell=True")
        if options.get("allow_pickle", "False") != "False":
            found.append("allow_pickle=True")
        if options.get("weights_only", "True") != "True":
            found.append("weights_only is not True")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os; os.system('ls')",
        "from os import system",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import torch; torch.load('f')",
        "import torch; torch.load('f', weights_only=False)",
        "from torch import load",
        "archive.extractall('.')",
        "import shutil; shutil.unpack_archive('a.zip')",
        "np.load('f', allow_pickle=True)",
    ],
)
def test_scanner_sees(source):
    assert dangers(source)


def test_scanner_lets_pass():
    assert not dangers("torch.load(f, weights_only=True); subprocess.run(['ls']); model.eval()")


def test_utils_is_safe():
    assert dangers(Path(utils.__file__).read_text(encoding="utf-8")) == []


def test_notebook_is_safe():
    notebook = PROJECT / "assignment3.ipynb"
    if not notebook.exists():
        pytest.skip("no notebook yet")
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            code = "\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in lines)
            assert dangers(code) == []
