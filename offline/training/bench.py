"""Time to an accuracy: the starter's way against ours, same network, same test images, both cores.

    make bench                about two minutes: a part of the data; long times are extrapolated
    make bench FULL=--full    the whole comparison, nothing extrapolated

The starter's way: a torchvision data set, transforms image by image, a DataLoader, fp32, 20 epochs
of Adam at 1e-3. It gives an accuracy and a time. Ours: `train_single` of the notebook with one of
its recipes and the fewest epochs whose final test accuracy passes that; the median of three seeds.
Both use two threads in one process. Images a second on one thread are the second figure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn

import utils
from tools.notebook import load_definitions

notebook = load_definitions()

CPU = torch.device("cpu")
BATCH, EPOCHS = 128, 20
SEEDS = range(3)
PLAIN = "baseline"  # the recipe with the starter's settings
STEPS_TIMED = 30  # for the images a second


class ImageDataset(torch.utils.data.Dataset):
    """What torchvision.datasets.MNIST and SVHN do for an index: array, PIL image, transforms."""

    def __init__(self, split: utils.Split) -> None:
        from torchvision import transforms

        steps = [transforms.Grayscale()] if split.images.shape[1] == 3 else []
        steps += [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        self.transform = transforms.Compose(steps)
        self.arrays = split.images.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), int(self.labels[index])


def starter_training(train: utils.Split, epochs: int) -> tuple[nn.Module, float]:
    """The starter's training: the model, and the seconds it took."""
    torch.manual_seed(0)
    model = nn.Sequential(notebook.base_trunk(), notebook.task_head())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(ImageDataset(train), batch_size=BATCH, shuffle=True)
    started = time.perf_counter()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval(), time.perf_counter() - started


def our_training(
    train: utils.Split, recipe: str, epochs: int, seed: int
) -> tuple[nn.Module, float]:
    """Our training, from an empty runs folder: the model, and the seconds of all of it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["A3_RUNS"] = folder
        started = time.perf_counter()
        steps = len(train) // BATCH
        plan = utils.Plan("bench", epochs, steps, seed)
        model, _ = notebook.train_single(train, None, notebook.RECIPES[recipe], plan)
        return model, time.perf_counter() - started


def images_a_second(data: utils.DigitData, recipe: str) -> list[float]:
    """Training images a second on one thread: the starter's way, its recipe in ours, our recipe."""
    torch.set_num_threads(1)
    color = data.train.first(STEPS_TIMED * BATCH)
    gray = notebook.gray(color)
    trainings = [
        lambda: starter_training(color, 1),
        lambda: our_training(gray, PLAIN, 1, seed=0),
        lambda: our_training(gray, recipe, 1, seed=0),
    ]
    rates = []
    for training in trainings:
        seconds = min(training()[1] for _ in range(2))
        rates.append(len(color) / seconds)
    return rates


def starter_result(data: utils.DigitData, train: utils.Split, full: bool) -> tuple[float, float]:
    """Test accuracy of the starter's way, in percent, and its seconds; both are printed.

    The quick form measures one epoch on less of the data, and takes the accuracy from the same
    steps of plain Adam without the starter's slow loading.
    """
    test = notebook.gray(data.test)
    if full:
        model, seconds = starter_training(train, EPOCHS)
        origin = "measured"
    else:
        timed = train.first(1_500)
        _, one_epoch = starter_training(timed, 1)
        seconds = one_epoch * len(train) / len(timed) * EPOCHS
        model, _ = our_training(notebook.gray(train), PLAIN, EPOCHS, seed=0)
        origin = f"extrapolated from one epoch of {len(timed):,}"
    goal = utils.percent_right(model, test, CPU)
    print(
        f"  starter's way, {EPOCHS} epochs of {len(train):,} images: {goal:.2f} % "
        f"in {seconds:.0f} s ({origin})"
    )
    return goal, seconds


def compare(data: utils.DigitData, recipe: str, full: bool, threads: int) -> None:
    """Print time and accuracy of both ways on one data set."""
    starter, plain, ours = images_a_second(data, recipe)
    print(
        f"\n{data.name}, training images a second on one thread: starter {starter:,.0f}, ours "
        f"{plain:,.0f} with the recipe {PLAIN!r} ({plain / starter:.1f} times) and {ours:,.0f} "
        f"with {recipe!r} ({ours / starter:.1f} times)"
    )
    torch.set_num_threads(threads)
    train = data.train if full else data.train.first(6_000)
    goal, seconds = starter_result(data, train, full)
    train_gray, test_gray = notebook.gray(train), notebook.gray(data.test)
    for epochs in range(1, EPOCHS + 1):
        runs = [our_training(train_gray, recipe, epochs, seed) for seed in SEEDS]
        reached = [utils.percent_right(model, test_gray, CPU) for model, _ in runs]
        middle = statistics.median(taken for _, taken in runs)
        shown = ", ".join(f"{value:.2f}" for value in reached)
        print(f"  ours, {recipe!r}, {epochs} epochs: {shown} % in {middle:.1f} s", flush=True)
        if statistics.median(reached) > goal:
            print(
                f"  => {seconds / middle:.0f} times less time to the starter's accuracy: "
                f"{middle:.1f} s, not {seconds:.0f} s; {threads} threads, "
                f"median of {len(SEEDS)} seeds"
            )
            return
    print(f"  => ours did not pass the starter's accuracy within {EPOCHS} epochs")


def main() -> None:
    """Compare on MNIST and on SVHN, each where it is at hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole comparison")
    parser.add_argument("--recipe", default="augmented", help="recipe of ours")
    parser.add_argument("--threads", type=int, default=min(2, utils.available_cores()))
    arguments = parser.parse_args()
    print(f"{utils.machine()}; {arguments.threads} threads; ours runs in {utils.precision(CPU)}")
    for load in (utils.load_mnist, utils.load_svhn):
        data = load()
        if data.real:
            compare(data, arguments.recipe, arguments.full, arguments.threads)
        else:
            print(f"\nOnly {data.name} is at hand.")


if __name__ == "__main__":
    main()
