"""Question 3: noise, paths and walks of the notebook; strict loading and the choice of a model."""

import json

import pytest
import torch
from torch.testing import assert_close

import utils

biggan = pytest.importorskip("pytorch_pretrained_biggan")
CPU = torch.device("cpu")


def random_biggan(**changes) -> torch.nn.Module:
    """A small BigGAN with random weights whose eval mode gives finite images of 32 x 32."""
    layers = [(True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)]
    config = {"output_dim": 32, "z_dim": 8, "channel_width": 8, "num_classes": 20, "layers": layers}
    torch.manual_seed(0)
    model = biggan.BigGAN(biggan.BigGANConfig(**config | {"attention_layer_position": 2} | changes))
    torch.nn.init.ones_(model.generator.bn.weight)
    torch.nn.init.zeros_(model.generator.bn.bias)
    with torch.no_grad():
        for _ in range(20):  # spectral norm's power iterations settle in train mode only
            model.train()(torch.randn(2, 8), torch.eye(config["num_classes"])[:2], 1.0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gan(nb):
    names = [f"{world} {digit}" for world in ("SVHN", "MNIST") for digit in range(10)]
    return nb.Generator(random_biggan(), "random", "random weights", names, 8, 32)


# ---- paths ----


@pytest.mark.parametrize("how", ["slerp", "lerp"])
@pytest.mark.parametrize("between", [0, 1, 8])
def test_path_has_exact_ends_and_is_symmetric(nb, how, between):
    a, b = nb.truncated_noise(2, 32, 0.8, seed=3)
    points = nb.path(a, b, between, getattr(nb, how))
    assert points.shape == (between + 2, 32)
    assert torch.equal(points[0], a) and torch.equal(points[-1], b)
    assert_close(nb.path(b, a, between, getattr(nb, how)).flip(0), points, atol=1e-5, rtol=1e-4)


def test_slerp_turns_evenly_and_its_length_is_even(nb):
    a, b = nb.truncated_noise(2, 32, 0.8, seed=3)
    t = torch.linspace(0, 1, 11)
    points = nb.slerp(a, 3 * b, t)
    lengths = points.norm(dim=1)
    assert_close(lengths, torch.lerp(a.norm(), 3 * b.norm(), t), rtol=1e-5, atol=1e-5)
    unit = points / lengths[:, None]
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1).clamp(-1, 1))
    assert_close(angles, angles.mean().expand(10), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0, 1 + 1e-6])
def test_slerp_falls_back_to_the_line(nb, factor):
    a, t = nb.truncated_noise(1, 32, 0.8, seed=3)[0], torch.linspace(0, 1, 5)
    points = nb.slerp(a, factor * a, t)
    assert points.isfinite().all()
    assert_close(points, nb.lerp(a, factor * a, t))


def test_class_weights_stay_a_mixture(nb, gan):
    z, c = nb.walk(gan, ("SVHN 1", "MNIST 8"), 0.5, seed=0)
    assert z.shape == (10, 8) and c.shape == (10, 20)
    assert (c >= 0).all()
    assert_close(c.sum(1), torch.ones(10))
    _, same = nb.walk(gan, ("SVHN 1", "SVHN 1"), 0.5, seed=0)
    assert torch.equal(same, same[:1].expand(10, -1))


# ---- noise, classes, images ----


def test_noise_is_truncated_and_seeded(nb):
    z = nb.truncated_noise(500, 32, 0.4, seed=1)
    assert 0.7 < z.abs().max() <= 0.8
    assert abs(z.std() / 0.4 - 0.88) < 0.02  # a unit normal cut to -2..2 has std 0.880
    assert torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=1))
    assert not torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=2))
    for truncation in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="truncation"):
            nb.truncated_noise(1, 8, truncation, seed=0)


def test_class_names(nb):
    from torchvision.models._meta import _IMAGENET_CATEGORIES as names

    assert len(names) == 1000 and nb.class_vector("volcano", names).argmax() == 980
    assert {"volcano", "daisy", "peacock", "balloon", "jellyfish"} <= set(names)
    with pytest.raises(ValueError, match="vulcano"):
        nb.class_vector("vulcano", names)


def test_generate_gives_the_ends_and_leaves_the_model_alone(nb, gan):
    before = {k: v.clone() for k, v in gan.model.state_dict().items()}
    z, c = nb.walk(gan, ("SVHN 2", "MNIST 5"), 0.7, seed=5)
    images = nb.generate(gan, z, c, 0.7)
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1
    assert torch.equal(images, nb.generate(gan, z, c, 0.7))
    assert_close(images[[0, -1]], nb.generate(gan, z[[0, -1]], c[[0, -1]], 0.7), atol=1e-4, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in gan.model.state_dict().items())


def test_measures_of_a_walk_and_of_the_digit_model(nb, gan):
    even = torch.linspace(-1, 1, 5).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    assert_close(nb.step_sizes(even), torch.full((4,), 63.75))  # a quarter of 255 gray levels
    labels = torch.tensor([3, 13, 19])
    split = nb.digit_images(gan, labels, seed=0)
    assert split.labels.tolist() == [3, 3, 9] and split.images.dtype == torch.uint8
    gray = nb.as_task(split, 28)
    assert gray.images.shape == (3, 1, 28, 28)
    assert torch.equal(gray.images, nb.gray(split).images[..., 2:30, 2:30])
    color = nb.in_color(gray)
    assert color.shape == (3, 3, 32, 32) and (color[:, :, :2] == -1).all()
    assert torch.equal(color[:, 0], color[:, 2])


# ---- loading ----


def served(monkeypatch, path) -> dict:
    """Let `path` stand in for the download, and a narrow network for the large one."""
    seen, published = {}, biggan.BigGAN

    def narrow(config):
        seen["layers"], config.channel_width = config.layers, 8
        torch.manual_seed(0)
        return published(config)

    monkeypatch.setattr(biggan, "BigGAN", narrow)
    monkeypatch.setattr(utils, "download_weights", lambda urls, path_, sha: path)
    return seen


def test_deep_256_has_the_published_layers_and_loads_strictly(nb, monkeypatch, tmp_path):
    path = tmp_path / "deep.bin"
    seen = served(monkeypatch, path)
    config = biggan.BigGANConfig(output_dim=256)
    config.layers = [*config.layers[:5], (True, 8, 8), (False, 8, 8), *config.layers[5:]]
    state = biggan.BigGAN(config).state_dict()
    torch.save(state, path)
    gan = nb.load_biggan_deep("biggan-deep-256")
    assert (gan.size, gan.z_dim, len(gan.classes)) == (256, 128, 1000)
    assert not gan.model.training
    layers = seen["layers"]
    assert len(layers) == 12 and sum(layer[0] for layer in layers) == 6  # from 4 to 256 pixels
    assert all(a[2] == b[1] for a, b in zip(layers, layers[1:], strict=False))
    state["extra"] = state.pop("embeddings.weight")
    torch.save(state, path)
    with pytest.raises(RuntimeError, match=r"embeddings.weight(.|\n)*extra"):
        nb.load_biggan_deep("biggan-deep-256")


@pytest.fixture
def finding(nb, monkeypatch, gan):
    """find_biggan of a full run, where offline/ gives `gan` and the network nothing."""
    names = nb.find_biggan.__globals__

    def refuse(name):
        raise utils.DataError(f"{name} is not available here. Tried:\n- nowhere")

    monkeypatch.setitem(names, "FULL", True)
    monkeypatch.setitem(names, "load_biggan_deep", refuse)
    module = type("M", (), {"load_digit_biggan": staticmethod(lambda device: gan)})
    monkeypatch.setattr(utils, "offline_module", lambda name: module)
    return names


def test_the_best_generator_that_can_be_had(nb, finding, monkeypatch, gan):
    found, why_not = nb.find_biggan("auto")
    assert found is gan and "256 is not available here; biggan-deep-128: " in why_not
    with pytest.raises(utils.DataError):  # one asked for by name is never replaced
        nb.find_biggan("biggan-deep-128")
    monkeypatch.undo()
    monkeypatch.setattr(utils, "OFFLINE", utils.Path("nowhere"))
    found, why_not = nb.find_biggan("auto")
    assert found is None and "offline/" in why_not


def test_tiny_and_embedded_runs_ask_no_network(nb, finding, monkeypatch, gan):
    monkeypatch.setitem(finding, "load_biggan_deep", lambda _: pytest.fail("asked the network"))
    with monkeypatch.context() as patch:
        patch.setenv("A3_DATA", "embedded")
        assert nb.find_biggan("auto")[0] is gan
    monkeypatch.setitem(finding, "FULL", False)
    found, why_not = nb.find_biggan("auto")
    assert found is gan and "tiny" in why_not


def test_the_128_model_comes_from_the_hub_and_is_told_when_it_does_not(nb, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(utils.DataError, match="127.0.0.1:9/osanseviero/BigGAN-deep-128/resolve"):
        nb.load_biggan_deep("biggan-deep-128")


def test_unknown_names_list_the_valid_ones(nb):
    with pytest.raises(ValueError, match="biggan-deep-128"):
        nb.find_biggan("biggan-512")


# ---- the committed digit model ----


def test_committed_digit_model(nb):
    if not (utils.OFFLINE / "digit_biggan.py").is_file():
        pytest.skip("offline/digit_biggan.py is not here")
    digits = utils.offline_module("digit_biggan")
    gan, evaluator = digits.load_digit_biggan(CPU), digits.load_evaluation_classifier(CPU)
    assert gan.classes == [f"{w} {d}" for w in ("SVHN", "MNIST") for d in range(10)]
    labels = torch.arange(20).repeat(25)
    images = utils.to_float(nb.digit_images(gan, labels, seed=1).images)
    assert (nb.named_as(evaluator, images) == labels).float().mean() > 0.85
    log = json.loads((utils.OFFLINE / "digit_biggan_log.json").read_text(encoding="utf-8"))
    assert {"settings", "checkpoints"} <= set(log)
