"""Downloads on a bad day, one fault at a time. Network: loopback only."""
# ruff: noqa: F811 (fixtures that come from test_data)

import contextlib
import functools
import hashlib
import http.server
import re
import socket
import sys
import threading
import time

import pytest
from test_data import as_mat, as_parquet, drawing, same, small_mnist, small_svhn  # noqa: F401

import utils

BODY = bytes(range(256)) * 4000  # a megabyte: more than one piece
SHA = hashlib.sha256(BODY).hexdigest()[:8]


class Server:
    """`routes[path]` is bytes, or a function of the request handler; `hits` lists the GETs."""

    def __init__(self):
        self.routes, self.hits = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.command == "GET":
                    outer.hits.append(self.path)
                route = outer.routes.get(self.path, refuses(404))
                with contextlib.suppress(ConnectionError):
                    (sends(route) if isinstance(route, bytes) else route)(self)

            def do_HEAD(self):
                self.wfile = DropBody(self.wfile)
                self.do_GET()

            def log_message(self, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()


class DropBody:
    """The connection of a HEAD request: whatever follows the headers is not sent."""

    def __init__(self, file):
        self.file, self.done = file, False

    def write(self, data):
        if not self.done:
            self.file.write(data)
        self.done = self.done or b"\r\n\r\n" in data
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def sends(body, announced=None):
    def route(handler):
        start = int(re.findall(r"\d+", handler.headers.get("Range") or "0")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str((announced or len(body)) - start))
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')  # as the hub does
        handler.send_header("X-Repo-Commit", "0" * 40)
        handler.end_headers()
        handler.wfile.write(body[start:])

    return route


def refuses(code):
    return lambda handler: handler.send_error(code)


def slow(body, seconds):
    return lambda handler: time.sleep(seconds) or sends(body)(handler)


def stalls(body, seconds):
    """Half the file, then silence."""

    def route(handler):
        sends(body[: len(body) // 2], announced=len(body))(handler)
        handler.wfile.flush()
        time.sleep(seconds)

    return route


class Once:
    """A route that behaves badly at the first GET only."""

    def __init__(self, bad, good):
        self.bad, self.good, self.calls = bad, good, 0

    def __call__(self, handler):
        self.calls += handler.command == "GET"
        (self.bad if self.calls == 1 else self.good)(handler)


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
def network(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(utils, "PATIENCE", 0.5)


def names(folder):
    """What a folder holds, but for the log that conftest puts there."""
    return sorted({path.name for path in folder.iterdir()} - {"progress.log"})


# ---- one file ----


def test_a_right_file_needs_no_network(tmp_path, server):
    path = tmp_path / "g.pth"
    path.write_bytes(BODY)
    assert utils.download_weights([f"{server.url}/g"], path, SHA) == path and server.hits == []


def test_a_file_is_fetched_checked_and_kept(tmp_path, server, capfd):
    server.routes["/g"] = BODY
    path = utils.download_weights([f"{server.url}/g"], str(tmp_path / "new" / "g.pth"), SHA)
    assert path.read_bytes() == BODY and names(path.parent) == ["g.pth"]
    told = capfd.readouterr()
    assert f"{server.url}/g" in told.out and "100%" in told.out and told.err == ""


@pytest.mark.parametrize("fault", ["cut", "cut at once", "wrong"])
def test_a_cut_connection_is_tried_again(fault, tmp_path, server):
    bad = {
        "cut": sends(BODY[:500_000], announced=len(BODY)),
        "cut at once": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
        "wrong": sends(BODY[:-1] + b"!"),
    }[fault]
    server.routes["/g"] = Once(bad, sends(BODY))
    utils.download_weights([f"{server.url}/g"], tmp_path / "g.pth", SHA)
    assert (tmp_path / "g.pth").read_bytes() == BODY and names(tmp_path) == ["g.pth"]
    assert server.hits == ["/g", "/g"]


@pytest.mark.parametrize(
    "fault, says",
    [
        (refuses(404), "HTTP Error 404"),
        (refuses(503), "HTTP Error 503"),
        (sends(b"<html>log in</html>"), "invalid hash value"),
        (sends(BODY[:9], announced=len(BODY)), "invalid hash value"),
        (lambda handler: handler.wfile.write(b"220 smtp\r\n"), "BadStatusLine"),
    ],
)
def test_a_bad_address_is_told_and_the_next_one_serves(fault, says, tmp_path, server):
    server.routes["/bad"] = fault
    path = tmp_path / "g.pth"
    path.write_bytes(b"damaged")
    with pytest.raises(utils.DataError) as caught:
        utils.download_weights([f"{server.url}/bad", "http://127.0.0.1:9/g"], path, SHA)
    message = str(caught.value)
    assert message.startswith("g.pth is not available here. Tried:\n") and says in message
    assert "http://127.0.0.1:9/g: URLError" in message and "Connection refused" in message
    assert f"save the file as {path} (sha256 {SHA}" in message
    assert names(tmp_path) == ["g.pth"]  # nothing half-written
    server.routes["/good"] = BODY
    utils.download_weights([f"{server.url}/bad", f"{server.url}/good"], path, SHA)
    assert path.read_bytes() == BODY


def test_nothing_half_written_has_the_true_name(tmp_path, server, monkeypatch):
    server.routes["/g"] = stalls(BODY, 1.5)
    worker = threading.Thread(
        target=lambda: pytest.raises(
            utils.DataError, utils.download_weights, [f"{server.url}/g"], tmp_path / "g.pth", SHA
        )
    )
    worker.start()
    seen = set()
    while worker.is_alive():
        seen |= set(names(tmp_path))
        time.sleep(0.01)
    assert seen and "g.pth" not in seen and names(tmp_path) == []


def test_faults_of_this_machine(tmp_path, server, monkeypatch):
    server.routes["/g"] = BODY
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file/g.pth", "folder.pth", "loop/g.pth"):
        with pytest.raises(utils.DataError, match="What to do"):
            utils.download_weights([f"{server.url}/g"], tmp_path / name, SHA)
    (tmp_path / "folder.pth").rmdir()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_atomically", full)
        with pytest.raises(utils.DataError, match="No space left"):
            utils.download_weights([f"{server.url}/g"], tmp_path / "g.pth", SHA)
    utils.download_weights([f"{server.url}/g"], tmp_path / "g.pth", SHA)
    assert names(tmp_path) == ["file", "g.pth", "loop"]


def test_the_time_out_is_gone_afterwards(tmp_path, server):
    server.routes["/g"] = BODY
    utils.download_weights([f"{server.url}/g"], tmp_path / "g.pth", SHA)
    assert socket.getdefaulttimeout() is None and sys.stderr is not sys.stdout


# ---- silence ----


def test_silent_https_and_slow_good_http(tmp_path, server, silent):
    """Each address has its full patience, whatever another did."""
    server.routes["/g"] = slow(BODY, 0.3)
    start = time.monotonic()
    utils.download_weights([f"{silent}/g", f"{server.url}/g"], tmp_path / "g.pth", SHA)
    assert 0.5 < time.monotonic() - start < 3
    start = time.monotonic()
    utils.download_weights([f"{server.url}/g", f"{silent}/g"], tmp_path / "h.pth", SHA)
    assert time.monotonic() - start < 3


def test_a_name_server_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(5) or [])
    start = time.monotonic()
    with pytest.raises(utils.DataError, match="silent for"):
        utils.download_weights(["https://nowhere.invalid/g"], tmp_path / "g.pth", SHA)
    assert time.monotonic() - start < 2


def test_a_silent_network_costs_patience_once_for_each_address(
    small_svhn, silent, tmp_path, monkeypatch
):
    monkeypatch.setattr(utils, "MNIST_HOST", f"{silent}/a")
    monkeypatch.setattr(utils, "SVHN_HOST", f"{silent}/c")
    monkeypatch.setenv("HF_ENDPOINT", f"{silent}/hub")
    start = time.monotonic()
    weights = functools.partial(utils.download_weights, [f"{silent}/g"], tmp_path / "g.pth", SHA)
    for get in (utils.load_handwritten, utils.load_street, weights, weights):
        with pytest.raises(utils.DataError, match="silent for"):
            get()
    assert time.monotonic() - start < 5 * utils.PATIENCE + 1  # 10 s each: 50 s in all


# ---- MNIST and SVHN over the network ----


def test_mnist_is_fetched_once(small_mnist, server, monkeypatch):
    raw = utils.data_root() / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        server.routes[f"/mnist/{path.name}"] = path.read_bytes()
        path.unlink()
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    monkeypatch.setattr(utils, "MNIST_HOST", f"{server.url}/mnist")
    for _ in range(2):
        data = utils.load_handwritten()
        assert data.real and same(data.train, small_mnist[0]) and same(data.test, small_mnist[1])
    assert len(server.hits) == 4 and len(names(raw)) == 4


@pytest.fixture
def official(small_svhn, server, monkeypatch, tmp_path):
    """The official address with two small files; returns the two splits."""
    for part, split in zip(("train", "test"), small_svhn, strict=True):
        name = f"{part}_32x32.mat"
        content = as_mat(tmp_path / "server" / name, split).read_bytes()
        server.routes[f"/official/{name}"] = content
        monkeypatch.setitem(utils.FILES, name, hashlib.sha256(content).hexdigest()[:16])
        content = as_parquet(tmp_path / "server" / f"{part}.parquet", split).read_bytes()
        path = f"/hub/datasets/ufldl-stanford/svhn/resolve/main/cropped_digits/{part}"
        server.routes[f"{path}-00000-of-00001.parquet"] = content
    monkeypatch.setattr(utils, "SVHN_HOST", f"{server.url}/official")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub")
    return small_svhn


def load_twice(splits, server):
    for _ in range(2):
        data = utils.load_street()
        assert data.name == "SVHN" and same(data.train, splits[0]) and same(data.test, splits[1])
        hits, server.hits = server.hits, []
        yield hits


def test_svhn_from_the_official_address_cut_once(official, server):
    path = "/official/train_32x32.mat"
    whole = server.routes[path]
    server.routes[path] = Once(sends(whole[:-1000], announced=len(whole)), sends(whole))
    first, second = load_twice(official, server)
    assert first == [path, path, "/official/test_32x32.mat"] and second == []
    assert names(utils.data_root()) == ["test_32x32.mat", "train_32x32.mat"]


def test_svhn_from_the_mirror_cut_once(official, server, capfd):
    """The hub's client resumes by itself; nothing reaches stderr."""
    (train, test) = [path for path in server.routes if path.startswith("/hub")]
    for part in ("train", "test"):
        del server.routes[f"/official/{part}_32x32.mat"]
    whole = server.routes[train]
    server.routes[train] = Once(sends(whole[:-1000], announced=len(whole)), sends(whole))
    first, second = load_twice(official, server)
    assert [path for path in first if "cropped" in path] == [train, train, test] and second == []
    assert capfd.readouterr().err == ""


def test_one_part_is_here_and_the_other_comes(official, server):
    as_parquet(utils.data_root() / "svhn" / "train-0.parquet", official[0])
    first, second = load_twice(official, server)
    assert first == ["/official/test_32x32.mat"] and second == []


def test_svhn_from_nowhere(official, server, monkeypatch, capsys):
    server.routes.clear()
    with pytest.raises(utils.DataError) as caught:
        utils.load_street()
    message = str(caught.value)
    for tried in (
        "train_32x32.mat: FileNotFoundError", "svhn/train-*.parquet", "/official/train",
        "HTTP Error 404", "/hub/datasets/ufldl-stanford/svhn",
    ):  # fmt: skip
        assert tried in message
    assert f"put train_32x32.mat and test_32x32.mat into {utils.data_root()}" in message
    stand_in = drawing(monkeypatch, *official)
    monkeypatch.setenv("A3_DATA", "auto")
    capsys.readouterr()
    assert utils.load_street() == stand_in
    told = capsys.readouterr().out
    assert "drawn digits in place of SVHN" in told and "HTTP Error 404" in told


def test_a_wrong_file_on_the_mirror_is_not_used(official, server, tmp_path):
    (train, _) = [path for path in server.routes if path.startswith("/hub")]
    labels = [1] * 20 + official[0].labels[20:].tolist()
    path = as_parquet(tmp_path / "wrong.parquet", official[0], labels)
    server.routes[train] = path.read_bytes()
    for part in ("train", "test"):
        del server.routes[f"/official/{part}_32x32.mat"]
    with pytest.raises(utils.DataError, match="counts"):
        utils.load_street()
