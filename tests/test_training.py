"""The training loop: it learns, it resumes exactly, it stops clearly, it saves."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise_split
from small_training import (
    STEPS,
    batches,
    checkpoints,
    length,
    loss_fn,
    make_model,
    rows,
    same_weights,
    train,
    train_epoch,
    watch,
    weights,
)
from torch import nn

import utils


@pytest.fixture(autouse=True)
def fresh_watch():
    watch.reset()


@pytest.fixture
def every_epoch_saved(monkeypatch):
    monkeypatch.setattr(utils, "SECONDS_BETWEEN_SAVES", 0)


# ---- it learns ----


def test_a_small_model_learns_its_task():
    model, history = train(make_model(dropout=0.0), epochs=60)
    assert history[0]["train_loss"] > 2.0
    assert history[-1]["train_loss"] < 1.2
    assert history[-1]["train_acc"] > 0.5
    assert [row["epoch"] for row in history] == list(range(1, 61))
    assert not model.training


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_optimizer_is_adam_with_decoupled_weight_decay(decay):
    """Every step of a linear model is what Loshchilov and Hutter's algorithm 2 says."""
    model = nn.Linear(8, 10).double()
    weight = model.weight.detach().clone()

    def given_slope(model, slope):
        return (model.weight * slope).sum(), {}

    slopes = [torch.randn(10, 8, generator=utils.epoch_generator(1, n)).double() for n in range(4)]
    train(
        model,
        lambda epoch: slopes,
        given_slope,
        epochs=1,
        lr=0.1,
        schedule="constant",
        weight_decay=decay,
    )
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, slope in enumerate(slopes, 1):
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        weight = weight * (1 - 0.1 * decay)
        direction = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - 0.1 * direction
    assert torch.allclose(model.weight, weight, rtol=1e-6)


def learning_rates(schedule):
    rates = []

    def watch(training, batches, loss_fn):
        def spy():
            for batch in batches:
                rates.append(training.optimizer.param_groups[0]["lr"])
                yield batch

        return train_epoch(training, spy(), loss_fn)

    train(loop=watch, schedule=schedule)
    return rates


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing():
    rates = learning_rates("onecycle")
    peak = rates.index(max(rates))
    assert len(rates) == 5 * STEPS and 2 <= peak <= 10
    assert max(rates) == pytest.approx(1e-2, rel=0.05)
    assert rates[-1] < 1e-4 < rates[0] < 1e-3
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_constant_schedule_keeps_the_rate():
    assert learning_rates("constant") == [1e-2] * 5 * STEPS


def test_frozen_weights_stay_and_the_others_move():
    model = make_model()
    model.layers[0].requires_grad_(False)
    before = weights(model)
    train(model, weight_decay=0.5)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    frozen = {"layers.0.weight", "layers.0.bias"}
    assert moved == set(before) - frozen


def test_the_streams_of_epochs_differ_and_repeat():
    draws = {}
    for seed in range(3):
        for epoch in range(3):
            draws[seed, epoch] = torch.randn(4, generator=utils.epoch_generator(seed, epoch))
            again = torch.randn(4, generator=utils.epoch_generator(seed, epoch))
            assert torch.equal(draws[seed, epoch], again)
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 9


# ---- the notebook's loop ----


def test_a_step_does_not_add_up_gradients_and_the_metrics_are_means(nb):
    model = nn.Linear(2, 2)
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    training = utils.Training(model, optimizer, schedule, scaler)

    def linear_loss(model, slope):
        return slope * model.weight.sum(), {"slope": torch.tensor(slope)}

    means = nb.train_epoch(training, iter([1.0, 2.0, 6.0]), linear_loss)
    assert torch.allclose(model.weight, before["weight"] - 0.5 * 9.0)
    assert means["slope"] == 3.0
    assert all(isinstance(value, float) for value in means.values())


def test_no_step_waits_for_the_device(nb, monkeypatch):
    """Reading a tensor's number waits for a GPU: inside an epoch, none is read."""
    reads = []
    inside = [False]

    def forbid(name):
        real = getattr(torch.Tensor, name)

        def spy(self, *arguments):
            if inside[0]:
                reads.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, spy)

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        forbid(name)

    def few_batches():
        inside[0] = True
        yield from batches(0)
        inside[0] = False

    training = utils.new_training(make_model(), utils.Plan("x", 1, STEPS, schedule="onecycle"))
    means = nb.train_epoch(training, few_batches(), loss_fn)
    assert math.isfinite(means["loss"]) and reads == []


# ---- it resumes ----


@pytest.mark.parametrize("stop_at", [(0, 2), (1, 0), (3, 3), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "schedule": "constant"}])
def test_a_resumed_training_has_the_numbers_of_an_uninterrupted_one(
    stop_at, options, every_epoch_saved, monkeypatch, tmp_path
):
    whole, expected = train(evaluate=length, **options)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "other"))
    watch.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        train(evaluate=length, **options)
    assert len(checkpoints()) == (stop_at[0] > 0)
    torch.manual_seed(12345)  # whatever ran in between must not matter
    watch.reset()
    resumed, history = train(evaluate=length, **options)
    assert watch.epochs == list(range(stop_at[0], 5))
    assert rows(history) == rows(expected)
    assert same_weights(resumed, whole)


def test_stored_trainings_are_counted_once_each_since_the_run_began():
    utils.start_run("tiny", "noise")
    first, expected = train()
    assert utils.stored_trainings() == []
    watch.reset()
    for _ in range(2):
        again, history = train()
        assert history == expected and same_weights(again, first)
    assert watch.epochs == []
    assert utils.stored_trainings() == ["Noise, seed 0"]
    utils.start_run("tiny", "noise")
    assert utils.stored_trainings() == []


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign", "no history", "other"])
def test_a_damaged_checkpoint_is_announced_and_the_training_starts_again(damage, capsys):
    first, expected = train()
    (path,) = checkpoints()
    state = torch.load(path, weights_only=True)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage in ("garbage", "empty"):
        path.write_bytes(b"<html>not a checkpoint</html>" if damage == "garbage" else b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "no history":
        del state["history"]
        torch.save(state, path)
    else:  # fails half way: the model is loaded, the optimizer cannot be
        state["optimizer"] = {"nothing": 1}
        torch.save(state, path)
    again, history = train()
    assert rows(history) == rows(expected) and same_weights(again, first)
    assert "starts again" in capsys.readouterr().out
    assert torch.load(path, weights_only=True)["history"] == history


# ---- it stops clearly, and saves ----


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_what_was_saved_stays(factor, every_epoch_saved):
    watch.spoil_from = (2, factor)
    with pytest.raises(FloatingPointError, match=r"seed 0.*epoch 3\. .*learning"):
        train()
    (path,) = checkpoints()
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "learning rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "cosine"}, "cosine"),
    ],
)
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        train(**bad)


def test_a_model_without_trained_weights_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        train(make_model().requires_grad_(False))


@pytest.mark.parametrize("fault", ["full disk", "folder cannot be made"])
def test_a_folder_that_cannot_be_written_costs_the_checkpoint_not_the_run(
    fault, monkeypatch, tmp_path, capsys
):
    if fault == "full disk":
        monkeypatch.setattr(Path, "write_bytes", lambda *_: os.stat("/none/No space left"))
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("A3_RUNS", str(tmp_path / "file" / "runs"))
    _, history = train()
    assert len(history) == 5 and "cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "count"), [(11, 5), (1, 1)])
def test_long_epochs_are_saved_one_by_one_and_of_short_ones_the_last(step, count, monkeypatch):
    saved = []
    clock = iter(range(0, 1000, step))
    monkeypatch.setattr(utils, "write_or_warn", lambda *_: saved.append(None))
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    train()
    assert len(saved) == count


# ---- kill -9 ----

KILLED = """
import itertools, os, signal, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {tests!r}]
import utils
from small_training import train

whole, saves = Path.write_bytes, []
utils.SECONDS_BETWEEN_SAVES = 0  # every epoch is saved


def write_bytes(path, content):
    saves.append(path)
    dies = len(saves) == 3
    whole(path, content[:-100] if dies else content)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


Path.write_bytes = write_bytes
train()
"""


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    expected, history = train()
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "killed"))
    root, tests = str(Path(utils.__file__).parent), str(Path(__file__).parent)
    script = KILLED.format(root=root, tests=tests)
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | threads, check=False)
    assert done.returncode == -signal.SIGKILL
    watch.reset()
    resumed, again = train()
    assert rows(again) == rows(history) and same_weights(resumed, expected)
    assert watch.epochs == [2, 3, 4]


# ---- evaluation ----


def test_predict_keeps_the_order_and_leaves_the_model_in_eval_mode():
    split = noise_split(utils, 50, size=8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    whole, pieces = utils.predict(model, split, 50), utils.predict(model, split, 7)
    assert torch.allclose(whole, pieces, atol=1e-5) and not model.training
    assert whole.dtype == torch.float32 and whole.shape == (50, 10)
    with torch.no_grad():
        direct = model(split.images / 127.5 - 1)
    assert torch.allclose(whole, direct, atol=1e-5)
