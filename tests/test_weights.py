"""Weights that others or we trained: loaded strictly, tried before use, replaced with a reason."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import utils
from offline import digit_biggan, street_numbers

biggan = pytest.importorskip("pytorch_pretrained_biggan")
CPU = torch.device("cpu")
OUR_G = digit_biggan.WEIGHTS / "street_classifier.pt"


def no_network(*_):
    raise utils.DataError("It could not be downloaded.\nTried:\n- nowhere\nWhat to do: wait.")


# ---- strict loading ----


def test_weights_fill_a_model_in_its_own_type_and_eval_mode(tmp_path):
    half = {name: value.half() for name, value in nn.Linear(3, 2).state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    model = utils.load_weights(nn.Linear(3, 2), tmp_path / "half.pt")
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, half["weight"].float())
    assert not model.training


@pytest.mark.parametrize("fault", ["cut", "text", "empty", "a key too many", "a key less", "shape"])
def test_a_damaged_or_foreign_file_is_named(fault, tmp_path):
    path = tmp_path / "weights.pt"
    state = nn.Linear(3, 2).state_dict()
    changes = {"a key too many": {"extra": torch.ones(1)}, "shape": {"bias": torch.ones(3)}}
    state |= changes.get(fault, {})
    if fault == "a key less":
        del state["bias"]
    torch.save(state, path)
    contents = {"cut": path.read_bytes()[:300], "text": b"<html>", "empty": b""}
    path.write_bytes(contents.get(fault, path.read_bytes()))
    with pytest.raises(RuntimeError, match=r"weights\.pt is not a file of these weights"):
        utils.load_weights(nn.Linear(3, 2), path)
    with pytest.raises(FileNotFoundError):
        utils.load_weights(nn.Linear(3, 2), tmp_path / "none.pt")
    with pytest.raises(OSError, match="directory"):
        utils.load_weights(nn.Linear(3, 2), tmp_path)


# ---- g ----


@pytest.fixture(scope="module")
def street():
    split = utils.Split(*street_numbers.render_street_numbers(500, 1))
    return utils.DigitData("rendered street numbers", split, split, real=False)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Let our weights, with the classes moved by `shift`, be the published file."""

    def publish(shift):
        state = torch.load(OUR_G, weights_only=True)
        for name in ("classifier.0.weight", "classifier.0.bias"):
            state[name] = state[name].roll(shift, 0)
        torch.save(state, tmp_path / "svhn-f564f3d8.pth")
        monkeypatch.setattr(utils, "download_once", lambda *_: tmp_path / "svhn-f564f3d8.pth")

    return publish


def test_class_k_of_the_published_g_is_the_digit_k_plus_1(nb, street, publish, capsys):
    publish(shift=-1)
    model = nb.StreetClassifier()
    origin = utils.load_g(model, replace(street, name="SVHN", real=True), CPU)
    assert origin == "the starter's published weights, svhn-f564f3d8.pth"
    assert utils.percent_right(model, street.train, CPU) > 90
    assert not model.training
    assert capsys.readouterr().out == ""


def test_a_published_g_that_reads_fewer_than_90_percent_is_left_out(nb, street, publish, capsys):
    publish(shift=0)
    model = nb.StreetClassifier()
    origin = utils.load_g(model, replace(street, name="SVHN", real=True), CPU)
    assert origin == "this project's weights, offline/weights/street_classifier.pt"
    assert utils.percent_right(model, street.train, CPU) > 90
    assert "Not used: the starter's published weights, svhn-f564f3d8.pth: 0." in (
        capsys.readouterr().out
    )


def test_a_g_that_cannot_be_downloaded_is_told_in_one_line(nb, street, monkeypatch, capsys):
    monkeypatch.setattr(utils, "download_once", no_network)
    assert utils.load_g(nb.StreetClassifier(), replace(street, name="SVHN", real=True), CPU)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("It could not be downloaded.")


def test_the_published_g_is_not_asked_for_with_a_stand_in(nb, street, monkeypatch):
    monkeypatch.setattr(utils, "download_once", lambda *_: pytest.fail("asked the network"))
    assert "this project's" in utils.load_g(nb.StreetClassifier(), street, CPU)


@pytest.mark.parametrize("fault", ["labels of another set", "another file", "no folder"])
def test_without_a_usable_g_there_is_no_origin(fault, nb, street, monkeypatch, tmp_path):
    if fault == "labels of another set":
        train = utils.Split(street.train.images, 9 - street.train.labels)
        street = replace(street, train=train)
    elif fault == "another file":
        (tmp_path / "weights").mkdir()
        for suffix in (".pt", ".json"):
            content = OUR_G.with_suffix(suffix).read_bytes()
            content = content.replace(b'"sha256": "', b'"sha256": "0')
            (tmp_path / "weights" / OUR_G.with_suffix(suffix).name).write_bytes(content)
        monkeypatch.setattr(utils, "OFFLINE", tmp_path)
    else:
        monkeypatch.setattr(utils, "OFFLINE", tmp_path / "nowhere")
    assert utils.load_g(nb.StreetClassifier(), street, CPU) is None


# ---- the generator ----


@pytest.fixture
def narrow(monkeypatch, tmp_path):
    """Let the network be narrow, and `path` the file that is downloaded."""
    path, published = tmp_path / "deep.bin", biggan.BigGAN

    def narrow_biggan(config):
        config.channel_width = 8
        return published(config)

    monkeypatch.setattr(biggan, "BigGAN", narrow_biggan)
    monkeypatch.setattr(utils, "download_once", lambda *_: path)
    return path


def test_biggan_deep_256_has_the_published_layers_and_loads_strictly(narrow):
    config = biggan.BigGANConfig(output_dim=256)
    config.layers = [*config.layers[:5], (True, 8, 8), (False, 8, 8), *config.layers[5:]]
    state = biggan.BigGAN(config).state_dict()
    torch.save(state, narrow)
    generator, why_not = utils.load_biggan("auto", "full", CPU)
    assert (generator.name, why_not) == ("biggan-deep-256", "")
    assert (generator.size, generator.z_dim, len(generator.classes)) == (256, 128, 1000)
    assert generator.classes[980] == "volcano"
    assert {"volcano", "daisy", "peacock", "balloon", "jellyfish"} <= set(generator.classes)
    assert not generator.model.training
    doubling = [doubles for doubles, _, _ in generator.model.config.layers]
    assert (len(doubling), sum(doubling)) == (12, 6)  # from 4 to 256 pixels
    state["extra"] = state.pop("embeddings.weight")
    torch.save(state, narrow)
    with pytest.raises(RuntimeError, match=r"embeddings.weight(.|\n)*extra"):
        utils.load_biggan("biggan-deep-256", "full", CPU)


def test_biggan_deep_lies_with_the_data_not_with_the_runs(monkeypatch):
    paths = []

    def download_once(urls, path, digest):
        paths.append(path)
        no_network()

    monkeypatch.setattr(utils, "download_once", download_once)
    with pytest.raises(utils.DataError):
        utils.load_biggan("biggan-deep-256", "full", CPU)
    assert paths == [utils.data_root() / "biggan-deep-256.bin"]


def test_a_full_run_without_network_falls_back_to_the_digit_model_and_says_why(monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)
    monkeypatch.setattr(utils, "BIGGAN_256", "http://127.0.0.1:9/deep")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    generator, why_not = utils.load_biggan("auto", "full", CPU)
    assert (generator.name, generator.size) == ("biggan-digits-32", 32)
    assert generator.classes == [f"{kind} {d}" for kind in ("SVHN", "MNIST") for d in range(10)]
    assert not generator.model.training
    failed = [
        "biggan-deep-256.bin could not be downloaded",
        "biggan-deep-128 could not be downloaded",
    ]
    assert why_not == "; ".join(failed)
    with pytest.raises(utils.DataError, match="osanseviero/BigGAN-deep-128/resolve"):
        utils.load_biggan("biggan-deep-128", "full", CPU)  # one asked for by name is not replaced


@pytest.mark.parametrize(
    ("profile", "data"), [("tiny", "auto"), ("short", "auto"), ("full", "embedded")]
)
def test_tiny_short_and_embedded_runs_do_not_ask_for_biggan_deep(profile, data, monkeypatch):
    monkeypatch.setattr(utils, "load_biggan_deep", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setenv("A3_DATA", data)
    generator, why_not = utils.load_biggan("auto", profile, CPU)
    assert generator.name == "biggan-digits-32"
    assert "only a full run on real data" in why_not


@pytest.mark.parametrize("profile", ["full", "tiny"])
def test_a_lone_notebook_without_network_has_no_generator(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "load_biggan_deep", no_network)
    monkeypatch.setattr(utils, "OFFLINE", tmp_path / "nowhere")
    generator, why_not = utils.load_biggan("auto", profile, CPU)
    assert generator is None
    assert why_not.endswith("needs the whole project, with its folder offline/")


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="digits, biggan-deep-256 or biggan-deep-128"):
        utils.load_biggan("biggan-512", "full", CPU)
