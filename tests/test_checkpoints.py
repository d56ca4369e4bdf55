"""Checkpoints never lie: what decides a training's numbers trains again, what does not, does not.

The code of a student is changed in many ways. That a kernel and its workers agree is tested in
test_parallel.py.
"""

import cmath
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import partial, update_wrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from small_training import checkpoints, make_model, train, watch

import utils

STUDENT = """
from dataclasses import dataclass, field
from functools import partial
import torch
from torch import nn
from torch.nn.functional import normalize
import utils

SHIFT = 0.5
EXPONENT = 2
SCALES = {"images": [1.0, 2.0]}

@dataclass(frozen=True)
class Recipe:
    smoothing: float = 0.1

@dataclass
class Options:
    steps: list = field(default_factory=lambda: [1, 2])

class Net(nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.0))
        self.scale = scale

    def forward(self, x):
        return self.scale * self.layers(x)

class Bounds(tuple):
    def width(self):
        return self[1] - self[0]

BOUNDS = Bounds((0.0, 1.0))

class Source:
    def __getitem__(self, number):
        return number

    def draw(self, images):
        return images + 0

class Loader(Source):
    def __init__(self, images, augment):
        self.images, self.augment = images, augment

    @torch.no_grad()
    def epoch(self, number, steps):
        for step in range(steps):
            yield self.augment(self.images, utils.random_stream(0, number))

def times(factor):
    def scale(x):
        return factor * x

    return scale

scale = times(3.0)
first, second = lambda x: x + 1, lambda x: x + 2
chosen = first

def add_noise(images, generator):
    images = images * BOUNDS.width()
    return images + SHIFT * scale(torch.randn(images.shape, generator=generator))

def power(x, exponent=EXPONENT):
    return chosen(normalize(x)) ** exponent * Options().steps[-1]

def loss_fn(model, batch, smoothing):
    return power(model(batch)).mean() * SCALES["images"][1] + smoothing, {}

def train_epoch(training, batches, loss_fn):
    for batch in batches:
        loss_fn(training.model, batch)[0].backward()

def parts():
    torch.manual_seed(0)
    loader = Loader(torch.arange(12.0).view(3, 4), add_noise)
    loss = partial(loss_fn, smoothing=Recipe().smoothing)
    return train_epoch, Net(), partial(loader.epoch, steps=2), loss
"""


def student_key(text, file="student.py"):
    """The fingerprint of a student's training, whose functions are in __main__ as a notebook's."""
    names = {"__name__": "__main__"}
    exec(compile(text, file, "exec"), names)
    return utils.fingerprint(*names["parts"]())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ smoothing, {}", "- smoothing, {}"),  # the loss
        ("backward()", "backward(); print()"),  # the loop
        ("self.scale * self.layers", "-self.scale * self.layers"),  # the model's forward
        ("scale=2.0", "scale=3.0"),  # an attribute of the model
        ("nn.Dropout(0.0)", "nn.Dropout(0.1)"),  # a layer's setting
        ("nn.Dropout(0.0)", "nn.Identity()"),  # a layer without weights
        ("images + SHIFT", "images - SHIFT"),  # the augmentation
        ("SHIFT = 0.5", "SHIFT = 0.25"),  # a constant that it uses
        ("[1.0, 2.0]", "[1.0, 2.5]"),  # a constant within a dict
        ("** exponent *", "/ exponent *"),  # a function that a called one calls
        ("EXPONENT = 2", "EXPONENT = 3"),  # the value of a default
        ("times(3.0)", "times(4.0)"),  # a value that a function encloses
        ("chosen = first", "chosen = second"),  # another lambda of the same line
        ("return images + 0", "return images - 0"),  # an inherited method
        ("self[1] - self[0]", "self[0] - self[1]"),  # a method of a tuple's own class
        ("return number", "return -number"),  # a special method
        ("[1, 2]", "[1, 3]"),  # what makes a default value
        ("torch.nn.functional import", "torchvision.transforms.functional import"),  # a namesake
        ("smoothing: float = 0.1", "smoothing: float = 0.2"),  # a recipe
        ("    @torch.no_grad()\n", ""),  # a decorator
        ("arange(12.0)", "arange(12.0).flip(0)"),  # the data
        ("utils.random_stream(0,", "utils.random_stream(1,"),  # the loader
        ("partial(loader.epoch, steps=2)", "lambda n: loader.epoch(n, 2)"),  # a lambda instead
    ],
)
def test_a_change_of_what_decides_the_numbers_changes_the_key(old, new):
    assert STUDENT.count(old) == 1
    assert student_key(STUDENT.replace(old, new)) != student_key(STUDENT)


def test_another_folder_process_comment_or_unused_function_does_not_change_the_key():
    key = student_key(STUDENT)
    unused = "\n\ndef unused(x):\n    return x\n" + STUDENT.replace("+ 0", "+ 0  # a comment")
    assert student_key(unused, file="a folder, été/student.py") == key
    script = STUDENT + "\nprint(utils.fingerprint(*parts()))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, env=environment, text=True).strip() == key


class Named:
    """What a collection holds beside its items."""

    def __init__(self, items, name):
        super().__init__(items)
        self.name = name


class NamedList(Named, list):
    pass


class NamedSet(Named, set):
    pass


def values_of_all_kinds():
    recursive = [1]
    recursive.append(recursive)
    zeros = torch.zeros(2)
    return [
        *[None, True, 1, -1, 1.0, 0.1, 1j, "1", b"1", torch.float32, torch.float16],
        *[(1, 2), [1, 2], {1, 2}, {1: 2}, {"a": 1}, {"a": 2}, {"b": 1}, [[1], 2], [1, [2]]],
        *[range(3), slice(1, 3), recursive, partial(max, 1), partial(max, 2), partial(min, 1)],
        *[zeros, zeros.view(2, 1), zeros.double(), zeros.bfloat16(), zeros + 1, torch.tensor(1)],
        *[torch.zeros(2, requires_grad=True), np.zeros(2), np.ones(2), np.float32(0)],
        *[np.float64(0.1), len, int, float, torch.relu, torch.tanh, "a".join, "b".join],
        *[math.exp, cmath.exp, np.sin, np.tanh, re.compile("a"), re.compile("b"), os, np, utils],
        *[lambda x: x, lambda *x: x, lambda *, x: x, lambda x, /: x],
        *[np.random.default_rng(1), np.random.default_rng(2)],
        *[defaultdict(int), defaultdict(list), NamedList([1], "one"), NamedList([1], "two")],
        *[NamedSet({1}, "one"), NamedSet({1}, "two"), NamedSet({2}, "two")],
        *[update_wrapper(partial(math.pow, base), math.sqrt) for base in (2, 3)],
        *[np.array([[number], None], dtype=object) for number in (1000, 1001)],
    ]


def test_values_of_all_kinds_have_keys_of_their_own_and_equal_ones_the_same():
    keys = [utils.fingerprint(value) for value in values_of_all_kinds()]
    assert len(set(keys)) == len(keys)
    assert keys == [utils.fingerprint(value) for value in values_of_all_kinds()]


def test_the_order_of_a_dict_counts_that_of_a_set_and_the_memory_layout_do_not():
    key = utils.fingerprint
    assert key({"a": 1, "b": 2}) != key({"b": 2, "a": 1})
    assert key({"x", "yy", "z"}) == key({"z", "x", "yy"})
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)  # their hashes collide
    assert key(one) == key(other)
    assert key(NamedSet([0, 8], "a")) == key(NamedSet([8, 0], "a"))
    images = torch.arange(24.0).view(1, 2, 3, 4)
    assert key(images) == key(images.contiguous(memory_format=torch.channels_last))


def test_models_differ_by_weights_statistics_frozen_layers_and_mode():
    frozen, other, used = make_model(), make_model(), make_model()
    frozen[0].requires_grad_(False)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    used[1].running_mean += 1
    models = [make_model(), make_model(dropout=0.1), frozen, other, used, make_model().eval()]
    assert len(set(map(utils.fingerprint, models))) == len(models)
    assert utils.fingerprint(make_model()) == utils.fingerprint(models[0])


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-2},
        {"seed": 1},
        {"evaluate": lambda model: {}},
        {"model": make_model(dropout=0.1)},
        {"loss": lambda model, batch: (model(batch[0]).square().mean(), {})},
        {"batches": lambda epoch: [(torch.zeros(4, 8), torch.zeros(4).long())]},
        {"loop": lambda training, batches, loss_fn: {"loss": 123.0}},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_a_change_of_any_argument_trains_again(change):
    train(epochs=2)
    watch.reset()
    train(epochs=2)
    assert watch.epochs == []
    train(**{"epochs": 2} | change)
    assert len(checkpoints()) == 2


def test_the_precision_that_is_asked_for_counts(monkeypatch):
    train(epochs=1)
    monkeypatch.setenv("A3_PRECISION", "bf16")
    train(epochs=1)
    assert len(checkpoints()) == 2


def test_another_text_of_utils_counts_and_trains_again(monkeypatch):
    def batches(epoch):
        return utils.to_float(epoch)

    train(epochs=1)
    key = utils.fingerprint(batches)
    assert utils.file_content(utils) == Path(utils.__file__).read_bytes()
    monkeypatch.setattr(utils, "file_content", lambda module: b"another text")
    assert utils.fingerprint(batches) != key
    train(epochs=1)
    assert len(checkpoints()) == 2
