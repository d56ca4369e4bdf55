"""Downloads on a bad day, one fault at a time. Network: loopback only."""

import contextlib
import gzip
import hashlib
import http.server
import re
import socket
import threading
import time

import pytest
import torch
from conftest import NOWHERE, noise_split
from test_data import as_mat, as_parquet, same

import utils

BODY = bytes(range(256)) * 4000  # a megabyte: more than one piece
SHA = hashlib.sha256(BODY).hexdigest()[:8]


class Server(http.server.ThreadingHTTPServer):
    """`routes[path]` is bytes, or a function of the request's handler; `hits` lists the GETs."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes, self.hits = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.hits.append(self.path)
        self.do_HEAD()

    def do_HEAD(self):
        route = self.server.routes.get(self.path, not_found)
        with contextlib.suppress(ConnectionError):
            route(self) if callable(route) else sends(route)(self)

    def log_message(self, *_):
        pass


def not_found(handler):
    handler.send_error(404)


def sends(body, announced=None):
    """A file, from where the client wants it; `announced` is the length that the headers tell."""

    def route(handler):
        start = int(re.findall(r"\d+", handler.headers.get("Range") or "0")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str((announced or len(body)) - start))
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')  # as the hub does
        handler.send_header("X-Repo-Commit", "0" * 40)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[start:])

    return route


def cut(body):
    return sends(body[:-1000], announced=len(body))


def stalls(handler):
    """Most of the file, then silence."""
    cut(BODY)(handler)
    time.sleep(3 * utils.TIMEOUT)


def first_time(bad, good):
    """A route that behaves badly at the first GET only."""

    def route(handler):
        again = handler.server.hits.count(handler.path) > 1
        (good if again else bad)(handler)

    return route


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)


@pytest.fixture
def path(tmp_path):
    """Where a downloaded file shall lie."""
    return tmp_path / "weights" / "g.pth"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("bad", [cut(BODY), sends(BODY[:-1] + b"!")], ids=["cut", "changed"])
def test_a_cut_or_changed_file_is_tried_again(bad, path, server):
    server.routes["/g"] = first_time(bad, sends(BODY))
    utils.verified_file([f"{server.url}/g"], path, SHA)
    assert path.read_bytes() == BODY
    assert server.hits == ["/g", "/g"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (not_found, "HTTP Error 404"),
        (sends(b"<html>log in</html>"), "invalid hash value"),
        (stalls, "silent for"),
    ],
)
def test_a_bad_address_is_told_and_the_next_one_serves(fault, says, path, server):
    server.routes |= {"/bad": fault, "/good": BODY}
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    with pytest.raises(utils.DataError) as caught:
        utils.verified_file([f"{server.url}/bad", f"{NOWHERE}/g"], path, SHA)
    message = str(caught.value)
    for words in ("another sha256", says, "Connection refused", str(path), SHA):
        assert words in message
    assert names(path.parent) == ["g.pth"]  # nothing half-written
    assert path.read_bytes() == b"damaged"
    utils.verified_file([f"{server.url}/bad", f"{server.url}/good"], path, SHA)
    assert path.read_bytes() == BODY


def test_a_name_server_that_says_nothing_is_given_up(path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3) or [])
    start = time.monotonic()
    with pytest.raises(utils.DataError, match="silent for"):
        utils.verified_file(["https://nowhere.invalid/g"], path, SHA)
    assert time.monotonic() - start < 2.5


def test_a_silent_connection_costs_one_time_out_for_each_address(small_svhn, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts and says nothing
        silent = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(utils, "MNIST_URL", f"{silent}/mnist")
        monkeypatch.setattr(utils, "SVHN_URL", f"{silent}/svhn")
        monkeypatch.setenv("HF_ENDPOINT", f"{silent}/hub")
        start = time.monotonic()
        for load in (utils.load_mnist, utils.load_svhn):
            with pytest.raises(utils.DataError, match="silent for"):
                load()
        assert time.monotonic() - start < 3 * utils.TIMEOUT + 2


def idx(numbers):
    """A file in MNIST's format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in numbers.shape)
    body = numbers.to(torch.uint8).numpy().tobytes()
    return gzip.compress(bytes([0, 0, 8, numbers.ndim]) + sizes + body)


def test_each_file_of_mnist_is_fetched_once_and_a_damaged_one_replaced(server, monkeypatch):
    train, test = noise_split(12), noise_split(5, seed=1)
    for part, split in (("train", train), ("t10k", test)):
        images, labels = idx(split.images[:, 0]), idx(split.labels)
        server.routes[f"/mnist/{part}-images-idx3-ubyte.gz"] = images
        server.routes[f"/mnist/{part}-labels-idx1-ubyte.gz"] = labels
    for path, content in server.routes.items():
        name = path.removeprefix("/mnist/")
        monkeypatch.setitem(utils.SHA256_PREFIXES, name, hashlib.sha256(content).hexdigest())
    raw = utils.data_root() / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    monkeypatch.setattr(utils, "MNIST_URL", f"{server.url}/mnist")
    monkeypatch.setenv("A3_DATA", "real")
    for _ in range(2):
        data = utils.load_mnist()
        assert (data.name, data.real) == ("MNIST", True)
        assert same(data.train, train)
        assert same(data.test, test)
    assert len(server.hits) == len(names(raw)) == 4


OFFICIAL = ["/official/train_32x32.mat", "/official/test_32x32.mat"]
HUB = "/hub/datasets/ufldl-stanford/svhn/resolve/main/cropped_digits"
MIRROR = [f"{HUB}/train-00000-of-00001.parquet", f"{HUB}/test-00000-of-00001.parquet"]


@pytest.mark.parametrize("paths", [OFFICIAL, MIRROR], ids=["official", "mirror"])
def test_svhn_comes_from_the_official_address_else_from_the_mirror_though_cut_once(
    paths, small_svhn, server, monkeypatch, tmp_path
):
    for official, mirror, split in zip(OFFICIAL, MIRROR, small_svhn, strict=True):
        mat = as_mat(tmp_path / "server" / official.split("/")[-1], split)
        monkeypatch.setitem(utils.SHA256_PREFIXES, mat.name, utils.file_sha256(mat))
        server.routes[official] = mat.read_bytes()
        server.routes[mirror] = as_parquet(tmp_path / "server" / "parquet", split).read_bytes()
    monkeypatch.setattr(utils, "SVHN_URL", f"{server.url}/official")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub")
    if paths == MIRROR:
        server.routes |= dict.fromkeys(OFFICIAL, not_found)
    train, test = paths
    whole = server.routes[train]
    server.routes[train] = first_time(cut(whole), sends(whole))
    for _ in range(2):
        data = utils.load_svhn()
        assert (data.name, data.real) == ("SVHN", True)
        assert same(data.train, small_svhn[0])
        assert same(data.test, small_svhn[1])
    hits = [path for path in server.hits if server.routes[path] != not_found]
    assert hits == [train, train, test]
