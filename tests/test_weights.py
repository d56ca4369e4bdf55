"""Weights that others or we trained: loaded strictly, tried before use, replaced with a reason."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CPU, NOWHERE
from torch import nn

import utils
from offline import digit_biggan, street_numbers

biggan = pytest.importorskip("pytorch_pretrained_biggan")
OUR_G = digit_biggan.WEIGHTS / "street_classifier.pt"


def test_weights_fill_a_model_in_its_own_type_and_eval_mode(tmp_path):
    half = {name: value.half() for name, value in nn.Linear(3, 2).state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    model = utils.load_weights(nn.Linear(3, 2), tmp_path / "half.pt")
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, half["weight"].float())
    assert not model.training


def test_a_missing_damaged_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match=r"weights\.pt"):
        utils.load_weights(nn.Linear(3, 2), path)
    for foreign in (nn.Linear(3, 2, bias=False), nn.Linear(3, 1), nn.BatchNorm1d(2)):
        torch.save(foreign.state_dict(), path)
        with pytest.raises(RuntimeError, match=r"weights\.pt is not a file of these weights"):
            utils.load_weights(nn.Linear(3, 2), path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(RuntimeError, match=r"weights\.pt is not a file of these weights"):
        utils.load_weights(nn.Linear(3, 2), path)


@pytest.fixture(scope="module")
def svhn():
    """What passes for real SVHN here."""
    split = utils.Split(*street_numbers.render_street_numbers(500, 1))
    return utils.DigitData("SVHN", split, split, real=True)


PUBLISHED = "the starter's published weights"
OURS = "this project's weights, offline/weights/street_classifier.pt"


@pytest.mark.parametrize("shift", [-1, 0])
def test_class_k_of_the_published_g_is_the_digit_k_plus_1_else_it_is_left_out(
    nb, svhn, shift, tmp_path, monkeypatch
):
    """Our weights, with the classes moved by `shift`, are the published file."""
    state = torch.load(OUR_G, weights_only=True)
    for name in ("classifier.0.weight", "classifier.0.bias"):
        state[name] = state[name].roll(shift, 0)
    torch.save(state, tmp_path / "svhn.pth")
    monkeypatch.setattr(utils, "verified_file", lambda *_: tmp_path / "svhn.pth")
    model = nb.StreetClassifier()
    assert utils.load_trained_g(model, svhn, CPU) == (PUBLISHED if shift == -1 else OURS)
    assert utils.classifier_accuracy(model, svhn.train, CPU) > 90
    assert not model.training


def test_a_g_that_cannot_be_downloaded_is_told_in_one_line(nb, svhn, monkeypatch, capsys):
    monkeypatch.setattr(utils, "PUBLISHED_G_URLS", [NOWHERE])
    assert "this project's" in utils.load_trained_g(nb.StreetClassifier(), svhn, CPU)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("svhn-f564f3d8.pth could not be downloaded.")


def test_a_stand_in_gets_our_g_alone_and_none_where_it_reads_other_labels(nb, svhn, monkeypatch):
    monkeypatch.setattr(utils, "load_published_g", lambda _: pytest.fail("downloaded"))
    stand_in = replace(svhn, real=False)
    assert utils.load_trained_g(nb.StreetClassifier(), stand_in, CPU) == OURS
    reversed_labels = utils.Split(svhn.train.images, 9 - svhn.train.labels)
    stand_in = replace(stand_in, train=reversed_labels)
    assert utils.load_trained_g(nb.StreetClassifier(), stand_in, CPU) is None


def test_biggan_deep_256_has_the_published_layers_and_loads_strictly(monkeypatch):
    monkeypatch.setattr(biggan, "BigGANConfig", partial(biggan.BigGANConfig, channel_width=8))
    config = biggan.BigGANConfig(output_dim=256)
    config.layers = [*config.layers[:5], (True, 8, 8), (False, 8, 8), *config.layers[5:]]
    state = biggan.BigGAN(config).state_dict()

    def publish():
        path = utils.data_root() / "biggan-deep-256.bin"
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
        monkeypatch.setattr(utils, "BIGGAN_256_SHA256_PREFIX", utils.file_sha256(path))

    publish()
    generator, why_not = utils.best_generator("auto", "full", CPU)
    assert (generator.name, why_not) == ("biggan-deep-256", "")
    assert (generator.size, generator.z_dim, len(generator.classes)) == (256, 128, 1000)
    assert generator.classes[980] == "volcano"
    assert not generator.model.training
    state["extra"] = state.pop("embeddings.weight")
    publish()
    with pytest.raises(RuntimeError, match=r"embeddings.weight(.|\n)*extra"):
        utils.best_generator("biggan-deep-256", "full", CPU)


def test_a_stored_biggan_deep_128_needs_no_network(monkeypatch):
    monkeypatch.setattr(biggan, "BigGANConfig", partial(biggan.BigGANConfig, channel_width=8))
    monkeypatch.setattr(utils, "fetch_from_any", None)
    path = utils.data_root() / "biggan-deep-128" / "pytorch_model.bin"
    path.parent.mkdir(parents=True)
    torch.save(biggan.BigGAN(biggan.BigGANConfig()).state_dict(), path)
    assert utils.load_generator("biggan-deep-128", CPU).size == 128


def test_a_full_run_without_downloads_falls_back_to_the_digit_model_and_says_why(monkeypatch):
    monkeypatch.setattr(utils, "BIGGAN_256_URL", NOWHERE)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    generator, why_not = utils.best_generator("auto", "full", CPU)
    assert (generator.name, generator.size) == ("biggan-digits-32", 32)
    assert generator.classes == [f"{kind} {d}" for kind in ("SVHN", "MNIST") for d in range(10)]
    assert not generator.model.training
    failed = "biggan-deep-256.bin could not be downloaded; biggan-deep-128 could not be downloaded"
    assert why_not == failed
    with pytest.raises(utils.DataError, match="osanseviero/BigGAN-deep-128/resolve"):
        utils.best_generator(
            "biggan-deep-128", "full", CPU
        )  # one asked for by name is not replaced


@pytest.mark.parametrize(("profile", "data"), [("short", "auto"), ("full", "embedded")])
def test_short_and_embedded_runs_do_not_ask_for_biggan_deep(profile, data, monkeypatch):
    monkeypatch.setenv("A3_DATA", data)
    generator, why_not = utils.best_generator("auto", profile, CPU)
    assert generator.name == "biggan-digits-32"
    assert why_not == "BigGAN-deep is downloaded in a full run only, and not with A3_DATA=embedded"


def test_a_lone_notebook_without_downloads_has_no_generator(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "OFFLINE_FOLDER", tmp_path / "nowhere")
    generator, why_not = utils.best_generator("auto", "short", CPU)
    assert generator is None
    assert why_not.endswith("needs the whole project, with its folder offline/")
