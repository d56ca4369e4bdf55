"""Cells of the notebook that no other test executes, with made-up models and data."""

import ast
import json
import math
import time
import types
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, noise_split
from test_biggan import DRAWS
from test_loaders import marked, marks, rows, shuffled
from torch import nn
from torch.testing import assert_close

import utils
from tools import notebook as tool


def source_of(words):
    cells = tool.code_cells(tool.read(tool.NOTEBOOK))
    (source,) = [
        c.source for c in cells if words in c.source and "helper-module" not in tool.tags(c)
    ]
    return source


def run_cell(nb, words, **names):
    """Execute the cell that holds `words` after the definitions and `names`; all its names."""
    names = vars(nb) | {"results": {}} | names
    exec(source_of(words), names)
    return names


class Guess(nn.Module):
    """Reads the number of a `marked` image, and is wrong for the first `wrong` of them."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.weight = nn.Parameter(torch.zeros(1))  # says on which device the model is

    def forward(self, images):
        number = marks(images)
        return F.one_hot((number + (number < self.wrong)) % 10, 10).float()


class Pair(nn.Module):
    def __init__(self, *wrong):
        super().__init__()
        self.parts = nn.ModuleList(map(Guess, wrong))

    def task(self, number):
        return self.parts[number]


@pytest.fixture
def tables(monkeypatch):
    shown = []
    monkeypatch.setattr(utils, "show_table", lambda frame, *_, **__: shown.append(frame))
    monkeypatch.setattr(utils, "show_figure", lambda figure, *_, **__: plt.close(figure))
    return shown


@pytest.fixture
def handed(monkeypatch):
    """What a cell hands to run_parallel; a later recipe gets a better accuracy."""
    tasks = {}

    def run_parallel(trials, **_):
        tasks.update(trials)
        order = ["baseline", "tuned", "augmented", "strong", "street"]
        return {k: float(order.index(k[1])) if k[1] in order else [50.0, 50.0] for k in trials}

    monkeypatch.setattr(utils, "run_parallel", run_parallel)
    return tasks


def two_sets():
    first = utils.DigitData("MNIST", shuffled(200), marked(100), real=True)
    return {
        "handwritten": first,
        "street": utils.DigitData("SVHN", noise_split(utils, 250, seed=5), marked(100), True),
    }


@pytest.mark.parametrize(
    ("step", "name"), [("(b) recipes", "chosen"), ("(d) recipes", "small_chosen")]
)
def test_recipes_are_tried_on_images_that_were_held_out_and_the_best_is_chosen(
    nb, handed, step, name
):
    tasks = two_sets()
    splits = {role: nb.train_val_split(data.train) for role, data in tasks.items()}
    sizes = {"SELECTION_SIZE": 100, "SELECTION_EPOCHS": 1, "SMALL_SIZE": 50, "SMALL_SEEDS": [0]}
    names = run_cell(
        nb, f'title="1 {step}"', tasks=tasks, splits=splits, SMALL_STEPS=2, EPOCHS=2, **sizes
    )
    for (role, _), trial in handed.items():
        fit_on, held_out = trial.args[:2]
        assert rows(held_out) == rows(splits[role][1])
        assert set(rows(fit_on)) <= set(rows(tasks[role].train)) - set(rows(held_out))
    assert len(handed) >= 6
    assert names[name] == {"handwritten": "street", "street": "street"}


def test_ways_to_share_are_tried_on_images_that_were_held_out(nb, monkeypatch):
    tasks = two_sets()
    splits = {role: nb.train_val_split(data.train) for role, data in tasks.items()}
    sizes = {"PROBE_STEPS": 2, "PROBE_SEEDS": [0], "PROBE_EPOCHS": 1}
    chosen = {"handwritten": "strong", "street": "street"}
    single = {"handwritten": 1.0, "street": 1.0}

    def run_parallel(trials, **_):
        return {k: single.get(k[0], [50.0, 50.0]) for k in trials}

    monkeypatch.setattr(utils, "run_parallel", run_parallel)
    names = run_cell(
        nb, 'title="1 (c) sharing"', tasks=tasks, splits=splits, chosen=chosen, **sizes
    )
    for number, role in enumerate(tasks):
        assert rows(names["fit_parts"][number]) == rows(splits[role][0])
        assert rows(names["held_parts"][number]) == rows(splits[role][1])


def test_final_trainings_have_the_chosen_recipe_and_all_training_images(nb, monkeypatch):
    tasks, seen = two_sets(), {}
    monkeypatch.setattr(utils, "run_parallel", lambda trials, **_: seen.update(trials))
    chosen = {"handwritten": "strong", "street": "street"}
    run_cell(nb, 'title="1 (b)"', tasks=tasks, chosen=chosen, SEEDS=[0, 1], EPOCHS=1)
    for (role, kind, seed), task in seen.items():
        train, _, recipe, plan = task.args
        assert train is tasks[role].train
        assert recipe is (nb.BASELINE if kind == "baseline" else nb.RECIPES[chosen[role]])
        assert plan.seed == seed
    assert len(seen) == 6


def test_results_of_b_are_of_test_images(nb, tables):
    data = utils.DigitData("MNIST", marked(200), marked(100), real=True)
    tasks = {"handwritten": data, "street": replace(data, name="SVHN")}
    history = [{"train_acc": 99.0, "test_cross_entropy": 0.1}]
    wrong = {
        ("handwritten", "baseline"): 10,
        ("handwritten", "selected"): 4,
        ("street", "baseline"): 20,
        ("street", "selected"): 6,
    }
    single = {(*key, 0): (Guess(count), history) for key, count in wrong.items()}
    names = run_cell(
        nb,
        "# @title Results of (b)",
        tasks=tasks,
        single=single,
        SEEDS=[0],
        EPOCHS=1,
        chosen=dict.fromkeys(tasks, "street"),
        svhn_gray=tasks["street"],
        mnist=data,
    )
    assert names["single_acc"] == {
        key: [pytest.approx(100 - count)] for key, count in wrong.items()
    }
    for role, part in (("handwritten", (90, 96)), ("street", (80, 94))):
        result = names["results"]["single_task"][role]
        assert (result["suggested_test_acc"], result["test_acc"]) == pytest.approx(part)
    assert names["results"]["single_task"]["across"] == {
        "MNIST reads SVHN": pytest.approx(96),
        "SVHN reads MNIST": pytest.approx(94),
    }


def test_results_of_c_are_each_heads_and_two_heads_minus_single(nb, tables):
    data = utils.DigitData("MNIST", marked(200), marked(100), real=True)
    tasks = {"handwritten": data, "street": replace(data, name="SVHN")}
    multi = {
        ("baseline", 0): (Pair(10, 20), []),
        ("selected", 0): (Pair(4, 8), []),
        ("selected", 1): (Pair(2, 7), []),
    }
    single_acc = {("handwritten", "selected"): [97.0, 99.0], ("street", "selected"): [90.0, 91.0]}
    pair = tuple(tasks.values())
    names = run_cell(
        nb,
        "# @title Results of (c)",
        tasks=tasks,
        multi=multi,
        single_acc=single_acc,
        SEEDS=[0, 1],
        EPOCHS=1,
        baseline_pair=pair,
        selected_pair=pair,
        sharing_acc={},
        batch_norm="mixed",
        SHARED_STEPS=1,
    )
    result = names["results"]["multi_task"]
    assert result["handwritten"]["per_seed"] == pytest.approx([96, 98])
    assert result["street"]["per_seed"] == pytest.approx([92, 93])
    assert [result[role]["suggested_test_acc"] for role in tasks] == pytest.approx([90, 80])
    assert [text.split()[0] for text in tables[0].iloc[:, -1]] == ["−1.00", "+2.00"]


def test_results_of_d_are_of_test_images(nb, tables):
    data = utils.DigitData("MNIST", marked(200), marked(100), real=True)
    pair = (data, replace(data, name="SVHN"))
    tasks = dict(zip(("handwritten", "street"), pair, strict=True))
    small = {}
    for kind, more in (("baseline", 10), ("selected", 0)):
        small |= {
            (kind, "handwritten", 0): (Guess(1 + more), []),
            (kind, "street", 0): (Guess(2 + more), []),
            (kind, "two heads", 0): (Pair(3 + more, 4 + more), []),
        }
    setting = nb.TwoTasks(None, tuple(part.test for part in pair), (nb.TUNED, nb.TUNED), "mixed")
    settings = {"baseline": setting, "selected": setting}
    names = run_cell(
        nb,
        "# @title Results of (d)",
        tasks=tasks,
        small=small,
        SMALL_SETTINGS=settings,
        SMALL_SEEDS=[0],
        SMALL_SIZE=50,
        SMALL_STEPS=1,
        EPOCHS=1,
        small_chosen={},
        small_validation={},
    )
    found = names["small_acc"]
    assert found["selected", "single task"].tolist() == [pytest.approx([99, 98])]
    assert found["selected", "two heads"].tolist() == [pytest.approx([97, 96])]
    assert found["baseline", "two heads"].tolist() == [pytest.approx([87, 86])]


def test_errors_of_a_digit_are_those_of_its_label(nb, tables):
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    guess = {("street", "selected", 0): torch.tensor([0, 0, 0, 1, 1, 1])}
    more = torch.arange(2, 10)
    split = utils.Split(torch.zeros(14, 3, 2, 2, dtype=torch.uint8), torch.cat([labels, more]))
    guess = {key: torch.cat([value, more]) for key, value in guess.items()}
    svhn = utils.DigitData("SVHN", split, split, real=True)
    names = run_cell(
        nb,
        "# @title Figure: errors of each digit",
        single_guess=guess,
        multi_guess=guess,
        svhn=svhn,
        SEEDS=[0],
        results={"multi_task": {}},
    )
    assert names["results"]["multi_task"]["digit_errors"]["single"] == [25.0] + [0.0] * 9


def test_the_table_of_answers_follows_from_the_results(nb, tables):
    committed = tool.read(tool.NOTEBOOK)
    results = json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))
    joint = results["joint_embedding"]
    sets = [
        types.SimpleNamespace(name=data["name"], real=True) for data in results["data"].values()
    ]
    run_cell(
        nb,
        "# @title The table of answers",
        results=results,
        joint=joint,
        SMALL_SIZE=results["few_samples"]["size"],
        answers=None,
        tasks=dict(zip(results["data"], sets, strict=True)),
        mnist=sets[0],
        svhn=sets[1],
        SEEDS=[0, 1, 2],
        SMALL_SEEDS=range(5),
        top1_100=joint["top1_100"],
        top1_100_std=joint["top1_100_std"],
        run_started=time.perf_counter(),
    )
    (frame,) = tables
    lines = [list(frame.columns), *frame.values.tolist()]
    assert tool.markdown_table(
        [[utils.cell_text(v) for v in line] for line in lines]
    ) == tool.answers_table(committed)


def test_the_reverse_way_asks_with_svhn_images(nb, monkeypatch):
    (function,) = [
        node
        for node in ast.parse(source_of("# @title Scores")).body
        if getattr(node, "name", "") == "score"
    ]
    names = dict(vars(nb)) | {
        "top1_of_draws": lambda queries, pool: {"100": [queries, pool], "all": [queries, pool]}
    }
    exec(ast.unparse(function), names)
    sets = {
        f"{name} {part}": f"{name} {part}"
        for name in ("mnist", "svhn")
        for part in ("test", "pool")
    }
    assert names["score"](sets) == {
        "100": ["mnist test", "svhn pool"],
        "all": ["mnist test", "svhn pool"],
        "reverse": ["svhn test", "mnist pool"],
    }


def test_wrong_neighbors_are_judged_by_the_labels_of_the_gallery(nb):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2_500, 4, generator=generator)
    pool = noise_split(utils, 2_500, 32, 3)
    queries = torch.randn(40, 4, generator=generator)
    mnist = utils.DigitData("MNIST", noise_split(utils, 40), noise_split(utils, 40), real=True)
    embedded = {
        "svhn pool": nb.Digits(z, pool.labels),
        "mnist test": nb.Digits(queries, mnist.test.labels),
    }
    names = run_cell(
        nb,
        "gallery_z, gallery_images =",
        embedded=embedded,
        street_pool=pool,
        mnist=mnist,
    )
    _, gallery = nb.draw_indices(0, 40, 2_500)
    hits = nb.top1_hits(embedded["mnist test"], nb.Digits(z[gallery], pool.labels[gallery]))
    assert names["wrong_queries"].tolist() == (~hits).nonzero().flatten().tolist()


def test_one_class_is_shown_by_slerp_and_by_lerp(nb):
    gan = replace(DRAWS, classes=["MNIST 4", "MNIST 9", "SVHN 3", "SVHN 5", "SVHN 6"])
    names = run_cell(nb, 'one_class[f"{ONE_CLASS}, {method.__name__}"]', gan=gan)
    start, end = nb.truncated_noise(2, 3, names["TRUNCATION"], seed=12)
    for method in (nb.slerp, nb.lerp):
        strip = names["one_class"][f"SVHN 3, {method.__name__}"][:, :, 0, 0]
        assert_close(strip, names["TRUNCATION"] * nb.interpolate(start, end, method))


def test_the_table_of_the_spiral_has_the_angle_of_a_step(nb, tables):
    run_cell(nb, "same_matrix = []")
    (frame,) = tables
    for alpha, turn in zip(frame["α"], frame["steps per turn"], strict=True):
        angles = np.angle(np.linalg.eigvals(nb.update_matrix(float(alpha))))
        assert turn == f"{2 * math.pi / abs(angles[0]):.1f}"
