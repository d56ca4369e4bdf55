"""The training loop: it follows its plan, it resumes exactly, it stops clearly, it saves."""

import math

import pytest
import torch
from conftest import noise_split
from small_training import (
    STEPS,
    batches,
    checkpoints,
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


def length(model):
    """A figure that every weight decides."""
    return {"length": nn.utils.parameters_to_vector(model.parameters()).norm().item()}


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_training_is_adamw_with_the_schedule_of_its_plan(schedule, decay):
    model, expected = nn.Linear(8, 10), nn.Linear(8, 10)
    expected.load_state_dict(model.state_dict())
    _, history = train(model, schedule=schedule, weight_decay=decay)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert not model.training
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if schedule == "onecycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5 * STEPS)
    for epoch in range(5):
        train_epoch(utils.Training(expected, optimizer, scheduler, None), batches(epoch), loss_fn)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_frozen_weights_stay_and_the_others_move():
    model = make_model()
    model[0].requires_grad_(False)
    before = weights(model)
    train(model, weight_decay=0.5)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {"0.weight", "0.bias"}


@pytest.mark.parametrize("stop_at", [(0, 2), (3, 3)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "schedule": "constant"}])
def test_a_resumed_training_has_the_numbers_of_an_uninterrupted_one(
    stop_at, options, every_epoch_saved, monkeypatch, tmp_path
):
    whole, expected = train(evaluate=length, **options)
    monkeypatch.setenv("A3_RUNS", str(tmp_path / "other"))
    watch.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        train(evaluate=length, **options)
    torch.manual_seed(12345)  # whatever ran in between must not matter
    watch.reset()
    resumed, history = train(evaluate=length, **options)
    assert watch.epochs == list(range(stop_at[0], 5))
    assert rows(history) == rows(expected) and same_weights(resumed, whole)


def test_resumed_trainings_are_named_once_each_since_the_run_began():
    utils.start_run("tiny", "noise")
    first, expected = train()
    assert utils.resumed_trainings() == []
    watch.reset()
    for _ in range(2):
        again, history = train()
        assert history == expected and same_weights(again, first)
    assert watch.epochs == []
    assert utils.resumed_trainings() == ["Noise, seed 0"]
    assert utils.result_and_resumed_names(int) == (0, [])  # a worker tells those of its task alone
    utils.start_run("tiny", "noise")
    assert utils.resumed_trainings() == []


@pytest.mark.parametrize("damage", ["cut", "foreign", "fits half way"])
def test_a_damaged_checkpoint_is_announced_and_the_training_starts_again(damage, capsys):
    first, expected = train()
    (path,) = checkpoints()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:  # the model can be loaded, the optimizer cannot
        torch.save(torch.load(path, weights_only=True) | {"optimizer": {}}, path)
    again, history = train()
    assert rows(history) == rows(expected) and same_weights(again, first)
    assert "starts again" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_what_was_saved_stays(factor, every_epoch_saved):
    def spoiled(epoch):
        for inputs, labels in batches(epoch):
            yield inputs * (factor if epoch == 2 else 1), labels

    with pytest.raises(FloatingPointError, match=r"seed 0.*epoch 3\. .*learning"):
        train(batches=spoiled)
    (path,) = checkpoints()
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(("bad", "word"), [({"epochs": 0}, "epochs"), ({"schedule": "x"}, "'x'")])
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        train(**bad)


def test_predict_keeps_the_order_and_leaves_the_model_in_eval_mode():
    split = noise_split(1100, size=8)  # more than two batches
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    outputs = utils.predict(model, split)
    assert not model.training
    assert outputs.dtype == torch.float32
    assert torch.allclose(outputs, model(split.images / 127.5 - 1), atol=1e-5)


def test_each_epoch_has_random_numbers_of_its_own():
    drawn = []

    def loop(training, batches, loss_fn):
        drawn.append(torch.rand(4))
        return train_epoch(training, batches, loss_fn)

    train(loop=loop, epochs=3)
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 3


def test_the_scaler_is_restored(tmp_path):
    trainings = []
    for scale in (8.0, 2.0):
        training = utils.new_training(make_model(), utils.Plan("x", 1, STEPS))
        training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainings.append(utils.Checkpointer(tmp_path / "a.pt", training))
    stored, fresh = trainings
    stored.save_if_due([{"epoch": 1}], last=True)
    assert fresh.load() == [{"epoch": 1}]
    assert fresh.training.scaler.get_scale() == 8.0
