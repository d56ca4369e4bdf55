"""The training loop: it learns, it resumes exactly, it stops clearly, it loses nothing."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, definition_cells, noise_split
from torch import nn

import utils

CPU = torch.device("cpu")
STEPS = 4


def small_model(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def loss_fn(model, batch):
    images, labels = batch
    logits = model(images).float()
    return F.cross_entropy(logits, labels), {"acc": (logits.argmax(1) == labels).float().mean()}


def noisy(images, generator):
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def train(nb, model, epochs=5, batches=None, loss=loss_fn, **options):
    loader = nb.Loader(noise_split(utils), 8, augment=noisy, device=CPU)
    options = {"run": "test", "lr": 1e-2, "schedule": "onecycle", "settings": "x"} | options
    batches = batches or partial(nb.one_epoch, loader, STEPS)
    return utils.fit(
        nb.train_epoch, model, batches, loss, epochs=epochs, steps_per_epoch=STEPS, **options
    )


def stopping(nb, epoch, step, error=KeyboardInterrupt):
    """Batches that raise `error` at one step."""
    loader = nb.Loader(noise_split(utils), 8, augment=noisy, device=CPU)

    def batches(now):
        for number, batch in enumerate(nb.one_epoch(loader, STEPS, now)):
            if (now, number) == (epoch, step):
                raise error
            yield batch

    return batches


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def numbers(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def anything_resumed():
    return ": resumed after epoch " in utils.progress_file().read_text(encoding="utf-8")


def checkpoints():
    return sorted(utils.runs_folder().glob("*.pt"))


# ---- it learns ----


def test_overfits_32_samples(nb):
    split, model = noise_split(utils), small_model()
    loader = nb.Loader(split, 32, device=CPU)
    history = utils.fit(
        nb.train_epoch, model, partial(nb.one_epoch, loader, 1), loss_fn, epochs=60,
        steps_per_epoch=1, run="overfit", lr=1e-2, settings=None,
    )  # fmt: skip
    assert history[-1]["train_loss"] < 0.1 < history[0]["train_loss"]
    assert not model.training
    assert nb.accuracy(utils.predict(model, split), split.labels) == 100


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_fit_is_adam_with_decoupled_weight_decay(nb, decay):
    """Every weight after 8 steps is what torch's own AdamW makes of the same batches."""
    model, reference = small_model(), small_model()
    loader = nb.Loader(noise_split(utils), 8, device=CPU)
    train(
        nb, model, 2, partial(nb.one_epoch, loader, STEPS), weight_decay=decay, schedule="constant"
    )
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=decay)
    for epoch in range(2):
        for batch in nb.one_epoch(loader, STEPS, epoch):
            with utils.autocast(CPU):
                loss, _ = loss_fn(reference, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-3)
    plain = small_model()
    train(
        nb, plain, 2, partial(nb.one_epoch, loader, STEPS), schedule="constant", run="no decay"
    )  # fmt: skip
    lengths = [p[-1].weight.norm() for p in (model, plain)]
    assert (lengths[0] < 0.99 * lengths[1]) == bool(decay)


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing(nb):
    rates = []

    def watching(training, batches, loss):
        def spy():
            for batch in batches:
                rates.append(training.optimizer.param_groups[0]["lr"])
                yield batch

        return nb.train_epoch(training, spy(), loss)

    loader = nb.Loader(noise_split(utils), 8, device=CPU)
    utils.fit(
        watching, small_model(), partial(nb.one_epoch, loader, STEPS), loss_fn, epochs=5,
        steps_per_epoch=STEPS, run="test", lr=1e-2, schedule="onecycle", settings=None,
    )  # fmt: skip
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-2, rel=0.05) and rates[-1] < 1e-4 < rates[0] < 1e-3
    assert sorted(rates[: peak + 1]) == rates[: peak + 1] and len(rates) == 5 * STEPS
    assert sorted(rates[peak:], reverse=True) == rates[peak:] and 2 <= peak <= 10


def test_frozen_weights_stay_and_trained_ones_move(nb):
    model = small_model()
    model[0].requires_grad_(False)
    before = weights(model)
    train(nb, model, weight_decay=0.5)
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    for name in ("1.weight", "1.bias", "1.running_mean", "5.weight", "5.bias"):
        assert not torch.equal(before[name], after[name])
    with pytest.raises(ValueError, match="empty parameter list"):
        train(nb, small_model().requires_grad_(False))


def test_a_step_does_not_add_up_gradients_and_epoch_means_are_means(nb):
    """Two equal batches without momentum, decay or normalization: two equal plain steps."""
    model = nn.Linear(2, 2)
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    training = utils.Training(model, optimizer, schedule, scaler)

    def linear_loss(model, slope):
        with torch.autocast("cpu", enabled=False):
            value = slope * model.weight.sum()
        return value, {"slope": torch.tensor(slope), "steps": torch.tensor(1.0)}

    means = nb.train_epoch(training, iter([1.0, 2.0, 6.0]), linear_loss)
    assert torch.allclose(model.weight, before["weight"] - 0.5 * 9.0)
    assert means["slope"] == 3.0 and means["steps"] == 1.0
    assert all(isinstance(value, float) for value in means.values())


def test_no_step_waits_for_the_device_before_its_backward_pass(nb, monkeypatch):
    """Reading a number of a tensor waits for a GPU: nothing is read inside an epoch."""
    reads, inside = [], [False]

    def forbid(name):
        real = getattr(torch.Tensor, name)

        def spy(self, *arguments):
            if inside[0]:
                reads.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, spy)

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy", "nonzero"):
        forbid(name)
    recipe = replace(nb.RECIPES["negatives"], smoothing=0.1)
    loaders = [nb.make_loader(noise_split(utils, 40, seed=n), recipe, 8, seed=n) for n in range(2)]
    model = nb.TwoHeads("per domain", [recipe, recipe])

    def batches():
        inside[0] = True
        yield from zip(*(nb.one_epoch(loader, 3, 0) for loader in loaders), strict=True)
        inside[0] = False

    training = utils._start(model, 3, 1e-3, "onecycle", 0.1)
    loss = partial(nb.multi_task_loss, smoothing=(0.1, 0.1))
    means = nb.train_epoch(training, batches(), loss)
    assert math.isfinite(means["loss"]) and reads == []


# ---- it resumes ----


@pytest.mark.parametrize("stop_epoch, stop_step", [(0, 2), (1, 0), (3, 3), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_resume_gives_the_numbers_of_an_uninterrupted_run(
    nb, monkeypatch, tmp_path, stop_epoch, stop_step, options
):
    def evaluate(model):
        return {"length": sum(p.double().square().sum().item() for p in model.parameters())}

    whole = small_model(dropout=0.3)
    expected = train(nb, whole, evaluate=evaluate, **options)
    assert not anything_resumed()

    monkeypatch.setenv("A3_RUNS", str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        stopped = stopping(nb, stop_epoch, stop_step)
        train(nb, small_model(dropout=0.3), batches=stopped, evaluate=evaluate, **options)
    assert len(checkpoints()) == (stop_epoch > 0)  # an interrupt costs at most an epoch
    torch.manual_seed(12345)  # whatever ran in between must not matter
    resumed, trained_epochs = small_model(dropout=0.3), []
    loader = nb.Loader(noise_split(utils), 8, augment=noisy, device=CPU)

    def batches(epoch):
        trained_epochs.append(epoch)
        return nb.one_epoch(loader, STEPS, epoch)

    history = train(nb, resumed, batches=batches, evaluate=evaluate, **options)
    assert trained_epochs == list(range(stop_epoch, 5))
    assert numbers(history) == numbers(expected) and len(history) == 5
    assert same(weights(resumed), weights(whole))
    assert anything_resumed() == (stop_epoch > 0)


def test_finished_run_is_not_trained_again(nb):
    first = small_model()
    expected = train(nb, first)
    again = small_model()
    history = train(nb, again, batches=lambda _: pytest.fail("trained again"))
    assert history == expected and same(weights(first), weights(again))


def trained_afresh(nb, **change):
    """The epochs that are trained when the checkpoint of the usual settings is there."""
    train(nb, small_model(), epochs=2)
    trained_epochs = []
    loader = nb.Loader(noise_split(utils), 8, augment=noisy, device=CPU)

    def batches(epoch):
        trained_epochs.append(epoch)
        return nb.one_epoch(loader, STEPS, epoch)

    model = change.pop("model", small_model())
    train(nb, model, **({"epochs": 2, "batches": batches} | change))
    return trained_epochs


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-2}, {"epochs": 3}, {"schedule": "constant"}, {"seed": 1}, {"weight_decay": 0.1},
     {"settings": "y"}, {"run": "other"}],
)  # fmt: skip
def test_changed_argument_never_finds_the_old_checkpoint(nb, change):
    assert trained_afresh(nb, **change) == list(range(change.get("epochs", 2)))


def test_unchanged_arguments_find_it_and_other_first_weights_or_layers_do_not(nb):
    assert trained_afresh(nb) == []
    model = small_model()
    nn.init.normal_(model[-1].weight)
    assert trained_afresh(nb, model=model) == [0, 1]
    assert trained_afresh(nb, model=small_model(dropout=0.1)) == [0, 1]  # same weights, other text


CHANGES = {"lr": 2e-3, "schedule": "onecycle", "weight_decay": 0.1, "side": 20, "standardize": True,
           "smoothing": 0.1, "affine": (5, 0.1, 0.1, 0.1), "erase": 4, "negatives": True,
           "tones": True, "trim": 0.25}  # fmt: skip
ONE = {"epochs": 1, "steps": 1, "run": "key"}


def new_checkpoints(call):
    before = set(checkpoints())
    call()
    return len(set(checkpoints()) - before)


@pytest.fixture
def dry(nb, monkeypatch):
    """Trainings without steps: only the names of their checkpoints matter."""
    space = nb.train_single.__globals__

    def train_epoch(training, batches, loss_fn):
        training.optimizer.step()  # a schedule wants one first
        return {"loss": 0.0 * sum(1 for _ in batches), "acc": 0.0}

    monkeypatch.setitem(space, "train_epoch", train_epoch)
    monkeypatch.setattr(nb.Loader, "batch", lambda *_: None)
    return nb


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_every_setting_of_the_notebook_is_in_the_checkpoints_name(dry, monkeypatch, kind):
    """A field that is added to Recipe must be added to CHANGES: so no setting is forgotten."""
    nb = dry
    assert set(CHANGES) == {f.name for f in fields(nb.Recipe)}
    a, b, c = (noise_split(utils, 20, seed=n) for n in range(3))
    relabeled = utils.Split(a.images, (a.labels + 1) % 10)
    monkeypatch.setitem(nb.RECIPES, "suggested", nb.Recipe())

    def run(train=(a, b), test=None, recipe=None, second=None, **options):
        nb.RECIPES["tried"] = recipe or nb.Recipe()
        nb.RECIPES["second"] = second or recipe or nb.Recipe()
        if kind == "single":
            options.pop("batch_norm", None)
            nb.train_single(train[0], test and test[0], "tried", **(ONE | options))
        else:
            options.pop("batch_size", None)
            options = {"batch_norm": "mixed"} | ONE | options
            nb.train_multi(train, test, ["tried", "second"], **options)

    try:
        assert new_checkpoints(run) == 1
        assert new_checkpoints(run) == 0
        for name, value in CHANGES.items():
            changed = replace(nb.Recipe(), **{name: value})
            assert new_checkpoints(partial(run, recipe=changed)) == 1, name
            if kind == "multi" and name != "side":  # halves must be of one size
                one_sided = partial(run, recipe=nb.Recipe(), second=changed)
                assert new_checkpoints(one_sided) == 1, name
        changes = [{"epochs": 2}, {"steps": 2}, {"seed": 1}, {"train": (c, c)},
                   {"train": (relabeled, relabeled)}]  # fmt: skip
        if kind == "single":
            changes += [{"batch_size": 64}]
        else:
            changes += [{"batch_norm": "per domain"}, {"batch_norm": "separate passes"},
                        {"train": (b, a)}, {"train": (a, c)}]  # fmt: skip
        for change in changes:
            assert new_checkpoints(partial(run, **change)) == 1, change
    finally:
        for name in ("tried", "second"):
            nb.RECIPES.pop(name, None)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign", "no rows", "other model"])
def test_damaged_checkpoint_is_announced_and_training_starts_afresh(nb, damage, capsys):
    first = small_model()
    expected = train(nb, first)
    (path,) = checkpoints()
    state = torch.load(path, weights_only=True)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage in ("garbage", "empty"):
        path.write_bytes(b"<html>not a checkpoint</html>" if damage == "garbage" else b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "no rows":
        del state["history"]
        torch.save(state, path)
    else:  # fails half way: the model is loaded, the optimizer cannot be
        state["training"]["optimizer"] = {"nothing": 1}
        torch.save(state, path)
    again = small_model()
    history = train(nb, again)
    assert numbers(history) == numbers(expected) and same(weights(again), weights(first))
    assert "starts again" in capsys.readouterr().out
    assert torch.load(path, weights_only=True)["history"] == history


# ---- it stops clearly ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number_stops_and_keeps_the_finished_epochs(nb, value):
    loader = nb.Loader(noise_split(utils), 8, device=CPU)

    def poisoned(epoch):
        for images, labels in nb.one_epoch(loader, STEPS, epoch):
            yield (images * value if epoch == 2 else images), labels

    with pytest.raises(FloatingPointError, match="epoch 3; 2 epochs are kept.*learning rate"):
        train(nb, small_model(), batches=poisoned, evaluate=lambda _: {})
    (path,) = checkpoints()
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) == 2
    assert all(value.isfinite().all() for value in state["training"]["model"].values())


@pytest.mark.parametrize(
    "bad, word",
    [({"epochs": 0}, "epochs"), ({"lr": -1.0}, "learning rate"),
     ({"lr": math.nan}, "learning rate"), ({"weight_decay": -0.1}, "weight_decay"),
     ({"schedule": "cosine"}, "cosine")],
)  # fmt: skip
def test_bad_arguments_are_named(nb, bad, word):
    with pytest.raises((ValueError, KeyError), match=word):
        train(nb, small_model(), **bad)


@pytest.mark.parametrize(
    "fault", ["full disk", "folder cannot be made", "folder cannot be written"]
)
def test_runs_folder_that_cannot_be_written_costs_the_checkpoint_not_the_run(
    nb, fault, monkeypatch, tmp_path, capsys
):
    if fault == "full disk":
        monkeypatch.setattr(utils.Path, "write_bytes", lambda *_: os.stat("/none/No space left"))
    elif fault == "folder cannot be made":
        (tmp_path / "file").touch()
        monkeypatch.setenv("A3_RUNS", str(tmp_path / "file" / "runs"))
    else:
        monkeypatch.setenv("A3_RUNS", "/proc/self")  # there, and nobody can write into it
    history = train(nb, small_model())
    assert len(history) == 5 and "cannot be written" in capsys.readouterr().out


def test_long_epochs_are_saved_one_by_one_and_short_ones_together(nb, monkeypatch):
    saved, clock = [], [0.0]
    monkeypatch.setattr(utils, "keep", lambda *_: saved.append(clock[0]))
    monkeypatch.setattr(utils.time, "monotonic", lambda: clock[0])

    def taking(seconds):
        def evaluate(_):
            clock[0] += seconds
            return {}

        return evaluate

    train(nb, small_model(), evaluate=taking(11.0))
    assert len(saved) == 5
    saved.clear()
    train(nb, small_model(), evaluate=taking(0.1), run="short")
    assert len(saved) == 1


# ---- kill -9 ----


def killed_in_a_child(nb, save_at, share):
    """A training of which a child process dies when it has written a share of a checkpoint."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        moments = iter(range(0, 10000, 11))
        utils.time.monotonic = lambda: next(moments)  # every epoch is a long one, and saved
        whole, saves = utils.Path.write_bytes, []

        def write_bytes(path, data):
            saves.append(path)
            dies = len(saves) == save_at
            whole(path, data[: int(share * len(data))] if dies else data)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        utils.Path.write_bytes = write_bytes
        train(nb, small_model(dropout=0.3))
    finally:
        os._exit(1)


@pytest.mark.parametrize("save_at, share", [(1, 0.5), (3, 0.99), (5, 1.0)])
def test_kill_9_while_a_checkpoint_is_written(nb, save_at, share, tmp_path, monkeypatch):
    expected = small_model(dropout=0.3)
    history = train(nb, expected)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "killed"))
    assert os.WTERMSIG(killed_in_a_child(nb, save_at, share)) == signal.SIGKILL
    assert len(checkpoints()) == (save_at > 1)
    resumed = small_model(dropout=0.3)
    assert numbers(train(nb, resumed)) == numbers(history)
    assert same(weights(resumed), weights(expected))


def test_a_write_that_is_cut_off_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a" / "file"
    utils.write_atomically(path, lambda target: target.write_bytes(b"good"))

    def dies_half_way(target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, dies_half_way)
    assert path.read_bytes() == b"good" and list(path.parent.iterdir()) == [path]


# ---- side by side ----

SIDE_BY_SIDE = f"""
import glob, os, signal, sys, threading, time
from functools import partial
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import conftest, utils
DEFINITIONS

class Mine(nn.Module):
    def forward(self, x):
        return x

def work(seed):
    assert torch.get_num_threads() == 1
    split = conftest.noise_split(utils, 64, seed=seed)
    model, history = train_multi([split, split], [split, split], ["negatives", "negatives"],
        epochs=2, steps=3, run="side", batch_norm="per domain", seed=seed)
    for row in history:
        row["seconds"] = 0
    return model, history, Mine(), os.getpid()

def fails():
    raise FloatingPointError("the loss became nan")

def waits(number):
    open(sys.argv[1] + f"/{{number}}-{{os.getpid()}}", "w").close()
    time.sleep(60)

if __name__ == "__main__":
    device = torch.device("cpu")
    results = []
    for jobs in (1, 2):
        torch.set_num_threads(2)
        os.environ["A3_RUNS"] = sys.argv[1] + "/runs" + str(jobs)
        made = utils.side_by_side({{("a", seed): partial(work, seed) for seed in range(3)}}, jobs)
        assert list(made) == [("a", seed) for seed in range(3)] and torch.get_num_threads() == 2
        assert all(isinstance(r[0], TwoHeads) and isinstance(r[2], Mine) for r in made.values())
        workers = {{r[3] for r in made.values()}}
        assert workers == {{os.getpid()}} if jobs == 1 else os.getpid() not in workers
        assert all("test_acc" in row for row in of_task(made["a", 1][1], "street"))
        results.append(made)
    for one, two in zip(results[0].values(), results[1].values()):
        states = one[0].state_dict(), two[0].state_dict()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        assert one[1] == two[1] and len(one[1]) == 2
    assert results[0]["a", 0][1] != results[0]["a", 1][1]
    log = utils.progress_file().read_text()
    assert log.count(": done") == 6 and log.count("side: epoch 2/2") == 6, log
    assert ": resumed after" not in utils.progress_file().read_text()
    utils.side_by_side({{"again": partial(work, 0)}}, 1)
    assert ": resumed after" in utils.progress_file().read_text()
    try:
        utils.side_by_side({{"good": int, "bad one": fails}}, 2)
    except RuntimeError as error:
        assert "bad one: FloatingPointError: the loss became nan" in str(error), error
    else:
        raise AssertionError("no error")

    def interrupt():
        while len(glob.glob(sys.argv[1] + "/*-*")) < 2:
            time.sleep(0.05)
        interrupted.append(time.monotonic())
        os.killpg(0, signal.SIGINT)  # as Jupyter and a terminal do it

    interrupted = []
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        utils.side_by_side({{n: partial(waits, n) for n in range(4)}}, 2)
    except KeyboardInterrupt:
        print("all well, stopped after", time.monotonic() - interrupted[0])
"""


@pytest.mark.slow
def test_side_by_side_same_numbers_named_errors_and_interrupts(tmp_path):
    """In a script of its own, whose functions are defined in __main__ as a notebook's are."""
    script = tmp_path / "job.py"
    text = SIDE_BY_SIDE.replace("DEFINITIONS", "\n\n".join(definition_cells()))
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True,
        timeout=200, start_new_session=True,
    )  # fmt: skip
    assert "all well" in done.stdout, done.stdout + done.stderr
    assert float(done.stdout.split()[-1]) < 5 and "Warning" not in done.stderr
    began = [path.name.split("-") for path in tmp_path.glob("*-*")]
    assert len(began) == 2  # the two that waited for their turn never began
    for _, pid in began:
        status = utils.Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().split()[2] == "Z"


def test_side_by_side_in_this_process_keeps_order_names_and_threads():
    torch.set_num_threads(2)
    try:
        made = utils.side_by_side({"b": torch.get_num_threads, "a": lambda: 7}, jobs=1)
        assert list(made.items()) == [("b", 1), ("a", 7)] and torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="second: ZeroDivisionError"):
            utils.side_by_side({"first": int, "second": lambda: 1 / 0}, jobs=1)
        assert torch.get_num_threads() == 2 and utils.side_by_side({}) == {}
    finally:
        torch.set_num_threads(1)


def test_trainings_at_once_are_one_on_a_gpu_and_never_more_than_cores(monkeypatch):
    import joblib

    assert 1 <= utils.jobs_at_once() <= joblib.cpu_count()
    monkeypatch.setattr(utils, "default_device", lambda: torch.device("cuda"))
    assert utils.jobs_at_once() == 1


def test_progress_shows_the_last_line_of_each_training(monkeypatch):
    class Handle:
        texts = []

        def update(self, data, raw):
            self.texts.append(data["text/plain"])

    monkeypatch.setattr(utils, "get_ipython", lambda: SimpleNamespace(kernel=None))
    monkeypatch.setattr(utils, "display", lambda *_, **__: Handle())
    with utils._progress_shown(2):
        for line in ("x: epoch 1/2, loss 3", "y: epoch 1/2, loss 4", "x: epoch 2/2, loss 2",
                     "a: done"):  # fmt: skip
            utils._tell(line)
        time.sleep(1.3)
    shown = Handle.texts[0].splitlines()
    assert shown == ["1 of 2 done", "x: epoch 2/2, loss 2", "y: epoch 1/2, loss 4"]
    assert Handle.texts[-1] == ""


# ---- histories, evaluation, results ----


def test_history_of_one_task(nb):
    history = [
        {
            "epoch": n,
            "seconds": 2.0,
            "train_loss": 1.0,
            "test_acc_street": 90.0 + n,
            "test_acc_b": n,
        }
        for n in (1, 2)
    ]
    ours = nb.of_task(history, "street")
    assert ours[-1] == {"epoch": 2, "test_acc": 92.0}
    assert [row["test_acc"] for row in ours] == [91.0, 92.0]


def test_predict_keeps_order_and_mode(nb):
    split = noise_split(utils, 50)
    model = small_model(dropout=0.5).train()
    whole, pieces = utils.predict(model, split, 50), utils.predict(model, split, 7)
    assert torch.allclose(whole, pieces, atol=2e-2) and model.training
    assert whole.dtype == torch.float32 and whole.shape == (50, 10)
    model.eval()
    with utils.autocast(CPU), torch.no_grad():
        direct = model(utils.to_float(split.images)).float()
    assert torch.allclose(whole, direct, atol=2e-2)
    pixels = utils.predict(lambda x: x.flatten(1), split)
    assert torch.allclose(pixels[7], split.images[7].flatten() / 127.5 - 1, atol=1e-6)


def test_accuracy_counts_and_refuses_nonsense(nb):
    logits = torch.eye(4)
    assert nb.accuracy(logits, torch.tensor([0, 1, 2, 0])) == 75.0
    for bad in [(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)),
                (logits, torch.tensor([0, 1])), (logits, torch.tensor([0, 1, 2, 4])),
                (logits, torch.tensor([0, 1, 2, -1])), (logits[0], torch.tensor([0, 1, 2, 3])),
                (logits * math.nan, torch.tensor([0, 1, 2, 3])),
                (logits / 0, torch.tensor([0, 1, 2, 3]))]:  # fmt: skip
        with pytest.raises(ValueError, match="logits|labels"):
            nb.accuracy(*bad)


def test_mean_and_std_is_the_sample_deviation(nb):
    summary = nb.mean_and_std([1.0, 3.0])
    assert summary == {"mean": 2.0, "std": pytest.approx(2**0.5), "per_seed": [1.0, 3.0]}
    assert nb.mean_and_std([4.0])["std"] == 0.0
    for bad in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="values"):
            nb.mean_and_std(bad)


# ---- settings ----


def test_unknown_settings_are_refused_with_the_known_ones(monkeypatch):
    assert utils.switch("A3_PROFILE") == "full" and utils.switch("A3_DATA") == "auto"
    monkeypatch.setenv("A3_PROFILE", " Tiny ")
    assert utils.switch("A3_PROFILE") == "tiny"
    monkeypatch.setenv("A3_PROFILE", "small")
    with pytest.raises(ValueError, match="A3_PROFILE.*full, tiny"):
        utils.switch("A3_PROFILE")
    monkeypatch.setenv("A3_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        utils.precision_policy(CPU)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setenv("A3_PRECISION", name)
        assert utils.precision_policy(CPU) == dtype
        with utils.autocast(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_precision_of_gpus_by_their_age(monkeypatch):
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert utils.precision_policy(torch.device("cuda")) == dtype
