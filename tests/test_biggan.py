"""Question 3: the paths, the drawing, the loaders of BigGAN, and the committed digit model."""

import http.server
import importlib.util
import json
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("pytorch_pretrained_biggan")
import utils  # noqa: E402

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
TINY = {
    "output_dim": 32,
    "z_dim": 8,
    "channel_width": 8,
    "layers": [(True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)],
    "attention_layer_position": 2,
}


needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "biggan_digits.pt").exists(), reason="weights/biggan_digits.py has not been run"
)


@pytest.fixture(scope="module")
def gan() -> utils.BigGANModel:
    """The digit model; without its trained weights the same network with random ones."""
    if (WEIGHTS / "biggan_digits.pt").exists():
        return utils.load_digit_biggan(WEIGHTS)
    from pytorch_pretrained_biggan import BigGAN

    torch.manual_seed(0)
    model = BigGAN(utils.digit_biggan_config())
    for module in model.modules():
        for name in ("running_vars", "weight"):  # the library leaves these at zero
            table = getattr(module, name, None)
            if hasattr(module, "running_vars") and table is not None:
                torch.nn.init.ones_(table)
    with torch.no_grad():
        for _ in range(20):  # spectral norm's power iterations settle in train mode only
            model.train()(torch.randn(2, utils.DIGIT_Z), torch.eye(20)[:2], 1.0)
    model.eval().requires_grad_(False)
    names = utils.DIGIT_CLASSES
    return utils.BigGANModel(model, "random", "random weights", names, utils.DIGIT_Z, 32)


def noise_pair(d: int = 32) -> torch.Tensor:
    return torch.randn(2, d, generator=torch.Generator().manual_seed(3))


# ---- paths ----


@pytest.mark.parametrize("how", ["slerp", "lerp"])
@pytest.mark.parametrize("between", [0, 1, 8])
def test_path_has_exact_ends_and_even_steps(nb, how, between):
    a, b = noise_pair()
    walk = nb.path(a, b, between, getattr(nb, how))
    assert walk.shape == (between + 2, 32)
    assert torch.equal(walk[0], a) and torch.equal(walk[-1], b)
    back = nb.path(b, a, between, getattr(nb, how))
    assert_close(back.flip(0), walk, atol=1e-5, rtol=1e-4)


def test_path_refuses_negative_count(nb):
    with pytest.raises(ValueError, match="between"):
        nb.path(*noise_pair(), -1)


def test_slerp_turns_evenly_and_its_length_is_even(nb):
    a, b = noise_pair()
    t = torch.linspace(0, 1, 11)
    walk = nb.slerp(a, 3 * b, t)
    lengths = walk.norm(dim=1)
    assert_close(lengths, a.norm() + t * (3 * b.norm() - a.norm()), rtol=1e-5, atol=1e-5)
    unit = walk / lengths[:, None]
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1).clamp(-1, 1))
    assert_close(angles, angles.mean().expand(10), rtol=1e-3, atol=1e-4)


def test_slerp_known_quarter_circle(nb):
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert_close(nb.slerp(a, b, torch.tensor([0.5]))[0], torch.full((2,), 2**0.5))


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0, 1 + 1e-6])
def test_slerp_falls_back_to_the_line(nb, factor):
    a, _ = noise_pair()
    t = torch.linspace(0, 1, 5)
    walk = nb.slerp(a, factor * a, t)
    assert walk.isfinite().all()
    assert_close(walk, nb.lerp(a, factor * a, t))


def test_class_weights_stay_a_mixture(nb, gan):
    z, c = nb.walk_between(gan, ("street 1", "handwritten 8"), 0.5, seed=0)
    assert z.shape == (10, gan.z_dim) and c.shape == (10, 20)
    assert (c >= 0).all()
    assert_close(c.sum(1), torch.ones(10))
    _, same = nb.walk_between(gan, ("street 1", "street 1"), 0.5, seed=0)
    assert torch.equal(same, same[:1].expand(10, -1))


# ---- noise and classes ----


def test_noise_is_truncated_and_seeded(nb):
    z = nb.truncated_noise(500, 32, 0.4, seed=1)
    assert z.abs().max() <= 0.8 and z.abs().max() > 0.7
    assert abs(z.std() / 0.4 - 0.88) < 0.02  # a unit normal cut to -2..2 has std 0.880
    assert torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=1))
    assert not torch.equal(z, nb.truncated_noise(500, 32, 0.4, seed=2))


@pytest.mark.parametrize("truncation", [0.0, -0.1, 1.01, float("nan")])
def test_noise_refuses_truncation(nb, truncation):
    with pytest.raises(ValueError, match="truncation"):
        nb.truncated_noise(1, 8, truncation, seed=0)


def test_unknown_class_lists_the_closest(nb):
    names = utils.imagenet_classes()
    assert len(names) == 1000 and nb.class_vector("volcano", names).argmax() == 980
    with pytest.raises(ValueError, match="volcano"):
        nb.class_vector("vulcano", names)
    with pytest.raises(ValueError, match="handwritten 7"):
        nb.class_vector("handwriten 7", utils.DIGIT_CLASSES)
    with pytest.raises(ValueError, match="no class ''"):
        nb.class_vector("", utils.DIGIT_CLASSES)


def test_the_classes_drawn_exist():
    names = utils.imagenet_classes()
    assert {"volcano", "daisy", "peacock", "balloon", "jellyfish"} <= set(names)


# ---- drawing ----


def test_generate_is_deterministic_and_leaves_the_model_alone(nb, gan):
    before = {k: v.clone() for k, v in gan.model.state_dict().items()}
    z, c = nb.walk_between(gan, ("street 2", "handwritten 5"), 0.7, seed=5)
    images = nb.generate(gan, z, c, 0.7)
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1
    assert torch.equal(images, nb.generate(gan, z, c, 0.7))
    assert all(torch.equal(v, before[k]) for k, v in gan.model.state_dict().items())


def test_ends_of_a_drawn_path_are_the_end_pictures(nb, gan):
    z, c = nb.walk_between(gan, ("street 2", "handwritten 5"), 0.7, seed=5)
    images = nb.generate(gan, z, c, 0.7, batch=1)
    ends = nb.generate(gan, z[[0, -1]], c[[0, -1]], 0.7, batch=1)
    assert torch.equal(images[[0, -1]], ends)
    assert_close(nb.generate(gan, z, c, 0.7), images, atol=1e-4, rtol=0)  # batches agree


def test_smoothness(nb):
    even = torch.linspace(-1, 1, 5).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    assert nb.smoothness(even)["ratio"] == pytest.approx(1, abs=1e-5)
    assert nb.smoothness(even)["mean"] == pytest.approx(0.5 * 768**0.5, rel=1e-5)
    still = torch.zeros(4, 3, 32, 32)
    assert nb.smoothness(still) == {"mean": 0.0, "max": 0.0, "ratio": 0.0}
    with pytest.raises(ValueError, match="at least 2"):
        nb.smoothness(still[:1])


# ---- measures ----


def test_frechet_distance_of_known_gaussians():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(40_000, 3, generator=rng)
    assert utils.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shifted = utils.frechet_distance(a, a + torch.tensor([1.0, 2.0, 0.0]))
    assert shifted == pytest.approx(5, abs=1e-5)
    scaled = utils.frechet_distance(a, 3 * a)  # tr(C + 9C - 6C) = 4 tr C
    assert scaled == pytest.approx(4 * a.double().T.cov().trace().item(), rel=0.01)


# ---- loaders ----


@pytest.fixture
def tiny_file(tmp_path):
    """A state dict of a very small BigGAN, and its own config."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    torch.manual_seed(0)
    model = BigGAN(BigGANConfig(**TINY))
    torch.nn.init.ones_(model.generator.bn.weight)
    torch.nn.init.zeros_(model.generator.bn.bias)
    path = tmp_path / "served.bin"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def deep(tmp_path, monkeypatch, tiny_file):
    """BIGGAN_DEEP with the tiny model behind a local web server; gives the entry, to bend it."""
    import hashlib

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tiny_file.parent)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = tiny_file.read_bytes()
    entry = {
        "config": TINY,
        "urls": [f"http://127.0.0.1:{server.server_port}/served.bin"],
        "checksum": "sha256:" + hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    monkeypatch.setitem(utils.BIGGAN_DEEP, "biggan-deep-256", entry)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "runs"))
    yield entry
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.exists() else []


def test_download_check_load(deep, tmp_path):
    gan = utils.load_biggan_deep("biggan-deep-256")
    assert (gan.z_dim, gan.size, len(gan.classes)) == (8, 32, 1000)
    assert not gan.model.training
    assert files_in(tmp_path / "runs") == ["biggan-deep-256.bin"]
    deep["urls"] = ["http://127.0.0.1:9/nowhere"]  # now from the cache, without a network
    assert utils.load_biggan_deep("biggan-deep-256").name == "biggan-deep-256"


def test_checksum_from_the_hub(deep, tmp_path):
    digest = deep.pop("checksum").removeprefix("sha256:")
    text = f"version https://git-lfs\noid sha256:{digest}\nsize {deep.pop('size')}\n"
    (tmp_path / "pointer").write_text(text)
    deep["pointer"] = deep["urls"][0].replace("served.bin", "pointer")
    assert utils.load_biggan_deep("biggan-deep-256").z_dim == 8
    (tmp_path / "pointer").write_text("<html>not found</html>")
    with pytest.raises(utils.DownloadError, match="no checksum"):
        utils.load_biggan_deep("biggan-deep-256")


def test_wrong_checksum_leaves_no_file(deep, tmp_path):
    deep["checksum"] = "sha256:" + "0" * 64
    with pytest.raises(utils.DownloadError, match="biggan-deep-256"):
        utils.load_biggan_deep("biggan-deep-256")
    assert files_in(tmp_path / "runs") == []


@needs_weights
def test_no_network_falls_back_with_a_notice(deep, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("A3_PROFILE", "full")
    monkeypatch.setenv("A3_DATA", "auto")
    monkeypatch.setattr(utils, "WEIGHTS", WEIGHTS)
    deep["urls"] = ["http://127.0.0.1:9/biggan"]
    with pytest.raises(utils.DownloadError, match="What to do"):
        utils.find_biggan("biggan-deep-256")  # by name: never replaced
    gan = utils.find_biggan("auto")
    assert gan.name == "biggan-digits-32"
    assert "cannot be had here" in capsys.readouterr().out
    assert files_in(tmp_path / "runs") == []
    monkeypatch.setattr(utils, "WEIGHTS", tmp_path / "none")
    assert utils.find_biggan("auto") is None
    assert "no generator here" in capsys.readouterr().out


@needs_weights
def test_tiny_profile_asks_no_network(deep, monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    monkeypatch.setattr(utils, "WEIGHTS", WEIGHTS)
    monkeypatch.setattr(utils, "download", lambda *_, **__: pytest.fail("asked the network"))
    assert utils.find_biggan("auto").name == "biggan-digits-32"


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="biggan-deep-128"):
        utils.find_biggan("biggan-512")
    with pytest.raises(ValueError, match="biggan-deep-128"):
        utils.load_biggan_deep("digits")


def test_keys_must_fit(tiny_file, tmp_path):
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    state = torch.load(tiny_file, weights_only=True)
    state["extra"] = state.pop("embeddings.weight")
    state["generator.bn.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "bent.bin")
    model = BigGAN(BigGANConfig(**TINY))
    with pytest.raises(ValueError) as error:
        utils.load_weights(model, tmp_path / "bent.bin")
    for part in ("1 missing (embeddings.weight)", "1 unknown (extra)", "generator.bn.weight"):
        assert part in str(error.value)
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="holds a list"):
        utils.load_weights(model, tmp_path / "list.bin")


# ---- the committed digit model ----


@needs_weights
def test_committed_files_are_small_and_plain():
    for name, limit in (("biggan_digits.pt", 8e6), ("judge_digits.pt", 1e6)):
        path = WEIGHTS / name
        assert path.stat().st_size < limit
        state = torch.load(path, weights_only=True)
        assert all(v.isfinite().all() for v in state.values())


@needs_weights
def test_committed_model_is_recognised(nb, gan):
    log = json.loads((WEIGHTS / "biggan_digits_log.json").read_text())
    judge = utils.load_judge(WEIGHTS)
    accuracy = 100 * nb.class_accuracy(gan, judge, 1.0, per_class=25, seed=1).mean().item()
    recorded = log["final"]["1.0"]["class_acc"]
    assert recorded >= 95
    assert abs(accuracy - recorded) < 3.5  # 500 pictures: three standard errors


def test_digit_model_gives_finite_pictures_at_every_truncation(nb, gan):
    for truncation in (0.01, 0.02, 0.05, 0.33, 0.99, 1.0):
        z = nb.truncated_noise(2, gan.z_dim, truncation, seed=0)
        c = torch.eye(20)[:2]
        assert nb.generate(gan, z, c, truncation).isfinite().all()


def test_digit_kept_counts_shares(nb, gan):
    class SeesStreetThree(torch.nn.Module):
        def forward(self, x):
            return torch.eye(20)[3].expand(len(x), -1)

    kept, street = nb.digit_kept(gan, SeesStreetThree(), 0.8, walks=1, seed=0)
    assert_close(kept, torch.full((10,), 0.1))  # right for one digit in ten
    assert_close(street, torch.ones(10))


# ---- the recipe ----


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("biggan_digits", WEIGHTS / "biggan_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FewPictures:
    """Stands in for the recipe's real pictures."""

    def batch(self, street, written, rng):
        count = street + written
        labels = torch.randint(0, 20, (count,), generator=rng)
        return torch.rand(count, 3, 32, 32, generator=rng) * 2 - 1, labels


def test_trained_model_is_the_library_model(recipe):
    """In eval our batch norm is the library's, and a batch's own statistics were stored."""
    from pytorch_pretrained_biggan import BigGAN

    torch.manual_seed(0)
    ours = recipe.trainable_biggan()
    recipe.standing_statistics(ours, range(50, 51), per_class=2)
    library = BigGAN(utils.digit_biggan_config())
    library.load_state_dict(ours.state_dict())
    z, c = recipe.noise(4, torch.Generator().manual_seed(1)), torch.eye(20)[:4]
    with torch.no_grad():
        assert_close(ours(z, c, 1.0), library.eval()(z, c, 1.0))
        z = recipe.noise(40, torch.Generator().manual_seed(7))
        c = recipe.one_hot(torch.arange(20).repeat(2))
        inside = {}
        bn = library.generator.layers[-1].bn_0
        bn.register_forward_hook(lambda _m, args, _out: inside.update(x=args[0]))
        library(z, c, 1.0)
    assert_close(bn.running_means[50], inside["x"].mean((0, 2, 3)), atol=5e-3, rtol=1e-2)


def test_clear_pictures_prefers_a_sharp_middle(recipe):
    images = torch.full((20, 3, 32, 32), 100, dtype=torch.uint8)
    images[::2, :, 10:22, 14:18] = 220  # a stroke in the middle of every second picture
    images[1::2, :, :, :3] = 220  # and one at the side of the others
    kept, labels = recipe.clear_pictures(images, torch.arange(20) // 2, keep=0.5)
    assert torch.equal(kept, images[::2])
    assert torch.equal(labels, torch.arange(10))


def test_augmented_handwriting_stays_in_range_on_black(recipe):
    images = -torch.ones(8, 3, 32, 32)
    images[:, :, 10:20, 14:18] = 1
    out = recipe.augment_handwriting(images, torch.Generator().manual_seed(0))
    assert out.min() >= -1 and out.max() <= 1 and (out > 0).flatten(1).any(1).all()
    assert (out[:, :, 0, 0] == -1).all()


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not(recipe, tmp_path):
    def run(steps: int, checkpoint: Path | None, trainer=None):
        trainer = trainer or recipe.Trainer()
        if checkpoint:
            trainer.load(checkpoint)
        losses = [trainer.train_step(FewPictures()) for _ in range(steps)]
        return trainer, losses

    torch.set_num_threads(1)
    _, straight = run(4, None)
    stopped, _ = run(2, None)
    stopped.save(tmp_path / "checkpoint.pt")
    resumed, rest = run(2, tmp_path / "checkpoint.pt")
    assert resumed.step == 4
    assert rest == straight[2:]
