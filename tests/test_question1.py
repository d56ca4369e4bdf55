"""Question 1 (b) to (d): networks, losses, the loop, short trainings, and summaries over seeds."""

import tempfile
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_split
from scipy import stats
from torch import nn

import utils

KINDS = ("mixed", "per domain", "separate passes")


def patterns(count, seed):
    """Noisy images of ten fixed patterns, and their labels: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(0, 2, (10, 1, 18, 18), generator=generator) * 200
    noise = torch.randint(0, 56, (count, 1, 18, 18), generator=generator)
    labels = torch.arange(count) % 10
    return utils.Split((known[labels] + noise).to(torch.uint8), labels)


# ---- networks ----


def test_the_trunk_is_the_starters_base_cnn_and_a_head_has_one_hidden_layer(nb):
    starter = [
        *(nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    starter = nn.Sequential(*starter)
    trunk = nb.base_trunk()
    starter.load_state_dict(trunk.state_dict())
    images = torch.randn(4, 1, 28, 28)
    for model in (trunk, starter):
        model(images).square().sum().backward()
    assert torch.allclose(trunk(images), starter(images), atol=1e-6)
    for ours, theirs in zip(trunk.parameters(), starter.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert repr(nb.task_head()) == repr(head)
    for size in (18, 28, 32):
        assert nb.base_trunk()(torch.randn(4, 1, size, size)).shape == (4, 64)


def test_domain_batch_norm_gives_each_half_a_batch_norm_of_its_own(nb):
    layer = nb.DomainBatchNorm2d(3)
    halves = torch.randn(6, 3, 4, 4) + 5, 3 * torch.randn(6, 3, 4, 4) - 5
    outputs = layer(torch.cat(halves)).chunk(2)
    for norm, half, output in zip(layer.norms, halves, outputs, strict=True):
        alone = nn.BatchNorm2d(3)
        assert torch.allclose(output, alone(half), atol=1e-6)
        assert torch.allclose(norm.running_mean, alone.running_mean)
        assert torch.allclose(norm.running_var, alone.running_var)
    assert layer.norms[0].weight is not layer.norms[1].weight


def test_per_domain_replaces_every_batch_norm_and_the_other_kinds_none(nb):
    def channels(kind):
        layers = nb.TwoHeads(kind, [nb.BASELINE] * 2).trunk
        return [
            one.norms[0].num_features for one in layers if isinstance(one, nb.DomainBatchNorm2d)
        ]

    assert [channels(kind) for kind in KINDS] == [[], [32, 64, 64], []]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_batch_norm_sees_both_halves_or_one_half_as_the_kind_says(nb, kind):
    """Mixed: the statistics are of both halves. Else: each half is normalized by its own."""
    model = nb.TwoHeads(kind, [nb.BASELINE] * 2)
    first, outputs = nn.Sequential(*model.trunk[:2]), []
    model.trunk[1].register_forward_hook(lambda *call: outputs.append(call[-1]))
    halves = torch.randn(8, 1, 20, 20), 2 + torch.randn(8, 1, 20, 20)
    with torch.no_grad():
        model(*halves)
        convolved = [first[0](half) for half in halves]
        if kind == "mixed":
            convolved = [torch.cat(convolved)]
        expected = [F.batch_norm(one, None, None, training=True) for one in convolved]
    assert torch.allclose(torch.cat(outputs), torch.cat(expected), atol=1e-4)
    norm = model.trunk[1].norms[1] if kind == "per domain" else model.trunk[1]
    assert norm.num_batches_tracked == (2 if kind == "separate passes" else 1)


def trained_two_heads(nb, kind):
    """A two-head model in use, whose domains have clearly different statistics."""
    torch.manual_seed(1)
    model = nb.TwoHeads(kind, [nb.BASELINE, nb.Recipe(side=20)])
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
        assert torch.allclose(model.task(number)(halves[number]), expected, atol=1e-5)
        other = model.task(1 - number)(halves[number])
    assert not torch.allclose(other, expected, atol=1e-2)


def test_evaluating_a_task_leaves_a_finished_joint_model_in_eval_mode(nb):
    model = nb.TwoHeads("per domain", [nb.BASELINE] * 2).eval()
    nb.evaluate_tasks(model, [noise_split(utils, 8), noise_split(utils, 8)])
    assert not any(module.training for module in model.modules())


# ---- losses and metrics ----


def by_hand(logits, labels, smoothing):
    target = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_of_smoothed_labels_and_the_metrics_of_plain_ones(nb, smoothing):
    logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    loss, metrics = nb.classification_loss(nn.Identity(), (logits, labels), smoothing)
    assert torch.allclose(loss, by_hand(logits, labels, smoothing))
    assert loss.requires_grad
    assert torch.allclose(metrics["cross_entropy"], by_hand(logits, labels, 0.0))
    assert metrics["acc"] == 100 * (logits.argmax(1) == labels).float().mean()
    assert not any(value.requires_grad for value in metrics.values())


def test_the_multi_task_loss_is_the_mean_of_both_each_with_its_own_smoothing(nb):
    logits = {"handwritten": torch.randn(8, 10), "street": torch.randn(8, 10)}
    labels = {"handwritten": torch.arange(8), "street": torch.arange(8).flip(0)}
    batch = [(logits[role], labels[role]) for role in logits]
    loss, metrics = nb.multi_task_loss(lambda *halves: halves, batch, [0.1, 0.3])
    parts = [by_hand(*half, share) for half, share in zip(batch, (0.1, 0.3), strict=True)]
    assert torch.allclose(loss, sum(parts) / 2)
    for role, one in logits.items():
        assert torch.allclose(metrics[f"cross_entropy_{role}"], by_hand(one, labels[role], 0.0))
        assert metrics[f"acc_{role}"] == 100 * (one.argmax(1) == labels[role]).float().mean()


def test_accuracy_is_the_percentage_of_labels_with_the_largest_score(nb):
    logits = torch.tensor([[0.0, 2, 1], [5, 0, 0], [0, 0, 1], [3, 1, 2]])
    assert nb.accuracy(logits, torch.tensor([1, 0, 0, 0])) == 75.0


def test_a_split_is_evaluated_as_a_whole_by_values_worked_out_by_hand(nb):
    """Scores 0 to 9 for every image: digit 9 is guessed, and log-sum-exp is 9.45863."""

    class Scores(nn.Module):
        def forward(self, images):
            return torch.arange(10.0).expand(len(images), 10)

    split = noise_split(utils, 515)  # more than a batch; 51 of 515 are nines
    values = nb.evaluate_split(Scores(), split)
    expected = 9.4586297 - split.labels.double().mean().item()
    assert values["test_cross_entropy"] == pytest.approx(expected, abs=1e-5)
    assert values["test_acc"] == pytest.approx(100 * 51 / 515)


def test_the_metrics_of_one_task_lose_its_name(nb):
    row = {"epoch": 1, "train_loss": 3.0, "test_acc_street": 5.0, "train_acc_handwritten": 7.0}
    assert nb.task_history([row], "street") == [{"epoch": 1, "test_acc": 5.0}]
    assert nb.task_history([row], "handwritten") == [{"epoch": 1, "train_acc": 7.0}]


# ---- the loop ----


def test_the_loop_is_plain_gradient_descent_with_a_schedule_and_returns_means(nb):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(5)]
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    losses = []
    for step, (inputs, labels) in enumerate(batches):
        loss = F.cross_entropy(reference(inputs), labels)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= 0.5**step * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    training = utils.Training(model.eval(), optimizer, schedule, scaler)
    means = nb.train_epoch(training, iter(batches), nb.classification_loss)
    assert model.training
    assert set(means) == {"loss", "cross_entropy", "acc"}
    assert means["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


# ---- short trainings ----


def assert_all_moved(model, before):
    state = model.state_dict()
    for name, value in before.items():
        assert not torch.equal(state[name], value), name


def test_a_single_task_training_learns_and_moves_all_weights(nb):
    data = patterns(384, seed=0)
    train, test = data.first(256), data.take(range(256, 384))
    recipe = nb.Recipe(batch_size=32, lr=1e-2, schedule="onecycle", smoothing=0.1)
    plan = utils.Plan("x", epochs=3, steps=8, seed=5)
    model, history = nb.train_single(train, test, recipe, plan)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["test_acc"] > 95
    assert history[-1]["test_acc"] == nb.evaluate_split(model, test)["test_acc"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    utils.seed_torch(5)
    untrained = nn.Sequential(nn.Sequential(), nb.base_trunk(), nb.task_head())
    assert_all_moved(model, untrained.state_dict())


@pytest.mark.parametrize("models", ["one task", "two heads"])
def test_a_training_depends_on_the_seed_of_its_plan_alone(nb, monkeypatch, tmp_path, models):
    split, recipe = patterns(64, seed=0), nb.Recipe(warp=(9, 0, 0, 0))

    def weights(seed):
        torch.manual_seed(77 + len(list(tmp_path.iterdir())))  # what came before does not count
        monkeypatch.setenv("A3_RUNS", str(tempfile.mkdtemp(dir=tmp_path)))  # no checkpoint
        plan = utils.Plan("x", epochs=2, steps=2, seed=seed)
        if models == "one task":
            model, history = nb.train_single(split, None, recipe, plan)
        else:
            tasks = nb.TwoTasks((split, split), None, (recipe, recipe), "mixed")
            model, history = nb.train_multi(tasks, plan)
        assert not [name for row in history for name in row if "test" in name]
        return next(model.parameters())

    first = weights(3)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_multi_task_training_learns_both_tasks_and_moves_all_weights(nb, kind):
    data = [patterns(384, seed) for seed in (0, 1)]
    train = tuple(part.first(256) for part in data)
    test = tuple(part.take(range(256, 384)) for part in data)
    recipe = nb.Recipe(lr=1e-2, schedule="onecycle")
    tasks = nb.TwoTasks(train, test, (nb.BASELINE, recipe), kind)
    model, history = nb.train_multi(tasks, utils.Plan("x", epochs=4, steps=8))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    for number, role in enumerate(("handwritten", "street")):
        assert nb.task_history(history, role)[-1]["test_acc"] > 90
        assert nb.evaluate_split(model.task(1 - number), test[number])["test_acc"] < 60
    utils.seed_torch(0)
    assert_all_moved(model, nb.TwoHeads(kind, tasks.recipes).state_dict())


def test_no_loss_of_a_step_waits_for_a_gpu(nb):
    """On the device 'meta' there are shapes but no values: reading one is an error there."""
    images, labels = torch.empty(8, 1, 32, 32, device="meta"), torch.zeros(8, device="meta").long()
    images = nb.augment(images, torch.Generator(), nb.STREET)
    network = nn.Sequential(nb.preprocessing(nb.STREET), nb.base_trunk(), nb.task_head())
    loss, _ = nb.classification_loss(network.to("meta"), (images, labels), 0.1)
    loss.backward()
    for kind in KINDS:
        model = nb.TwoHeads(kind, [nb.STREET] * 2).to("meta")
        loss, _ = nb.multi_task_loss(model, [(images, labels)] * 2, [0.1, 0.1])
        loss.backward()


# ---- summaries ----


def test_percent_shows_the_sample_deviation_of_three_seeds_and_fewer_as_they_are(nb):
    assert nb.percent([99.126]) == "99.13"
    assert nb.percent([99.126, 98.0]) == "99.13 and 98.00"
    assert nb.percent([1, 2, 3]) == "2.00 ± 1.00"
    assert nb.percent(np.array([90.0, 91, 92, 93, 94])) == "92.00 ± 1.58"


def test_a_paired_difference_has_the_t_interval_of_its_seeds(nb):
    ours, others = [99.5, 98.0, 99.9, 99.4, 98.1], [99.0, 98.2, 99.0, 99.0, 98.0]
    gaps = np.subtract(ours, others)
    low, high = stats.t.interval(0.95, 4, loc=gaps.mean(), scale=stats.sem(gaps))
    expected = f"{gaps.mean():+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−")
    assert nb.paired_difference(ours, others) == expected
    assert nb.paired_difference([2, 3], [1, 1]) == "+1.50 (−4.85 to +7.85)"  # 12.706 x 0.5
    assert nb.paired_difference([1.0], [1.5]) == "−0.50"


def test_equal_gaps_are_no_reason_for_a_warning(nb):
    with warnings.catch_warnings(action="error"):
        assert nb.paired_difference([1.5, 2.5], [1, 2]) == "+0.50 (+0.50 to +0.50)"


def test_a_summary_has_mean_sample_deviation_and_all_values(nb):
    assert nb.summarize([1, 2, 3]) == {"mean": 2.0, "std": 1.0, "per_seed": [1.0, 2.0, 3.0]}
    assert nb.summarize(np.array([5.0])) == {"mean": 5.0, "std": 0.0, "per_seed": [5.0]}


def test_curves_show_loss_and_error_of_both_parts_beside_each_other(nb):
    values = {"cross_entropy": 0.5, "acc": 90.0}
    history = [{"epoch": 1}, {"epoch": 2}]
    for row in history:
        for part, extra in (("train", 0), ("test", row["epoch"])):
            row |= {f"{part}_{name}": value + extra for name, value in values.items()}
    figure = nb.plot_curves({"MNIST": {"baseline": history}, "SVHN": {"selected": history}})
    assert [axis.get_title() for axis in figure.axes] == ["MNIST", "MNIST", "SVHN", "SVHN"]
    lines = [[list(line.get_ydata()) for line in axis.lines[:2]] for axis in figure.axes[:2]]
    assert lines == [[[0.5, 0.5], [1.5, 2.5]], [[10, 10], [9, 8]]]
    assert figure.axes[3].lines[0].get_linestyle() != figure.axes[3].lines[1].get_linestyle()
    plt.close(figure)
    (row,) = nb.with_error([{"train_acc": 100.0, "test_acc": 99.5}])
    assert (row["train_error"], row["test_error"]) == (0.01, 0.5)  # the axis is logarithmic
