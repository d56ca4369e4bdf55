"""Why two heads stay behind on MNIST in 1 (d): a check of batch norm's running averages.

    .venv/bin/python -m offline.training.check_running_averages

Trains the models of the settings *baseline* and *per domain* again, with 500 samples of each data
set, and tests them twice: as they are, and with running averages that are taken anew from training
images. The weights are the same. Needs real MNIST and SVHN, and a minute. The discussion of 1 (d)
in the notebook tells the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import utils
from offline.training.common import definitions

SIZE = 500
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 20
BATCH = 64
DRAWS = 10  # batches that the new averages are taken from


@torch.no_grad()
def take_averages_anew(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Replace the running averages of every batch norm by means over batches of training images.

    images: what the model is called with, floats of one or both data sets, as many of each. The
    weights stay as they are; `model` is left in eval mode.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean of all batches, not a moving average
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        index = torch.randperm(len(images[0]), generator=generator)[:BATCH]
        model(*(part[index] for part in images))
    model.eval()


def two_heads(
    train: tuple[utils.Split, utils.Split],
    test: tuple[utils.Split, utils.Split],
    batch_norm: str,
    plan: utils.Plan,
) -> list[float]:
    """Test accuracies on (MNIST, SVHN) as trained, then with averages taken anew: four numbers."""
    recipe = replace(definitions.BASELINE, batch_size=BATCH)
    setting = definitions.TwoTasks(train, None, (recipe, recipe), batch_norm)
    model, _ = definitions.train_multi(setting, plan)
    before = definitions.task_accuracies(model, test)
    take_averages_anew(model, [utils.to_float(split.images) for split in train])
    return before + definitions.task_accuracies(model, test)


def single_task(train: utils.Split, test: utils.Split, plan: utils.Plan) -> list[float]:
    """Test accuracies of a single-task model as trained, then with averages taken anew."""
    recipe = replace(definitions.BASELINE, batch_size=BATCH)
    model, _ = definitions.train_single(train, None, recipe, plan)
    before = definitions.accuracy(utils.predict(model, test), test.labels)
    take_averages_anew(model, [utils.to_float(train.images)])
    after = definitions.accuracy(utils.predict(model, test), test.labels)
    return [before, after]


def main() -> None:
    """Print the test accuracies of every kind of model: their means over the seeds."""
    torch.set_num_threads(1)  # as in the notebook, so that the trainings are the same
    sets = (
        utils.load_mnist().map(definitions.pad_to),
        utils.load_svhn().map(definitions.gray),
    )
    test = (sets[0].test, sets[1].test)
    found = {}  # kind of model -> numbers of each seed
    for seed in SEEDS:
        train = tuple(definitions.balanced_subset(data.train, SIZE, seed) for data in sets)
        plan = utils.Plan("averages", EPOCHS, math.ceil(SIZE / BATCH), seed=seed)
        for batch_norm in ("mixed", "per domain"):
            numbers = two_heads(train, test, batch_norm, plan)
            found.setdefault(f"two heads, {batch_norm}", []).append(numbers)
        numbers = single_task(train[0], test[0], plan)
        found.setdefault("MNIST alone", []).append(numbers)
    for kind, rows in found.items():
        print(f"{kind}: {np.mean(rows, axis=0).round(2).tolist()}, by seed {np.round(rows, 1)}")


if __name__ == "__main__":
    main()
