"""The training loop: it learns, it resumes exactly, it stops clearly, it loses nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import utils

CPU = torch.device("cpu")


def learnable_split(count=32, seed=0):
    """Noise pictures: only a network that memorises can label them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 28, 28), generator=generator).to(torch.uint8)
    return utils.Split(images, torch.arange(count) % 10)


def small_model(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def loss_fn(model, batch):
    images, labels = batch
    logits = model(images)
    return F.cross_entropy(logits, labels), {"acc": (logits.argmax(1) == labels).float().mean()}


def train(model, epochs=6, batches=None, **options):
    loader = utils.Loader(learnable_split(), 8, augment=utils.random_affine, device=CPU)
    options = {"run": "test", "lr": 1e-2, "schedule": "onecycle"} | options
    return utils.fit(
        model, batches or loader.epoch, loss_fn, epochs=epochs, steps_per_epoch=4, **options
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def numbers(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def test_overfits_32_samples():
    split = learnable_split()
    model = small_model()
    loader = utils.Loader(split, 32, device=CPU)
    history = utils.fit(
        model, loader.epoch, loss_fn, epochs=60, steps_per_epoch=1, run="overfit", lr=1e-2,
    )  # fmt: skip
    assert history.last["train_loss"] < 0.1 < history.rows[0]["train_loss"]
    assert utils.accuracy(utils.predict(model, split), split.labels) == 100


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("stop_epoch, stop_step", [(0, 2), (1, 0), (3, 3), (5, 3)])
def test_resume_gives_the_numbers_of_an_uninterrupted_run(
    monkeypatch, tmp_path, stop_epoch, stop_step
):
    whole = small_model(dropout=0.3)
    expected = train(whole)

    monkeypatch.setenv("A3_RUNS", str(tmp_path / "other"))
    loader = utils.Loader(learnable_split(), 8, augment=utils.random_affine, device=CPU)

    def interrupted(epoch):
        for step, batch in enumerate(loader.epoch(epoch)):
            if (epoch, step) == (stop_epoch, stop_step):
                raise Interrupt
            yield batch

    with pytest.raises(Interrupt):
        train(small_model(dropout=0.3), batches=interrupted)
    torch.manual_seed(12345)  # whatever ran in between must not matter
    resumed = small_model(dropout=0.3)
    history = train(resumed)
    assert numbers(history) == numbers(expected)
    assert same(weights(resumed), weights(whole))


def test_finished_run_is_not_trained_again():
    first = small_model()
    expected = train(first)
    again = small_model()
    loader = utils.Loader(learnable_split(), 8, augment=utils.random_affine, device=CPU)

    def first_only(epoch):  # the first batch is a part of the checkpoint's key
        yield next(loader.epoch(epoch))
        pytest.fail("trained again")

    history = train(again, batches=first_only)
    assert history.rows == expected.rows and same(weights(first), weights(again))


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-2}, {"epochs": 7}, {"schedule": "constant"}, {"seed": 1}, {"weight_decay": 0.1},
     {"settings": {"augment": "other"}}, {"run": "other"}],
)  # fmt: skip
def test_changed_setting_never_finds_the_old_checkpoint(change):
    train(small_model())
    trained_epochs = []
    loader = utils.Loader(learnable_split(), 8, augment=utils.random_affine, device=CPU)

    def batches(epoch):
        for step, batch in enumerate(loader.epoch(epoch)):
            if step == 1:  # step 0 alone is a look at the first batch
                trained_epochs.append(epoch)
            yield batch

    train(small_model(), batches=batches, **change)
    assert trained_epochs == list(range(change.get("epochs", 6)))


def other_loss(model, batch):
    images, labels = batch
    logits = model(images)
    return F.cross_entropy(logits, labels, label_smoothing=0.1), {}


def stronger(images, generator):
    return utils.random_affine(images, generator, degrees=20)


@pytest.mark.parametrize("changed", ["augmentation", "order", "loss", "data"])
def test_changed_batches_and_loss_never_find_the_old_checkpoint(changed):
    train(small_model(), epochs=1)
    split = learnable_split()
    if changed == "data":
        split.images[0] = 255 - split.images[0]
    loader = utils.Loader(
        split, 8, seed=1 if changed == "order" else 0, device=CPU,
        augment=stronger if changed == "augmentation" else utils.random_affine,
    )  # fmt: skip
    utils.fit(
        small_model(), loader.epoch, other_loss if changed == "loss" else loss_fn, run="test",
        epochs=1, steps_per_epoch=4, lr=1e-2, schedule="onecycle",
        settings={"data": utils.fingerprint(split)} if changed == "data" else None,
    )  # fmt: skip
    assert len(list(utils.runs_folder().glob("test-*.pt"))) == 2


def test_code_of_sees_what_a_function_computes_and_not_how_it_is_written():
    def compiled(text):
        names = {}
        exec(text, names)
        return utils.code_of(names["f"])

    plain = "def g(x): return x + 1\ndef f(x): return g(x) in {'a', 'b'}"
    commented = "# a note\n\ndef g(x):\n    return x + 1  # one more\n" + plain.split("\n")[1]
    assert compiled(plain) == compiled(commented)
    for change in [("+ 1", "+ 2"), ("'a'", "'c'"), ("x + 1", "x - 1")]:
        assert compiled(plain) != compiled(plain.replace(*change))
    assert utils.code_of(partial(loss_fn)) == utils.code_of(loss_fn)


@pytest.mark.parametrize("given", [0, 3, 5])
def test_an_epoch_of_another_length_is_refused(given):
    loader = utils.Loader(learnable_split(40), 8, device=CPU)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        train(small_model(), batches=lambda epoch: list(loader.epoch(epoch))[:given])


def test_other_first_weights_never_find_the_old_checkpoint():
    train(small_model(), epochs=1)
    torch.manual_seed(99)
    model = small_model()
    nn.init.normal_(model[-1].weight)
    before = len(list(utils.runs_folder().glob("*.pt")))
    train(model, epochs=1)
    assert len(list(utils.runs_folder().glob("*.pt"))) == before + 1


@pytest.mark.parametrize("damage", ["cut", "garbage", "foreign", "empty", "other model"])
def test_damaged_checkpoint_is_set_aside_and_training_starts_afresh(damage, capsys):
    first = small_model()
    expected = train(first)
    (path,) = utils.runs_folder().glob("test-*.pt")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "garbage":
        path.write_bytes(b"<html>not a checkpoint</html>")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        state = torch.load(path, weights_only=True)
        state["model"] = nn.Linear(2, 2).state_dict()
        torch.save(state, path)
    again = small_model()
    history = train(again)
    assert numbers(history) == numbers(expected) and same(weights(again), weights(first))
    assert path.with_suffix(".bad").exists() and "training starts again" in capsys.readouterr().out


def test_nan_loss_stops_with_a_clear_error_and_keeps_the_finished_epochs():
    loader = utils.Loader(learnable_split(), 8, device=CPU)

    def poisoned(epoch):
        for images, labels in loader.epoch(epoch):
            yield (images * float("nan") if epoch == 2 else images), labels

    with pytest.raises(utils.TrainingDiverged, match=r"epoch 3.*learning rate.*2 finished epochs"):
        train(small_model(), batches=poisoned)
    (path,) = utils.runs_folder().glob("test-*.pt")
    state = torch.load(path, weights_only=True)
    assert len(state["rows"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_full_disk_costs_the_checkpoint_and_not_the_run(monkeypatch, capsys):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    history = train(small_model())
    assert len(history.rows) == 6 and "No space left" in capsys.readouterr().out
    assert list(utils.runs_folder().iterdir()) == []


@pytest.mark.parametrize(
    "bad, word",
    [({"epochs": 0}, "epochs"), ({"lr": 0.0}, "lr"), ({"lr": -1.0}, "lr"),
     ({"lr": float("nan")}, "lr"), ({"lr": float("inf")}, "lr"),
     ({"weight_decay": -0.1}, "weight_decay"), ({"weight_decay": float("nan")}, "weight_decay"),
     ({"schedule": "cosine"}, "schedule")],
)  # fmt: skip
def test_bad_arguments_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        train(small_model(), **bad)


def test_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="model"):
        train(small_model().requires_grad_(False))


def test_frozen_weights_stay_and_trained_ones_move():
    model = small_model()
    model[0].requires_grad_(False)
    before = weights(model)
    train(model)
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["5.weight"], after["5.weight"])


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
import test_training as t
loader = t.utils.Loader(t.learnable_split(), 8, augment=t.utils.random_affine, device=t.CPU)
def slow(epoch):
    for batch in loader.epoch(epoch):
        time.sleep(0.02)
        yield batch
model = t.small_model(dropout=0.3)
history = t.train(model, epochs=12, batches=slow)
torch.save({{"rows": t.numbers(history), "model": model.state_dict()}}, sys.argv[1])
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_and_run_again(tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))))

    def start(runs, out):
        environment = os.environ | {"A3_RUNS": str(runs)}
        command = [sys.executable, str(script), str(out)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole", tmp_path / "whole.pt").wait() == 0
    kills = 0
    for _ in range(8):
        job = start(tmp_path / "killed", tmp_path / "killed.pt")
        try:  # each try gets a little further, and dies at another moment
            job.wait(timeout=3.0 + 0.31 * kills)
            break
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.wait()
            kills += 1
            time.sleep(0.1)
    else:
        assert start(tmp_path / "killed", tmp_path / "killed.pt").wait() == 0
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "killed"))
    assert one["rows"] == two["rows"] and same(one["model"], two["model"])


DIES_WRITING = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
import test_training as t
epoch, share = int(sys.argv[1]), float(sys.argv[2])
whole_save, saves = torch.save, [0]
def save(state, target):
    whole_save(state, target)
    saves[0] += 1
    if saves[0] == epoch:
        os.truncate(target, int(share * os.path.getsize(target)))
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
t.train(t.small_model(dropout=0.3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("epoch, share", [(1, 0.0), (1, 0.5), (3, 0.99), (6, 1.0)])
def test_kill_9_while_a_checkpoint_is_written(epoch, share, tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text(DIES_WRITING.format(root=str(ROOT), tests=str(ROOT / "tests")))
    expected = small_model(dropout=0.3)
    history = train(expected)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "killed"))
    command = [sys.executable, str(script), str(epoch), str(share)]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    (left_behind,) = utils.runs_folder().glob(".test-*.part")
    assert len(list(utils.runs_folder().glob("test-*.pt"))) == (epoch > 1)
    long_ago = time.time() - 4000
    os.utime(left_behind, (long_ago, long_ago))
    resumed = small_model(dropout=0.3)
    assert numbers(train(resumed)) == numbers(history) and same(weights(resumed), weights(expected))
    assert [p.suffix for p in utils.runs_folder().iterdir()] == [".pt"]


def test_kill_while_a_checkpoint_is_written_leaves_the_last_good_one(monkeypatch):
    train(small_model(), epochs=6)
    (path,) = utils.runs_folder().glob("test-*.pt")
    good = path.read_bytes()

    def dies_half_way(target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, dies_half_way)
    assert path.read_bytes() == good
    assert [p for p in path.parent.iterdir() if p != path] == []


def test_predict_keeps_order_and_mode():
    split = learnable_split(50)
    model = small_model(dropout=0.5).train()
    whole, pieces = utils.predict(model, split, 50), utils.predict(model, split, 7)
    assert torch.allclose(whole, pieces, atol=1e-5) and model.training
    assert whole.dtype == torch.float32 and whole.shape == (50, 10)


def test_accuracy_counts_and_refuses_nothing():
    logits = torch.eye(4)
    assert utils.accuracy(logits, torch.tensor([0, 1, 2, 0])) == 75.0
    with pytest.raises(ValueError):
        utils.accuracy(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError):
        utils.accuracy(logits, torch.tensor([0, 1]))


def test_mean_and_std_is_the_sample_deviation():
    assert utils.mean_and_std([1.0, 3.0]) == {
        "mean": 2.0,
        "std": pytest.approx(2**0.5),
        "per_seed": [1.0, 3.0],
    }
    assert utils.mean_and_std([4.0])["std"] == 0.0
    with pytest.raises(ValueError):
        utils.mean_and_std([])
