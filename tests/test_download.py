"""Downloads on a bad day, one fault at a time. Network: loopback only."""

import contextlib
import hashlib
import http.server
import re
import socket
import ssl
import sys
import threading
import time
import urllib.error

import pytest
from test_data import (
    NOWHERE,
    as_mat,
    as_parquet,
    pretend_small_mnist,
    pretend_small_svhn,
    same,
)

import utils

BODY = bytes(range(256)) * 4000  # a megabyte: more than one piece
SHA = hashlib.sha256(BODY).hexdigest()[:8]


class Server:
    """`routes[path]` is bytes, or a function of the request's handler; `hits` lists the GETs."""

    def __init__(self):
        self.routes, self.hits = {}, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.hits.append(self.path)
                self.answer()

            def do_HEAD(self):
                self.answer()

            def answer(self):
                route = server.routes.get(self.path, refuses(404))
                with contextlib.suppress(ConnectionError):
                    route(self) if callable(route) else sends(route)(self)

            def log_message(self, *_):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()


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


def refuses(code):
    return lambda handler: handler.send_error(code)


def slow(body, seconds):
    def route(handler):
        time.sleep(seconds)
        sends(body)(handler)

    return route


def stalls(body, seconds):
    """Half the file, then silence."""

    def route(handler):
        sends(body[: len(body) // 2], announced=len(body))(handler)
        handler.wfile.flush()
        time.sleep(seconds)

    return route


def first_time(bad, good):
    """A route that behaves badly at the first GET only."""
    gets = []

    def route(handler):
        if handler.command == "GET":
            gets.append(handler.path)
        (bad if len(gets) == 1 else good)(handler)

    return route


@pytest.fixture
def server():
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture
def silent():
    """The address of a port that accepts and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)


@pytest.fixture
def path(tmp_path):
    """Where a downloaded file shall lie: alone in a folder that is not there yet."""
    return tmp_path / "weights" / "g.pth"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- one file ----


def test_a_file_is_fetched_once_checked_and_kept(path, server, capfd):
    server.routes["/g"] = BODY
    for _ in range(2):
        assert utils.download_once([f"{server.url}/g"], path, SHA).read_bytes() == BODY
    assert server.hits == ["/g"]
    assert names(path.parent) == ["g.pth"]
    assert socket.getdefaulttimeout() is None
    told = capfd.readouterr()
    assert f"{server.url}/g" in told.out
    assert told.err == ""


@pytest.mark.parametrize("fault", ["cut", "cut at once", "wrong"])
def test_a_cut_or_changed_file_is_tried_again(fault, path, server):
    bad = {
        "cut": sends(BODY[:500_000], announced=len(BODY)),
        "cut at once": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
        "wrong": sends(BODY[:-1] + b"!"),
    }[fault]
    server.routes["/g"] = first_time(bad, sends(BODY))
    utils.download_once([f"{server.url}/g"], path, SHA)
    assert path.read_bytes() == BODY
    assert server.hits == ["/g", "/g"]
    assert names(path.parent) == ["g.pth"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (refuses(404), "HTTP Error 404"),
        (refuses(503), "HTTP Error 503"),
        (sends(b"<html>log in</html>"), "invalid hash value"),
        (sends(BODY[:9], announced=len(BODY)), "invalid hash value"),
        (stalls(BODY, 1.5), "silent for"),
        (lambda handler: handler.wfile.write(b"220 smtp\r\n"), "BadStatusLine"),
    ],
)
def test_a_bad_address_is_told_and_the_next_one_serves(fault, says, path, server):
    server.routes |= {"/bad": fault, "/good": BODY}
    with pytest.raises(utils.DataError) as caught:
        utils.download_once([f"{server.url}/bad", f"{NOWHERE}/g"], path, SHA)
    message = str(caught.value)
    assert message.startswith("g.pth could not be downloaded.\nTried:\n")
    assert says in message
    assert f"{NOWHERE}/g: URLError: " in message
    assert "Connection refused" in message
    assert f"save the file as {path} (sha256 {SHA}" in message
    assert names(path.parent) == []  # nothing half-written
    utils.download_once([f"{server.url}/bad", f"{server.url}/good"], path, SHA)
    assert path.read_bytes() == BODY


def test_nothing_half_written_ever_has_the_true_name(path, server):
    server.routes["/g"] = stalls(BODY, 1.5)
    path.parent.mkdir()
    seen = set()

    def download():
        with contextlib.suppress(utils.DataError):
            utils.download_once([f"{server.url}/g"], path, SHA)

    worker = threading.Thread(target=download)
    worker.start()
    while worker.is_alive():
        seen |= set(names(path.parent))
        time.sleep(0.01)
    assert seen
    assert "g.pth" not in seen
    assert names(path.parent) == []


# ---- silence ----


def test_each_address_has_its_full_time_and_no_more(path, server, silent):
    server.routes["/g"] = slow(BODY, 0.3)
    start = time.monotonic()
    utils.download_once([f"{silent}/g", f"{server.url}/g"], path, SHA)
    assert utils.TIMEOUT < time.monotonic() - start < 5


def test_a_name_server_that_says_nothing_is_given_up(path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3) or [])
    start = time.monotonic()
    with pytest.raises(utils.DataError, match="silent for"):
        utils.download_once(["https://nowhere.invalid/g"], path, SHA)
    assert time.monotonic() - start < 2.5


def test_a_silent_network_costs_one_time_out_for_each_address(silent, monkeypatch):
    pretend_small_svhn(monkeypatch)
    monkeypatch.setattr(utils, "MNIST_HOST", f"{silent}/mnist")
    monkeypatch.setattr(utils, "SVHN_HOST", f"{silent}/svhn")
    monkeypatch.setenv("HF_ENDPOINT", f"{silent}/hub")
    start = time.monotonic()
    for load in (utils.load_mnist, utils.load_svhn):
        with pytest.raises(utils.DataError, match="silent for"):
            load()
    assert time.monotonic() - start < 3 * utils.TIMEOUT + 2


# ---- certificates ----


def test_a_client_with_certificates_of_its_own_is_tried_where_urllib_has_none(monkeypatch):
    problem = ssl.SSLCertVerificationError("certificate verify failed: no local issuer")

    def urlopen(*_, **__):
        raise urllib.error.URLError(problem)

    monkeypatch.setattr(utils.urllib.request, "urlopen", urlopen)
    sources = [("https://hub/f", lambda: "read")]
    assert utils.fetch_first("SVHN", sources, "?") == "read"
    with pytest.raises(
        utils.DataError, match=r"What to do: save it; .*certificates.*SSL_CERT_FILE"
    ):
        utils.fetch_first("SVHN", [("https://hub/f", urlopen)], "save it")


def test_what_to_do_names_certificates_only_where_they_are_the_trouble():
    with pytest.raises(utils.DataError) as caught:
        utils.fetch_first("SVHN", [(NOWHERE, str)], "run again", ["data/svhn: no such file"])
    assert "certificate" not in str(caught.value)
    assert "\n- data/svhn: no such file\n" in str(caught.value)


# ---- MNIST and SVHN over the network ----


def test_mnist_is_fetched_once(server, monkeypatch):
    train, test = pretend_small_mnist(monkeypatch)
    raw = utils.data_root() / "MNIST" / "raw"
    for file in list(raw.iterdir()):
        server.routes[f"/mnist/{file.name}"] = file.read_bytes()
        file.unlink()
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    monkeypatch.setattr(utils, "MNIST_HOST", f"{server.url}/mnist")
    for _ in range(2):
        data = utils.load_mnist()
        assert same(data.train, train)
        assert same(data.test, test)
    assert len(server.hits) == len(names(raw)) == 4


@pytest.fixture
def both_hosts(server, monkeypatch, tmp_path):
    """A small SVHN at its official address and at the mirror, on one server; the two splits."""
    splits = pretend_small_svhn(monkeypatch)
    hub = "/hub/datasets/ufldl-stanford/svhn/resolve/main/cropped_digits"
    for part, split in zip(("train", "test"), splits, strict=True):
        mat = as_mat(tmp_path / "server" / f"{part}_32x32.mat", split)
        monkeypatch.setitem(utils.SHA256, mat.name, utils.file_sha256(mat))
        server.routes[f"/official/{mat.name}"] = mat.read_bytes()
        parquet = as_parquet(tmp_path / "server" / f"{part}.parquet", split)
        server.routes[f"{hub}/{part}-00000-of-00001.parquet"] = parquet.read_bytes()
    monkeypatch.setattr(utils, "SVHN_HOST", f"{server.url}/official")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub")
    return splits


def cut_once(server, path):
    whole = server.routes[path]
    server.routes[path] = first_time(sends(whole[:-1000], announced=len(whole)), sends(whole))


def load_twice(splits):
    for _ in range(2):
        data = utils.load_svhn()
        assert (data.name, data.real) == ("SVHN", True)
        assert same(data.train, splits[0])
        assert same(data.test, splits[1])


def test_svhn_comes_from_the_official_address_though_cut_once(both_hosts, server):
    cut_once(server, "/official/train_32x32.mat")
    load_twice(both_hosts)
    assert server.hits == ["/official/train_32x32.mat"] * 2 + ["/official/test_32x32.mat"]
    assert names(utils.data_root()) == ["test_32x32.mat", "train_32x32.mat"]


def test_the_official_address_serves_without_huggingface_hub(both_hosts, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    load_twice(both_hosts)


def test_svhn_comes_from_the_mirror_though_cut_once(both_hosts, server, capfd):
    train, test = (path for path in server.routes if path.startswith("/hub"))
    for part in ("train", "test"):
        del server.routes[f"/official/{part}_32x32.mat"]
    cut_once(server, train)
    load_twice(both_hosts)
    assert [path for path in server.hits if path.startswith("/hub")] == [train, train, test]
    assert capfd.readouterr().err == ""


def test_a_wrong_file_on_the_mirror_is_not_used(both_hosts, server, tmp_path):
    (train, _) = (path for path in server.routes if path.startswith("/hub"))
    wrong = utils.Split(both_hosts[0].images, both_hosts[0].labels.clamp(max=8))
    server.routes[train] = as_parquet(tmp_path / "wrong.parquet", wrong).read_bytes()
    for part in ("train", "test"):
        del server.routes[f"/official/{part}_32x32.mat"]
    with pytest.raises(utils.DataError, match="counts"):
        utils.load_svhn()
