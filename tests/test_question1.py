"""Question 1 (b) to (d): networks, losses, the loop, short trainings, and summaries over seeds."""

import warnings
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_split, patterns
from scipy import stats
from torch import nn

import utils

KINDS = ("mixed", "per domain", "separate passes")
ROLES = ("handwritten", "street")


def test_the_trunk_is_the_starters_base_cnn_and_a_head_has_one_hidden_layer(nb):
    starter = nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    trunk = nb.base_trunk()
    starter.load_state_dict(trunk.state_dict())
    for size in (18, 28, 32):
        images = torch.randn(4, 1, size, size)
        assert torch.allclose(trunk(images), starter(images), atol=1e-6)
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert repr(nb.task_head()) == repr(head)


@pytest.mark.parametrize(("kind", "passes"), list(zip(KINDS, (1, 1, 2), strict=True)))
def test_the_first_batch_norm_sees_both_halves_or_one_half_as_the_kind_says(nb, kind, passes):
    """Mixed: the statistics are of both halves. Else: each half is normalized by its own."""
    model = nb.two_head_model(kind, [nb.BASELINE] * 2)
    outputs = []
    model.trunk[1].register_forward_hook(lambda *call: outputs.append(call[-1]))
    halves = torch.randn(8, 1, 20, 20), 2 + torch.randn(8, 1, 20, 20)
    with torch.no_grad():
        model(*halves)
        convolved = [model.trunk[0](half) for half in halves]
        if kind == "mixed":
            convolved = [torch.cat(convolved)]
        expected = [F.batch_norm(one, None, None, training=True) for one in convolved]
    assert torch.allclose(torch.cat(outputs), torch.cat(expected), atol=1e-4)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == (6 if kind == "per domain" else 3)
    assert {int(norm.num_batches_tracked) for norm in norms} == {passes}


def trained_two_heads(nb, kind):
    """A two-head model in use, whose domains have clearly different statistics."""
    torch.manual_seed(1)
    model = nb.two_head_model(kind, [nb.BASELINE, nb.Recipe(side=20)])
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
    with torch.no_grad():
        for _ in range(20):
            model(2 * torch.randn(8, 1, 20, 20) + 1, 0.1 * torch.randn(8, 1, 20, 20) - 1)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1])
def test_the_model_of_one_task_is_its_half_of_the_joint_model(nb, kind, number):
    model = trained_two_heads(nb, kind)
    halves = torch.randn(4, 1, 20, 20), torch.randn(4, 1, 20, 20)
    with torch.no_grad():
        expected = model(*halves)[number]
        assert torch.allclose(nb.model_of_task(model, number)(halves[number]), expected, atol=1e-5)
        other = nb.model_of_task(model, 1 - number)(halves[number])
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_is_prepared_by_its_own_recipe(nb, kind):
    recipes = (nb.STRONG, nb.HOUSE_NUMBERS)
    model = nb.two_head_model(kind, recipes).eval()
    images = torch.randn(4, 1, 32, 32)
    for prepare, recipe in zip(model.prepare, recipes, strict=True):
        assert torch.equal(prepare(images), nb.preprocessing(recipe).eval()(images))


def test_recomputed_averages_are_those_of_each_data_sets_own_images(nb):
    """Then a model in use gives what it gives in training with all images as one batch."""
    bright = noise_split(50, seed=1)
    train = (noise_split(40), utils.Split(bright.images // 4 + 192, bright.labels))
    models = {"two heads": nb.two_head_model("per domain", [nb.BASELINE] * 2)}
    for role in ROLES:
        models[role] = nn.Sequential(nb.base_trunk(), nb.task_head())
    before = {name: deepcopy(model.state_dict()) for name, model in models.items()}
    found = nb.recompute_averages(models, train)
    for number, role in enumerate(ROLES):
        images = utils.to_float(train[number].images)
        for model in (found[role], nb.model_of_task(found["two heads"], number)):
            with torch.no_grad():
                expected = deepcopy(model).train()(images)
                assert torch.allclose(model.eval()(images), expected, atol=1e-3)
    for name, model in models.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key])  # the models that were trained
            if "running" not in key and "tracked" not in key:
                assert torch.equal(value, found[name].state_dict()[key])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_of_smoothed_labels_and_the_metrics_of_plain_ones(nb, smoothing):
    logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    loss, metrics = nb.classification_loss(nn.Identity(), (logits, labels), smoothing)
    target = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
    assert torch.allclose(loss, -(target * logits.log_softmax(1)).sum(1).mean())
    assert torch.allclose(metrics["cross_entropy"], F.cross_entropy(logits, labels))
    assert metrics["acc"] == 100 * (logits.argmax(1) == labels).float().mean()


def test_the_multi_task_loss_is_the_mean_of_both_each_with_its_own_smoothing(nb):
    halves = [(torch.randn(8, 10), torch.arange(8)), (torch.randn(8, 10), torch.arange(8).flip(0))]
    loss, metrics = nb.multi_task_loss(lambda *logits: logits, halves, [0.1, 0.3])
    expected = 0
    for half, role, smoothing in zip(halves, ROLES, (0.1, 0.3), strict=True):
        own_loss, own_metrics = nb.classification_loss(nn.Identity(), half, smoothing)
        expected += own_loss / 2
        for name, value in own_metrics.items():
            assert metrics[f"{name}_{role}"] == value
    assert torch.allclose(loss, expected)


def test_a_split_is_evaluated_as_a_whole(nb):
    split = noise_split(515)  # more than a batch, and not a whole number of them
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    logits = model(split.images / 127.5 - 1)
    values = nb.evaluate_split(model, split)
    loss = F.cross_entropy(logits, split.labels).item()
    assert values["test_cross_entropy"] == pytest.approx(loss, abs=1e-5)
    correct = (logits.argmax(1) == split.labels).sum().item()
    assert values["test_acc"] == pytest.approx(100 * correct / 515)


def test_the_loop_is_plain_gradient_descent_with_a_schedule_and_returns_means(nb):
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(5)]
    model, expected = nn.Linear(3, 2), nn.Linear(3, 2)
    expected.load_state_dict(model.state_dict())
    losses = []
    for step, (inputs, labels) in enumerate(batches):
        loss = F.cross_entropy(expected(inputs), labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.5**step * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    training = utils.Training(model.eval(), optimizer, schedule, scaler)
    means = nb.train_epoch(training, iter(batches), nb.classification_loss)
    assert model.training
    assert means["loss"] == means["cross_entropy"] == pytest.approx(np.mean(losses), abs=1e-6)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_an_epoch_has_the_precision_that_is_asked_for_and_keeps_no_graph(nb, monkeypatch):
    monkeypatch.setenv("A3_PRECISION", "bf16")
    kept = []
    monkeypatch.setattr(nb, "mean_of", kept.extend)

    def loss_fn(model, batch):
        assert model(batch[0]).dtype == torch.bfloat16
        return nb.classification_loss(model, batch)

    training = utils.new_training(nn.Linear(3, 2), utils.Plan("x", 1, 1))
    nb.train_epoch(training, iter([(torch.randn(2, 3), torch.tensor([0, 1]))]), loss_fn)
    (row,) = kept
    assert not any(value.requires_grad for value in row.values())


def assert_all_moved(model, before):
    state = model.state_dict()
    for name, value in before.items():
        assert not torch.equal(state[name], value), name


def test_a_single_task_training_learns_and_moves_all_weights(nb):
    data = patterns(384, seed=0)
    train, test = data.first(256), data.take(range(256, 384))
    recipe = nb.Recipe(batch_size=32, lr=1e-2, schedule="onecycle", smoothing=0.1)
    model, history = nb.train_single(
        train, test, recipe, utils.Plan("x", 3, steps_per_epoch=8, seed=5)
    )
    assert history[-1]["test_acc"] > 95
    assert history[-1]["test_acc"] == nb.evaluate_split(model, test)["test_acc"]
    utils.seed_torch(5)
    untrained = nn.Sequential(nn.Sequential(), nb.base_trunk(), nb.task_head())
    assert_all_moved(model, untrained.state_dict())


@pytest.mark.parametrize("models", ["one task", "two heads"])
def test_a_training_depends_on_the_seed_of_its_plan_alone(nb, monkeypatch, tmp_path, models):
    split, recipe = patterns(64, seed=0), nb.Recipe(warp=(9, 0, 0, 0))

    def weights(seed, before):
        torch.manual_seed(before)  # what ran before does not count
        monkeypatch.setenv("A3_RUNS", str(tmp_path / f"{seed} {before}"))  # no checkpoint
        plan = utils.Plan("x", epochs=2, steps_per_epoch=2, seed=seed)
        if models == "one task":
            model, _ = nb.train_single(split, None, recipe, plan)
        else:
            tasks = nb.TwoTasks((split, split), None, (recipe, recipe), "mixed")
            model, _ = nb.train_multi(tasks, plan)
        return next(model.parameters())

    assert torch.equal(weights(3, before=1), weights(3, before=2))
    assert not torch.equal(weights(3, before=1), weights(4, before=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_multi_task_training_learns_both_tasks_and_moves_all_weights(nb, kind):
    data = [patterns(384, seed) for seed in (0, 1)]
    train = tuple(part.first(256) for part in data)
    test = tuple(part.take(range(256, 384)) for part in data)
    recipe = nb.Recipe(lr=1e-2, schedule="onecycle")
    tasks = nb.TwoTasks(train, test, (nb.BASELINE, recipe), kind)
    model, history = nb.train_multi(tasks, utils.Plan("x", epochs=4, steps_per_epoch=8))
    for number, role in enumerate(ROLES):
        last = nb.task_history(history, role)[-1]
        own = nb.evaluate_split(nb.model_of_task(model, number), test[number])
        assert {name: last[name] for name in own} == own
        assert own["test_acc"] > 90
    accuracies = nb.task_accuracies(model, (test[0], test[0]))
    assert accuracies[0] > 90
    assert accuracies[1] < 60
    utils.seed_torch(0)
    assert_all_moved(model, nb.two_head_model(kind, tasks.recipes).state_dict())


def test_summaries_have_the_mean_the_sample_deviation_and_fewer_than_three_values_as_they_are(nb):
    assert nb.summarize([1, 2, 3]) == {"mean": 2.0, "std": 1.0, "per_seed": [1.0, 2.0, 3.0]}
    assert nb.percent([99.126]) == "99.13"
    assert nb.percent([99.126, 98.0]) == "99.13 and 98.00"
    assert nb.percent([1, 2, 3]) == "2.00 ± 1.00"
    assert nb.percent(np.array([90.0, 91, 92, 93, 94])) == "92.00 ± 1.58"


def test_a_difference_has_the_t_interval_of_paired_or_of_unpaired_seeds(nb):
    ours, others = [99.5, 98.0, 99.9, 99.4, 98.1], [99.0, 98.2, 99.0, 99.0, 98.0]
    low, high = stats.ttest_rel(ours, others).confidence_interval()
    assert nb.paired_difference(ours, others) == f"+0.34 ({low:+.2f} to {high:+.2f})"
    low, high = stats.ttest_ind(ours, others, equal_var=False).confidence_interval()
    assert nb.unpaired_difference(ours, others) == f"+0.34 ({low:+.2f} to {high:+.2f})"
    assert nb.paired_difference([1.0], [1.5]) == nb.unpaired_difference([1.0], [1.5]) == "-0.50"
    with warnings.catch_warnings():  # seeds of equal accuracy, as in a tiny run
        warnings.simplefilter("error")
        assert nb.paired_difference([1.0, 2.0], [1.5, 2.5]) == "-0.50"
        assert nb.unpaired_difference([1.0, 1.0], [1.5, 2.5]) == "-1.00"


def test_curves_show_loss_and_error_of_both_parts_beside_each_other(nb):
    history = []
    for epoch in (1, 2):
        train = {"train_cross_entropy": 0.5, "train_acc": 90.0}
        test = {"test_cross_entropy": 0.5 + epoch, "test_acc": 90.0 + epoch}
        history.append({"epoch": epoch, **train, **test})
    figure = nb.plot_curves({"MNIST": {"baseline": history}})
    lines = [[list(line.get_ydata()) for line in axis.lines[:2]] for axis in figure.axes]
    assert lines == [[[0.5, 0.5], [1.5, 2.5]], [[10, 10], [9, 8]]]  # training, test
    plt.close(figure)


def test_curves_over_steps_count_those_of_each_run(nb):
    row = {"train_cross_entropy": 1, "test_cross_entropy": 1, "train_acc": 50, "test_acc": 50}
    history = [{"epoch": epoch, **row} for epoch in (1, 2, 3)]
    runs = {"baseline": history, "selected": history}
    figure = nb.plot_curves({"MNIST": runs}, {"baseline": 8, "selected": 120})
    for axis in figure.axes:
        steps = [list(line.get_xdata()) for line in axis.lines]
        assert steps == [[8, 16, 24], [8, 16, 24], [120, 240, 360], [120, 240, 360]]
        assert axis.get_xlabel() == "step"
        labels = [line.get_label() for line in axis.lines]
        assert labels == [f"{run}, {part}" for run in runs for part in ("training", "test")]
    plt.close(figure)


def test_a_small_p_value_is_not_written_with_false_precision(nb):
    assert [nb.p_text(p) for p in (1e-24, 0.0009, 0.0015, 0.04, 1.0)] == [
        *["< 0.001", "< 0.001", "0.002", "0.040", "1.000"],
    ]
