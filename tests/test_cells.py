"""Cells of the notebook that no other test executes, with made-up models and data."""

import ast
import dis
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DRAWS, noise_split, seeded
from test_loaders import marked, marks, rows, shuffled
from torch import nn
from torch.testing import assert_close

import utils
from tools import notebook as tool


def sources():
    """The notebook's code cells, in order, without the copy of utils.py."""
    cells = tool.code_cells(tool.read(tool.NOTEBOOK))
    return [cell.source for cell in cells if "helper-module" not in tool.tags(cell)]


def source_of(words):
    (source,) = [source for source in sources() if words in source]
    return source


CHOSEN = {"handwritten": "strong", "street": "house numbers"}
SEEDS = {"SEEDS": [0], "PROBE_SEEDS": [0], "SMALL_SEEDS": [0]}
NAMES_OF_EPOCHS = ("EPOCHS", "SELECTION_EPOCHS", "PROBE_EPOCHS", "SMALL_SELECTION_EPOCHS")
EPOCHS = dict.fromkeys(NAMES_OF_EPOCHS, 1)
STEPS = dict.fromkeys(("PROBE_STEPS", "SHARED_STEPS", "SMALL_STEPS"), 2)
SIZES = {"SELECTION_SIZE": 100, "SMALL_SIZE": 50}


def run_cell(nb, words, **names):
    """Execute the cell that holds `words` after the definitions, settings and `names`."""
    settings = {"results": {}, "chosen": CHOSEN} | SEEDS | EPOCHS | STEPS | SIZES
    names = vars(nb) | settings | names
    exec(source_of(words), names)
    return names


DIGITS = utils.DigitData("MNIST", noise_split(40), noise_split(40), real=True)


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
    """Two heads without a trunk, each a Guess."""

    def __init__(self, *wrong):
        super().__init__()
        self.prepare = nn.ModuleList([nn.Identity() for _ in wrong])
        self.trunk = nn.Sequential()
        self.heads = nn.ModuleList(map(Guess, wrong))


@pytest.fixture
def tables(monkeypatch):
    shown = []
    monkeypatch.setattr(utils, "show_table", lambda frame, *_, **__: shown.append(frame))
    monkeypatch.setattr(utils, "show_figure", lambda figure, *_, **__: plt.close(figure))
    return shown


@pytest.fixture
def handed(monkeypatch):
    """What a cell hands to run_parallel; what comes later gets a better accuracy."""
    tasks = {}

    def run_parallel(trials, **_):
        tasks.update(trials)
        accuracies = {}
        for number, key in enumerate(trials):
            has_one_task = set(key) & set(CHOSEN)
            accuracies[key] = number if has_one_task else [number, number]
        return accuracies

    monkeypatch.setattr(utils, "run_parallel", run_parallel)
    return tasks


@pytest.fixture
def tasks():
    """Two data sets whose test images are `marked`."""
    trains = {"MNIST": shuffled(200), "SVHN": noise_split(300, seed=5)}
    sets = [utils.DigitData(name, trains[name], marked(100), real=True) for name in trains]
    return dict(zip(("handwritten", "street"), sets, strict=True))


LAST_RECIPE = dict.fromkeys(CHOSEN, "house numbers")
BEST = {  # of what is tried, the last: the name in the notebook, and what it must hold
    "(b) recipes": ("chosen", LAST_RECIPE),
    "(c) sharing": ("best_sharing", "per domain"),
    "(d) recipes": ("small_chosen", LAST_RECIPE),
}


@pytest.mark.parametrize("step", BEST)
def test_what_is_tried_is_judged_on_held_out_images_and_the_best_is_chosen(nb, handed, tasks, step):
    splits = {role: nb.train_val_split(data.train) for role, data in tasks.items()}
    given = {"tasks": tasks, "splits": splits, "PROBE_STEPS": 100, "PROBE_SEEDS": [0, 1]}
    names = run_cell(nb, f'title="1 {step}"', **given)
    trials_of_one_task = []
    for key, trial in handed.items():
        trials_of_one_task += [(role, trial) for role in tasks if role in key]
    for role, trial in trials_of_one_task:
        fit_on, held_out = trial.args[:2]
        assert rows(held_out) == rows(splits[role][1])
        assert set(rows(fit_on)) <= set(rows(tasks[role].train)) - set(rows(held_out))
    assert {role for role, _ in trials_of_one_task} == set(tasks)
    if step == "(c) sharing":  # with two heads
        for number, role in enumerate(tasks):
            assert rows(names["fit_parts"][number]) == rows(splits[role][0])
            assert rows(names["held_parts"][number]) == rows(splits[role][1])
        assert all(recipe.grow for recipe in names["shared_recipes"])
        for number, role in enumerate(tasks):
            assert handed[role, 0].args[2] is names["shared_recipes"][number]
        names["train_multi"] = lambda setting, plan: (setting, [])
        names["task_accuracies"] = lambda setting, splits: (setting, splits)
        setting, judged_by = names["validate_two_heads"]("another", None)
        assert setting.train is names["fit_parts"] and judged_by is names["held_parts"]
        assert setting.batch_norm == "another"
        assert setting.recipes is names["shared_recipes"]
        for batch_norm in ("mixed", "separate passes", "per domain"):
            assert handed[batch_norm, 1].args[0] == batch_norm
        assert all(trial.args[-1].seed == seed for (_, seed), trial in handed.items())
        for trial in handed.values():
            assert trial.args[-1].steps_per_epoch == len(splits["street"][0]) // 64
    assert len(handed) >= 5
    name, best = BEST[step]
    assert names[name] == best


def test_the_stage_that_announces_the_time_is_the_first_one():
    (first, *_) = [source for source in sources() if "utils.run_parallel(" in source]
    assert f'title="{utils.FIRST_STAGE}"' in first


def test_final_trainings_have_the_chosen_recipe_and_all_training_images(nb, handed, tasks):
    run_cell(nb, 'title="1 (b)"', tasks=tasks, SEEDS=[0, 1])
    for (role, kind, seed), task in handed.items():
        train, watched, recipe, plan = task.args
        assert train is tasks[role].train
        assert watched is (tasks[role].test if seed == 0 else None)
        assert recipe is (nb.RECIPES[CHOSEN[role]] if kind == "selected" else nb.BASELINE)
        assert plan.seed == seed
    assert len(handed) == 6


def test_two_heads_are_trained_by_the_chosen_kind_with_passes_over_svhn(nb, handed, tasks):
    mnist, svhn = tasks.values()
    recipes = (nb.TUNED, nb.AUGMENTED)
    given = {"mnist": mnist, "svhn_gray": svhn, "SEEDS": [0, 1]}
    given |= {"best_sharing": "per domain", "shared_recipes": recipes}
    run_cell(nb, 'title="1 (c)"', **given)
    for (kind, seed), task in handed.items():
        setting, plan = task.args
        suggested = (nb.BASELINE, nb.BASELINE)
        assert setting.recipes == (recipes if kind == "selected" else suggested)
        assert setting.batch_norm == ("per domain" if kind == "selected" else "mixed")
        assert (setting.test is None) == (seed == 1)
        assert plan.steps_per_epoch == len(svhn.train) // 64
        assert plan.seed == seed
    assert len(handed) == 3


def test_all_models_of_d_see_64_images_of_a_data_set_in_a_step(nb, handed, tasks):
    pair = tuple(tasks.values())
    train, test = tuple(data.train for data in pair), tuple(data.test for data in pair)
    suggested = (nb.BASELINE, nb.BASELINE)
    baseline = nb.TwoTasks(train, test, suggested, "mixed")
    given = {"mnist": pair[0], "svhn": pair[1], "baseline_setting": baseline}
    given["selected_setting"] = replace(baseline, batch_norm="per domain")
    given["small_recipes"] = (nb.STRONG, nb.HOUSE_NUMBERS)
    run_cell(nb, 'title="1 (d)"', **given)
    for (kind, name, _), task in handed.items():
        assert task.args[-1].steps_per_epoch == (2 if kind == "selected" else 1)
        if name == "two heads":  # its loaders always give 64 + 64
            assert len(task.args[0].train[0]) == 50
            assert task.args[0].batch_norm == ("mixed" if kind == "baseline" else "per domain")
        else:
            assert task.args[2].batch_size == 64
    chosen = (nb.STRONG, nb.HOUSE_NUMBERS)
    suggested_64 = (replace(nb.BASELINE, batch_size=64),) * 2
    # Each setting changes one thing: batch norm, then the recipes, then the steps (above).
    for kind, recipes in {
        "baseline": suggested_64,
        "per domain": suggested_64,
        "chosen recipes": chosen,
        "selected": chosen,
    }.items():
        alone = tuple(handed[kind, name, 0].args[2] for name in ("handwritten", "street"))
        assert alone == handed[kind, "two heads", 0].args[0].recipes == recipes
    assert len(handed) == 12


def test_results_of_b_are_of_test_images(nb, tables, tasks):
    mnist, svhn = tasks.values()
    wrong = {
        ("handwritten", "baseline"): 10,
        ("handwritten", "selected"): 4,
        ("street", "baseline"): 20,
        ("street", "selected"): 6,
    }
    history = [{"train_acc": 99.0, "test_cross_entropy": 0.1}]
    single = {(*key, 0): (Guess(count), history) for key, count in wrong.items()}
    given = {"tasks": tasks, "single": single, "svhn_gray": svhn, "mnist": mnist}
    names = run_cell(nb, "# @title Results of (b)", **given)
    found = {key: accuracy for key, (accuracy,) in names["single_acc"].items()}
    assert found == pytest.approx({key: 100 - count for key, count in wrong.items()})
    result = names["results"]["single_task"]
    for role in tasks:
        assert result[role]["test_acc"] == found[role, "selected"]
        assert result[role]["baseline_test_acc"] == found[role, "baseline"]


def test_results_of_c_are_each_heads_beside_those_of_single_models(nb, tables, tasks):
    multi = {
        ("baseline", 0): (Pair(10, 20), []),
        ("selected", 0): (Pair(4, 8), []),
        ("selected", 1): (Pair(2, 7), []),
    }
    mnist, svhn = tasks.values()
    baseline_pair = (replace(mnist, test=mnist.test.first(50)), svhn)  # 10 of 50 will be wrong
    given = {"tasks": tasks, "multi": multi, "baseline_pair": baseline_pair}
    given["selected_pair"] = (mnist, svhn)
    given["single_acc"] = {
        ("handwritten", "baseline"): [71.0],
        ("handwritten", "selected"): [97.0, 99.0],
        ("street", "baseline"): [72.0],
        ("street", "selected"): [90.0, 91.0],
    }
    given |= {"sharing_acc": {}, "best_sharing": "mixed", "SEEDS": [0, 1]}
    names = run_cell(nb, "# @title Results of (c)", **given)
    result = names["results"]["multi_task"]
    assert result["handwritten"]["per_seed"] == pytest.approx([96, 98])
    assert result["street"]["per_seed"] == pytest.approx([92, 93])
    assert [result[role]["baseline_test_acc"] for role in tasks] == pytest.approx([80, 80])
    assert tables[0].iloc[1].tolist() == ["single task, baseline, %", 71, 72]
    measure, *differences = tables[0].iloc[-1]
    assert measure.startswith("selected: two heads minus single")
    assert [text.split()[0] for text in differences] == ["-1.00", "+2.00"]


def test_results_of_d_are_of_test_images(nb, tables, tasks):
    tests = tuple(data.test for data in tasks.values())
    setting = nb.TwoTasks(None, tests, (nb.TUNED, nb.TUNED), "mixed")
    small = {}
    settings = {"baseline": 10, "per domain": 20, "chosen recipes": 30, "selected": 0}
    for kind, more in settings.items():
        small[kind, "handwritten", 0] = Guess(1 + more), []
        small[kind, "street", 0] = Guess(2 + more), []
        small[kind, "two heads", 0] = Pair(3 + more, 4 + more), []
    recomputed = {"subsets": {"two heads": Pair(5, 6)}}
    trials = {("street", "strong"): 60.0}
    given = {"tasks": tasks, "mnist": tasks["handwritten"], "small": small, "small_chosen": {}}
    given["small_validation"] = trials
    given["SMALL_SETTINGS"] = dict.fromkeys(settings, setting)
    given["few_samples"] = lambda setting, *_, **__: replace(setting, train="subsets")
    given["recompute_averages"] = lambda models, train: {**models, **recomputed[train]}
    names = run_cell(nb, "# @title Results of (d)", **given)
    found = names["small_acc"]
    stored = names["results"]["few_samples"]["test_acc"]["baseline"]["two heads"]
    assert stored == [pytest.approx([87]), pytest.approx([86])]
    assert names["results"]["few_samples"]["validation"]["street"] == {"strong": 60.0}
    for key, expected in (("single_task_50", [99, 98]), ("multi_task_50", [97, 96])):
        means = [names["results"][key][role]["mean"] for role in tasks]
        assert means == pytest.approx(expected)
    assert found["selected", "single task"].tolist() == [pytest.approx([99, 98])]
    assert found["selected", "two heads"].tolist() == [pytest.approx([97, 96])]
    assert found["baseline", "two heads"].tolist() == [pytest.approx([87, 86])]
    assert found["per domain", "two heads"].tolist() == [pytest.approx([77, 76])]
    assert found["recomputed", "single task"].tolist() == [pytest.approx([79, 78])]
    assert found["recomputed", "two heads"].tolist() == [pytest.approx([95, 94])]
    assert found["chosen recipes", "two heads"].tolist() == [pytest.approx([67, 66])]
    given |= {"small_acc": found, "SMALL_ROWS": names["SMALL_ROWS"]}
    run_cell(nb, "# @title Table: few samples", **given)
    assert tables[-1].iloc[0].tolist() == ["MNIST, baseline", "89.00", "87.00", "-2.00"]
    assert tables[-1].iloc[7].tolist()[:3] == ["SVHN, recomputed", "78.00", "94.00"]


def test_accuracies_with_few_samples_are_each_on_its_own_test_set(nb):
    tests = (marked(100), marked(50))
    models = {"handwritten": Guess(10), "street": Guess(10), "two heads": Pair(20, 20)}
    found = nb.small_accuracies(models, tests)
    assert found["single task"] == pytest.approx([90, 80])
    assert found["two heads"] == pytest.approx([80, 60])


def test_each_seed_of_d_has_its_own_samples_also_where_averages_are_recomputed(nb, handed, tasks):
    mnist, svhn = tasks.values()
    padded = mnist.map(nb.pad_to)
    baseline = nb.TwoTasks(
        (padded.train, svhn.train), (padded.test, svhn.test), (nb.BASELINE,) * 2, "mixed"
    )
    selected = replace(baseline, train=(mnist.train, svhn.train), test=(mnist.test, svhn.test))
    given = {"mnist": mnist, "svhn": svhn, "tasks": tasks, "SMALL_SEEDS": [0, 1]}
    given |= {"baseline_setting": baseline, "selected_setting": selected}
    given["small_recipes"] = (nb.STRONG, nb.HOUSE_NUMBERS)
    names = run_cell(nb, 'title="1 (d)"', **given)
    setting_of = {
        "baseline": baseline,
        "per domain": baseline,
        "chosen recipes": selected,
        "selected": selected,
    }

    def drawn(kind, seed):
        return [rows(nb.balanced_subset(part, 50, seed)) for part in setting_of[kind].train]

    for (kind, name, seed), task in handed.items():
        assert task.args[-1].seed == seed
        if name == "two heads":
            assert [rows(part) for part in task.args[0].train] == drawn(kind, seed)

    judged = []  # (kind, seed, whether recomputed)

    def recompute_averages(models, train):
        kind, _, seed = models["two heads"]
        assert [rows(part) for part in train] == drawn(kind, seed)
        return {"two heads": (kind, "recomputed", seed)}

    def small_accuracies(models, tests):
        kind, name, seed = models["two heads"]
        assert tests is setting_of[kind].test
        judged.append((kind, seed, name == "recomputed"))
        return {"single task": [0, 0], "two heads": [0, 0]}

    given |= {"SMALL_SETTINGS": names["SMALL_SETTINGS"], "small_chosen": {}}
    given |= {"small": {key: (key, []) for key in handed}, "small_validation": {}}
    given |= {"recompute_averages": recompute_averages, "small_accuracies": small_accuracies}
    run_cell(nb, "# @title Results of (d)", **given)
    expected = [(kind, seed, False) for kind in setting_of for seed in (0, 1)]
    expected += [("per domain", 0, True), ("per domain", 1, True)]
    assert sorted(judged) == sorted(expected)


def test_the_curve_over_sizes_is_of_each_size_and_test_set(nb, tables):
    curve = {}
    for size in (10, 20):
        for seed in (0, 1):
            wrong = size + seed
            curve[size, "handwritten", seed] = Guess(wrong), []
            curve[size, "street", seed] = Guess(wrong + 5), []
            curve[size, "two heads", seed] = Pair(wrong + 10, wrong + 15), []
    setting = nb.TwoTasks(None, (marked(100), marked(50)), None, "per domain")
    given = {"curve": curve, "CURVE_SIZES": [10, 20], "CURVE_SEEDS": [0, 1], "CURVE_STEPS": 1}
    given |= {"selected_setting": setting, "tasks": dict.fromkeys(CHOSEN, DIGITS)}
    results = run_cell(nb, "# @title Figure: accuracy against", **given)["results"]
    curves = results["samples_curve"]
    assert np.allclose(curves["single_task"]["handwritten"], [[90, 89], [80, 79]])
    assert np.allclose(curves["single_task"]["street"], [[70, 68], [50, 48]])
    assert np.allclose(curves["multi_task"]["handwritten"], [[80, 79], [70, 69]])
    assert np.allclose(curves["multi_task"]["street"], [[50, 48], [30, 28]])


def test_positives_and_negatives_are_told_apart_by_their_labels(nb, tables, monkeypatch):
    drawn = []

    def hist(axis, values, *_, label, **__):
        drawn.append((label, values))
        axis.plot([], label=label)

    monkeypatch.setattr(plt.Axes, "hist", hist)
    labels = torch.arange(20) % 10
    points = nb.LabeledVectors(F.one_hot(labels, 10).float(), labels)
    opposite = nb.LabeledVectors(-points.vectors, labels)
    stages = {
        "untrained": {"mnist test": points, "svhn pool": opposite},
        "trained": {"mnist test": points, "svhn pool": points},
    }
    given = {"stages": stages, "results": {"joint_embedding": {}}, "mnist": DIGITS, "svhn": DIGITS}
    names = run_cell(nb, "# @title Figure: distances", **given)
    assert names["negative_nearer"] == pytest.approx({"untrained": 100, "trained": 0})
    assert [label for label, _ in drawn] == ["positives", "negatives"] * 2
    assert drawn[2][1].max() < 0.1 < drawn[3][1].min()


def test_no_digit_is_its_own_neighbor_in_the_share_of_the_other_set(nb, tables):
    """Two sets of 11 points: each is nearer to all of the other set than to any of its own."""
    gram = torch.eye(22)
    gram[:11, 11:] = gram[11:, :11] = 1 / 12
    z = torch.linalg.cholesky(gram)
    data = utils.DigitData("MNIST", noise_split(11), noise_split(11), real=True)
    labels = {"mnist test": data.test.labels, "svhn test": (data.test.labels + 3) % 10}
    points, apart = {}, {}
    mapped = []
    for name, vectors in (("mnist test", z[:11]), ("svhn test", z[11:])):
        points[name] = nb.LabeledVectors(vectors, labels[name])
        apart[name] = nb.LabeledVectors(torch.zeros(11, 22) + (name == "svhn test"), labels[name])

    class FirstTwo:
        def __init__(self, **_):
            pass

        def fit_transform(self, points):
            mapped.append(points)
            return points[:, :2]

    given = {"points": points, "points_untrained": apart, "mnist": data, "svhn": data}
    given |= {"TSNE": FirstTwo, "results": {"joint_embedding": {}}}
    names = run_cell(nb, "# @title Figure: the joint space", **given)
    untrained, trained = mapped
    assert set(untrained.flatten()) == {0, 1}
    assert np.allclose(trained, z)
    share = names["neighbors_of_other_set"]
    assert share == {"untrained": pytest.approx(0), "trained": pytest.approx(100)}

    axis = plt.figure().subplots()
    names["draw_map"](axis, points, "")
    disks, numerals = axis.collections[:10], axis.collections[10:]
    for digit, disk in enumerate(disks):  # one collection for each digit of SVHN
        own = z[11:, :2][labels["svhn test"] == digit]
        assert_close(torch.tensor(disk.get_offsets().data, dtype=torch.float32), own)
    places = [numeral.get_offsets().data[0] for numeral in numerals]  # one for each of MNIST
    assert np.allclose(places, z[:11, :2])
    plt.close(axis.figure)


def test_errors_of_a_digit_are_those_of_its_label(nb, tables):
    labels = torch.tensor([0, 0, 0, 0, *range(1, 10)])
    split = utils.Split(torch.zeros(13, 3, 2, 2, dtype=torch.uint8), labels)
    svhn = utils.DigitData("SVHN", split, split, real=True)
    guess = labels.clone()
    guess[0] = 1
    given = {"single_guess": {("street", "selected", 0): guess}, "results": {"multi_task": {}}}
    given["multi_guess"] = {("street", "selected", 0): labels}
    names = run_cell(nb, "# @title Figure: errors of each digit", svhn=svhn, **given)
    errors = names["results"]["multi_task"]["digit_errors"]
    assert errors == {"single": [25.0] + [0.0] * 9, "multi": [0.0] * 10}


def test_the_variant_with_the_best_mean_is_chosen_and_of_its_seeds_the_best(nb):
    top1 = {"suggested": [99.9, 10.0], "one-cycle": [98.0, 98.2], "semi-hard": [97.0, 98.1]}
    embeddings, top1_of = {}, {}
    for name, values in top1.items():
        for seed, value in zip((3, 4), values, strict=True):
            model = f"model of {name}, {seed}"
            embeddings[name, seed] = model, [{"train_active": 10.0 * seed}]
            top1_of[model] = value
    given = {"VARIANTS": top1, "embeddings": embeddings, "SEEDS": [3, 4], "held_mnist": None}
    given["embedding_data"] = nb.EmbeddingData(None, None, None)
    given["validation_top1"] = lambda model, data: top1_of[model]
    names = run_cell(nb, "# @title Choosing the variant", **given)
    assert names["best_model"] == "model of one-cycle, 4"
    assert (names["best_variant"], names["best_seed"]) == ("one-cycle", 4)
    assert names["val_top1"] == top1
    assert names["active_at_end"] == dict.fromkeys(top1, 30.0)  # of the first seed, 3


def test_the_reverse_way_asks_with_svhn_images(nb):
    body = ast.parse(source_of("# @title Scores")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]

    def top1_of_draws(queries, pool):
        return {"100": [queries, pool], "all": [queries, pool]}

    names = vars(nb) | {"top1_of_draws": top1_of_draws}
    exec(ast.unparse(ast.Module(functions, [])), names)
    sets = [f"{name} {part}" for name in ("mnist", "svhn") for part in ("test", "pool")]
    assert names["score"]({name: name for name in sets}) == {
        "100": ["mnist test", "svhn pool"],
        "all": ["mnist test", "svhn pool"],
        "reverse": ["svhn test", "mnist pool"],
    }


def test_the_figures_show_the_chosen_model_and_the_table_all_of_its_seeds(nb):
    body = ast.parse(source_of("# @title Scores")).body
    statements = [node for node in body if not isinstance(node, ast.FunctionDef)]
    models = {("suggested", 3): "s3", ("suggested", 4): "s4", ("refined", 3): "r3"}
    models["refined", 4] = "r4"
    names = vars(nb) | {
        "fit_mnist": noise_split(10_000),
        "embeddings": {key: (model, []) for key, model in models.items()},
        "SEEDS": [3, 4],
        "best_variant": "refined",
        "best_seed": 4,
        "best_model": "r4",
        "untrained": "u",
        "embed": lambda model: f"points of {model}",
        "score": lambda points: {"100": [1.0, 2.0], "of": points},
    }
    exec(ast.unparse(ast.Module(statements, [])), names)
    assert names["points"] == "points of r4"
    assert names["points_untrained"] == "points of u"
    assert names["suggested_scores"]["of"] == "points of s3"
    assert names["untrained_scores"]["of"] == "points of u"
    shown = {seed: scores["of"] for seed, scores in names["scores_of_seed"].items()}
    assert shown == {3: "points of r3", 4: "points of r4"}
    assert names["best_scores"]["of"] == "points of r4"


def test_wrong_neighbors_are_judged_by_the_labels_of_the_gallery(nb):
    z = torch.randn(2_500, 4, generator=seeded(0))
    queries = torch.randn(40, 4, generator=seeded(1))
    pool = noise_split(2_500, 32, 3)
    asked = nb.LabeledVectors(queries, DIGITS.test.labels)
    points = {"svhn pool": nb.LabeledVectors(z, pool.labels), "mnist test": asked}
    given = {"points": points, "street_pool": pool, "mnist": DIGITS}
    names = run_cell(nb, "# @title Choosing the queries of the figure", **given)
    _, gallery = nb.draw_indices(0, len(DIGITS.test), 2_500)
    hits = nb.top1_hits(asked, nb.LabeledVectors(z[gallery], pool.labels[gallery]))
    assert names["wrong_queries"].tolist() == (~hits).nonzero().flatten().tolist()


def test_one_class_is_shown_by_slerp_and_by_lerp(nb):
    classes = ["MNIST 4", "MNIST 5", "MNIST 9", "SVHN 3", "SVHN 5", "SVHN 6"]
    gan = replace(DRAWS, name="biggan-digits-32", classes=classes)
    names = run_cell(nb, "# @title The strips", gan=gan)
    start, end = nb.truncated_noise(2, 3, names["TRUNCATION"], names["ONE_SEED"])
    for method in (nb.slerp, nb.lerp):
        label = f"{names['ONE_CLASS']}, {method.__name__}: seed 12, truncation 0.8"
        strip = names["one_class"][label][:, :, 0, 0]
        assert_close(strip, names["TRUNCATION"] * nb.interpolate(start, end, method))
    for pair, seed in names["TWO_CLASSES"].items():
        strip = names["two_classes"][f"{' to '.join(pair)}: seed {seed}, truncation 0.8"]
        z, _ = nb.interpolate_classes(gan, pair, 0.8, seed)
        assert_close(strip[:, :, 0, 0], 0.8 * z)


def names_of(code, *operations):
    """The names that these byte codes read or write."""
    found = dis.get_instructions(code)
    return {instruction.argval for instruction in found if instruction.opname in operations}


def assigned_and_needed(source):
    """The names that a cell assigns at its top level, and those that it takes from other cells."""
    code = compile(source, "cell", "exec")
    assigned = names_of(code, "STORE_NAME")
    used = set()
    for part in utils.code_within(code):
        used |= names_of(part, "LOAD_NAME", "LOAD_GLOBAL")
    return assigned, used - assigned


def test_any_cell_can_be_run_again_as_what_it_needs_is_assigned_in_one_place():
    places = {}  # name -> the cells that assign it
    needs = []
    for number, source in enumerate(sources()):
        assigned, needed = assigned_and_needed(source)
        needs.append((number, needed))
        for name in assigned:
            places.setdefault(name, []).append(number)
    for number, needed in needs:
        for name in needed - {"claims", "results"}:  # which all cells add to
            assert len(places.get(name, [])) <= 1, (name, "needed in", number, places[name])


def test_the_check_finds_in_how_many_steps_the_distance_doubles(nb):
    names = run_cell(nb, "# @title A check of matrix and closed form")
    for alpha, steps in names["results"]["dynamics"]["doubling_steps"].items():
        assert math.hypot(1, float(alpha)) ** steps == pytest.approx(2)
