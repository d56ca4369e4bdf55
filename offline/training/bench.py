"""Time to an accuracy: the starter's way against a short recipe for the same network.

    make bench                          minutes: the starter's time is a stored or extrapolated one
    make bench ARGS=--full              trains the starter's 20 epochs with three seeds: 90 minutes
    make bench ARGS="--full --data SVHN"    the same for one data set

The starter's way: a torchvision data set, transforms image by image, a DataLoader, fp32, tensors in
PyTorch's default memory format, 20 epochs of Adam at 1e-3. It gives a time and an accuracy. Ours:
the whole set as one tensor of bytes, small images, channels_last, pooling before the ReLU, and a
short training with Muon, which on SVHN shows easy images less often. Both train the same network
on the same images, with the same number of threads in one process; the time starts when the images
lie in memory as arrays. Each has three seeds, of which the median counts.

The results go into bench.json beside this file: a list of records, one for each machine (processor,
number of cores, GPU and version of torch), arithmetic and number of threads. A run replaces the
record with the same conditions, or adds one at the end. A starter that was measured stays until
--full measures it again, or a run with other test images replaces it. The README's table shows the
records whose processor and machine are those of the first record.

The short recipes were chosen on validation images (10,000 of the training images, held out). Only
their length is found with the test images: the first one in SHORT_EPOCHS after which the test
accuracy is above the starter's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from offline.training.common import CPU, definitions
from tools.notebook import ROOT, fill_readme, markdown_table

RESULTS = Path(__file__).with_name("bench.json")
STARTER_BATCH, STARTER_EPOCHS = 128, 20
SEEDS = (0, 1, 2)  # of both
# Of ours: the lengths that are tried; half an epoch sees half of the training images.
SHORT_EPOCHS = (0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5, 1.75, 2.0, 2.5, 3.0)
BENCH_START = "<!-- bench: made by `make bench` -->"
BENCH_END = "<!-- end of bench -->"
TIMED_IMAGES = 6_000  # of the starter's epoch, where its time is extrapolated


class Conditions(NamedTuple):
    """What the seconds depend on. A record of bench.json has these fields, and "data"."""

    processor: str
    machine: str  # number and kind of cores, GPU, version of torch
    arithmetic: str
    threads: int


@dataclass(frozen=True)
class ShortRecipe:
    """What may be chosen in a training of few epochs."""

    side: int = 22  # images are resampled to side x side, mean 0 and deviation 1
    grow: bool = False  # the first 30 % have images 6 pixels smaller
    warp: tuple[float, float, float, float] | None = None  # degrees, shift, zoom, shear
    batch_size: int = 128
    muon_lr: float = 0.05  # peak, of the convolutions behind the first
    momentum: float = 0.6
    lr: float = 2e-2  # peak of AdamW, for all other weights
    weight_decay: float = 0.05
    smoothing: float = 0.1
    hard_share: float = 0.0  # see `with_hard_images`; from the second epoch on


SHORT_RECIPES = {
    "MNIST": ShortRecipe(),
    "SVHN": ShortRecipe(
        side=24,
        grow=True,
        warp=(5, 0.05, 0.05, 0.05),
        muon_lr=0.06,
        momentum=0.7,
        lr=3e-2,
        hard_share=0.5,
    ),
}


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

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), int(self.labels[index])


def starter_training(train: utils.Split, epochs: int, seed: int) -> nn.Module:
    """The model that the starter's way gives."""
    torch.manual_seed(seed)
    model = nn.Sequential(definitions.base_trunk(), definitions.task_head())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(
        ImageDataset(train), batch_size=STARTER_BATCH, shuffle=True
    )
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024), for convolution weights.

    A step changes all directions of a layer alike, so that few steps go far.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.momentum = momentum
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients that are there."""
        for group in self.param_groups:
            lr = group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["velocity"] = torch.zeros_like(weight)
                state["velocity"].mul_(self.momentum).add_(weight.grad)
                ahead = weight.grad + self.momentum * state["velocity"]  # Nesterov
                weight.mul_(1 - lr * self.weight_decay)
                weight.sub_(lr * orthogonal(ahead))


def orthogonal(gradient: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows, about; one row for each output channel.

    By three Newton-Schulz steps with the coefficients of Jordan et al. 2024, which bring the larger
    singular values near one, in bf16 where the processor is fast at it. There are no more rows than
    columns in this network.
    """
    matrix = gradient.flatten(1)
    matrix = (matrix / (matrix.norm() + 1e-7)).to(utils.forward_dtype(CPU))
    for _ in range(3):
        square = matrix @ matrix.T
        polynomial = 2.0315 * (square @ square) - 4.7750 * square
        matrix = 3.4445 * matrix + polynomial @ matrix
    return matrix.to(gradient.dtype).view_as(gradient)


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of its peak: up for 30 % of the steps, then down."""
    progress = (step + 0.5) / steps
    if progress < 0.3:
        return max(0.04, progress / 0.3)
    return (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2


def optimizers(model: nn.Module, recipe: ShortRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions behind the first, AdamW for the rest."""
    # More than one input channel: all convolutions but the first.
    inner = [weight for weight in model.parameters() if weight.ndim == 4 and weight.shape[1] > 1]
    chosen = {id(weight) for weight in inner}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        Muon(inner, recipe.muon_lr, recipe.momentum, recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True),
    ]


def gray_bytes(images: Tensor) -> Tensor:
    """Luma in whole numbers, N x 3 x H x W to N x 1 x H x W, uint8.

    At most one level off the notebook's `gray`, in a fraction of its time.
    """
    chunks = []
    for chunk in images.split(1024):  # what fits into the cache
        red, green, blue = chunk.numpy().transpose(1, 0, 2, 3)
        luma = np.multiply(red, 77, dtype=np.uint16)
        luma += np.multiply(green, 150, dtype=np.uint16)
        luma += np.multiply(blue, 29, dtype=np.uint16)
        luma += 128  # to round; 77 + 150 + 29 = 256
        chunks.append(torch.from_numpy((luma >> 8).astype(np.uint8)))
    return torch.cat(chunks)[:, None]


def quick_trunk() -> nn.Sequential:
    """The notebook's trunk with its pooling before its ReLU: the same numbers in less time.

    The largest of four numbers, cut at zero, is the largest of the four cut ones.
    """
    conv, norm, relu, pool, *others = definitions.base_trunk()
    return nn.Sequential(conv, norm, pool, relu, *others)


def with_hard_images(
    order: Tensor, is_hard: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """An order of images in which a share of the places, drawn at random, is given to hard images.

    order: int64, N, indices of images. is_hard: bool, one for each image of the training set.
    """
    places = torch.rand(len(order), generator=generator) < share
    hard = is_hard.nonzero().flatten()
    mixed = order.clone()
    mixed[places] = hard[definitions.random_order(len(hard), int(places.sum()), generator)]
    return mixed


def short_training(train: utils.Split, recipe: ShortRecipe, epochs: float, seed: int) -> nn.Module:
    """The model that a short recipe gives. SVHN is made gray here, so that it is timed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = gray_bytes(train.images) if train.images.shape[1] == 3 else train.images
    notebook_recipe = definitions.Recipe(side=recipe.side, warp=recipe.warp, grow=recipe.grow)
    # In training, where batches are resampled below, `preprocessing` only standardizes images; in
    # eval mode, for the test images, it resamples as well.
    model = nn.Sequential(
        definitions.preprocessing(notebook_recipe), quick_trunk(), definitions.task_head()
    ).to(memory_format=torch.channels_last)
    two_optimizers = optimizers(model, recipe)
    steps = max(1, round(epochs * len(train) / recipe.batch_size))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak(step, steps))
        for optimizer in two_optimizers
    ]
    order = definitions.random_order(len(train), steps * recipe.batch_size, generator)
    is_hard = torch.zeros(len(train), dtype=torch.bool)  # whose loss was above its batch's median
    steps_of_first_epoch = len(train) // recipe.batch_size
    for step in range(steps):
        start = step * recipe.batch_size
        if step == steps_of_first_epoch and recipe.hard_share:
            rest = order[start:]
            order[start:] = with_hard_images(rest, is_hard, recipe.hard_share, generator)
        index = order[start : start + recipe.batch_size]
        side = definitions.side_in_training(notebook_recipe, step / steps) or recipe.side
        batch = F.interpolate(images[index], (side, side), mode="bilinear", antialias=True)
        batch = definitions.augment(utils.to_float(batch), generator, notebook_recipe)
        with utils.autocast(CPU):
            logits = model(batch).float()
        losses = F.cross_entropy(
            logits, train.labels[index], label_smoothing=recipe.smoothing, reduction="none"
        )
        if recipe.hard_share and step < steps_of_first_epoch:
            is_hard[index] = losses.detach() > losses.detach().median()
        model.zero_grad()
        losses.mean().backward()
        for optimizer, schedule in zip(two_optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return model.eval()


def timed(training: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """What a training gives, and its seconds."""
    started = time.perf_counter()
    model = training()
    return model, time.perf_counter() - started


def median_of_seeds(
    training: Callable[[int], nn.Module], test: utils.Split
) -> dict[str, float | list[float]]:
    """Seconds and test accuracy (percent) of `training(seed)`: medians, and those of each seed."""
    seconds, accuracies = [], []
    for seed in SEEDS:
        model, taken = timed(partial(training, seed))
        seconds.append(taken)
        accuracies.append(utils.classifier_accuracy(model, test, CPU))
        print(f"seed {seed}: {accuracies[-1]:.2f} % in {seconds[-1]:.1f} s", flush=True)
    return {
        "seconds": statistics.median(seconds),
        "test_acc": statistics.median(accuracies),
        "seconds_per_seed": seconds,
        "test_acc_per_seed": accuracies,
    }


def train_starter(data: utils.DigitData, test: utils.Split) -> dict[str, Any]:
    """Seconds and test accuracy of the starter's way, trained to its end."""
    found = median_of_seeds(partial(starter_training, data.train, STARTER_EPOCHS), test)
    print(f"{data.name}, the starter: {found['test_acc']:.2f} % in {found['seconds']:.0f} s")
    facts = {"epochs": STARTER_EPOCHS, "test_images": len(test), "seconds_are": "measured"}
    return facts | found


def extrapolated_starter(data: utils.DigitData, known: dict[str, Any]) -> dict[str, Any]:
    """The starter's way with the accuracy that is known, and its seconds on this machine.

    The seconds are those of a part of an epoch, extrapolated.
    """
    # Not timed: the first training also pays for imports.
    starter_training(data.train.first(256), 1, seed=0)
    part = data.train.first(TIMED_IMAGES)
    _, seconds = timed(partial(starter_training, part, 1, seed=0))
    return {
        "epochs": STARTER_EPOCHS,
        "seconds": seconds * STARTER_EPOCHS * len(data.train) / len(part),
        "seconds_are": "extrapolated",
        "test_acc": known["test_acc"],
        "test_images": known["test_images"],
    }


def short_result(data: utils.DigitData, test: utils.Split, goal: float) -> dict[str, Any]:
    """The fewest epochs whose median test accuracy is above `goal`, with seconds and accuracies.

    Raises RuntimeError where no number in SHORT_EPOCHS is enough.
    """
    recipe = SHORT_RECIPES[data.name]
    # Not timed: the first training also pays for imports.
    short_training(data.train.first(2_000), recipe, 1.0, seed=0)
    for epochs in SHORT_EPOCHS:
        found = median_of_seeds(partial(short_training, data.train, recipe, epochs), test)
        print(
            f"{data.name}, {epochs} epochs: {found['test_acc']:.2f} % in {found['seconds']:.1f} s"
        )
        if found["test_acc"] > goal:
            return {"epochs": epochs, **found, "recipe": asdict(recipe)}
    raise RuntimeError(f"{data.name}: {SHORT_EPOCHS[-1]} epochs do not reach {goal:.2f} %.")


def arithmetic() -> str:
    """Number format and instructions of our trainings: 'bf16, AVX512'."""
    number_format = {torch.float32: "fp32", torch.bfloat16: "bf16"}[utils.forward_dtype(CPU)]
    return f"{number_format}, {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """The processor's name: 'AMD EPYC'."""
    facts = Path("/proc/cpuinfo")  # of Linux; elsewhere Python knows it
    text = facts.read_text(encoding="utf-8") if facts.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()


def current_conditions(threads: int) -> Conditions:
    """The conditions of a run on this machine."""
    return Conditions(processor(), utils.describe_machine(), arithmetic(), threads)


def conditions_of(record: dict[str, Any]) -> Conditions:
    """The conditions of a stored run."""
    return Conditions(*(record[field] for field in Conditions._fields))


def load_records() -> list[dict[str, Any]]:
    """The stored runs; in their "data", by data set: 'starter', 'short', 'ratio'."""
    if not RESULTS.exists():
        return []
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def with_record(records: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with `new` in the place of the one with its conditions, else at the end."""
    stored = [conditions_of(record) for record in records]
    if conditions_of(new) not in stored:
        return [*records, new]
    place = stored.index(conditions_of(new))
    return [*records[:place], new, *records[place + 1 :]]


def stored_starters(
    records: list[dict[str, Any]], data: utils.DigitData
) -> dict[Conditions, dict[str, Any]]:
    """By conditions, the starter's stored results that can be compared.

    Their seconds are measured, not extrapolated, and as many test images as `data` has judged them.
    """
    found = {}
    for record in records:
        starter = record["data"].get(data.name, {}).get("starter", {})
        same_images = starter.get("test_images") == len(data.test)
        if same_images and starter["seconds_are"] == "measured":
            found[conditions_of(record)] = starter
    return found


def stored_or_extrapolated_starter(
    data: utils.DigitData, records: list[dict[str, Any]], conditions: Conditions
) -> dict[str, Any]:
    """The starter's result if it is not trained now: a stored one, else an estimate.

    An estimate has the accuracy of the first measured result, and the seconds that a part of an
    epoch promises. Raises SystemExit where no measured result for these test images is stored.
    """
    measured = stored_starters(records, data)
    if not measured:
        raise SystemExit(
            f"{RESULTS.name} has no starter that was judged by {len(data.test):,} test images of "
            f"{data.name}: run make bench ARGS=--full."
        )
    if conditions in measured:
        return measured[conditions]
    return extrapolated_starter(data, next(iter(measured.values())))


def table(records: list[dict[str, Any]]) -> str:
    """Runs as a Markdown table, a row for each run and data set."""
    rows = [["data set", "our arithmetic", "the starter's 20 epochs", "ours", "times less"]]
    for record in records:
        for name, found in record["data"].items():
            if "short" not in found:  # ours did not come to its end
                continue
            starter, short = found["starter"], found["short"]
            of_starter = f"{starter['test_acc']:.2f} % in {starter['seconds']:,.0f} s"
            if starter["seconds_are"] == "extrapolated":
                of_starter += " (extrapolated)"
            ours = f"{short['test_acc']:.2f} % in {short['seconds']:.1f} s"
            ours += f", {short['epochs']:g} epochs"
            ratio = f"{found['ratio']:.0f}"
            rows.append([name, record["arithmetic"], of_starter, ours, ratio])
    return markdown_table(rows)


def with_table(readme: str, records: list[dict[str, Any]]) -> str:
    """The README's text with the table of the first record's machine; others' runs add no row."""
    first = records[0]
    of_processor = [record for record in records if record["processor"] == first["processor"]]
    shown = [record for record in of_processor if record["machine"] == first["machine"]]
    return fill_readme(readme, BENCH_START, table(shown), BENCH_END)


def save_and_fill_readme(records: list[dict[str, Any]]) -> None:
    """Write bench.json and the README's table."""
    text = json.dumps(records, indent=1) + "\n"
    utils.write_atomically(RESULTS, lambda path: path.write_text(text, "utf-8", newline="\n"))
    readme = with_table((ROOT / "README.md").read_text(encoding="utf-8"), records)
    utils.write_atomically(
        ROOT / "README.md", lambda path: path.write_text(readme, "utf-8", newline="\n")
    )


def main() -> None:
    """Compare on real MNIST and real SVHN; store the results, also in the README; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="train the starter's 20 epochs")
    loaders = {"MNIST": utils.load_mnist, "SVHN": utils.load_svhn}
    parser.add_argument("--data", nargs="+", choices=loaders, default=list(loaders))
    arguments = parser.parse_args()
    os.environ.update(A3_PROFILE="full", A3_DATA="real")
    threads = min(2, joblib.cpu_count())
    torch.set_num_threads(threads)
    conditions = current_conditions(threads)
    records = load_records()
    earlier = [record for record in records if conditions_of(record) == conditions]
    stored_data = earlier[0]["data"] if earlier else {}
    new_record = {**conditions._asdict(), "data": dict(stored_data)}
    for name in arguments.data:
        data = loaders[name]()
        test = definitions.gray(data.test) if data.test.images.shape[1] == 3 else data.test
        if arguments.full:
            starter = train_starter(data, test)
            # It took most of the time: keep it, whatever becomes of ours.
            new_record["data"][data.name] = {"starter": starter}
            save_and_fill_readme(with_record(records, new_record))
        else:
            starter = stored_or_extrapolated_starter(data, records, conditions)
        short = short_result(data, test, starter["test_acc"])
        ratio = starter["seconds"] / short["seconds"]
        new_record["data"][data.name] = {"starter": starter, "short": short, "ratio": ratio}
        save_and_fill_readme(with_record(records, new_record))
    print(table([new_record]))


if __name__ == "__main__":
    main()
