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


def accuracies_of_two_heads(
    model: nn.Module, setting: definitions.TwoTasks, test: tuple[utils.Split, utils.Split]
) -> list[float]:
    """Test accuracies on (MNIST, SVHN) as trained, then with averages taken anew: four numbers."""
    before = definitions.task_accuracies(model, test)
    take_averages_anew(model, [utils.to_float(split.images) for split in setting.train])
    return before + definitions.task_accuracies(model, test)


def accuracies_of_one_task(model: nn.Module, train: utils.Split, test: utils.Split) -> list[float]:
    """Test accuracies of a single-task model as trained, then with averages taken anew."""
    before = definitions.accuracy(utils.predict(model, test), test.labels)
    take_averages_anew(model, [utils.to_float(train.images)])
    after = definitions.accuracy(utils.predict(model, test), test.labels)
    return [before, after]


def main() -> None:
    """Print the test accuracies of every kind of model: their means over the seeds."""
    torch.set_num_threads(1)  # as in the notebook, so that the trainings are the same
    mnist = utils.load_mnist().map(definitions.pad_to)
    svhn = utils.load_svhn().map(definitions.gray)
    test = (mnist.test, svhn.test)
    recipe = replace(definitions.BASELINE, batch_size=BATCH)
    found = {}  # kind of model -> numbers of each seed
    for seed in SEEDS:
        plan = utils.Plan("averages", EPOCHS, math.ceil(SIZE / BATCH), seed=seed)
        for batch_norm in ("mixed", "per domain"):
            whole = definitions.TwoTasks(
                (mnist.train, svhn.train), None, (recipe, recipe), batch_norm
            )
            setting = definitions.few_samples(whole, SIZE, seed, watched=False)
            trainings = definitions.three_trainings(setting, plan, (mnist.name, svhn.name))
            model, _ = trainings["two heads"]()
            numbers = accuracies_of_two_heads(model, setting, test)
            found.setdefault(f"two heads, {batch_norm}", []).append(numbers)
        model, _ = trainings["handwritten"]()  # one domain: the same in both settings
        numbers = accuracies_of_one_task(model, setting.train[0], mnist.test)
        found.setdefault(f"{mnist.name} alone", []).append(numbers)
    for kind, rows in found.items():
        print(f"{kind}: {np.mean(rows, axis=0).round(2).tolist()}, by seed {np.round(rows, 1)}")


if __name__ == "__main__":
    main()
