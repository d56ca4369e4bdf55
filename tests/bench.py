"""Time to an accuracy: the starter's way against ours, same network, same test images, both cores.

make bench                about two minutes: a part of the data; long times are extrapolated
make bench FULL=--full    the whole comparison, nothing extrapolated

The starter's way: a torchvision data set, transforms image by image, a DataLoader, fp32, 20 epochs
of Adam at 1e-3. It gives an accuracy and a time. Ours: `train_single` of the notebook with one of
its recipes and the fewest epochs whose final test accuracy passes that; the median of three seeds.
Both use two threads in one process. Images a second on one thread are the second figure.
"""

import argparse
import os
import statistics
import tempfile
import time

import conftest
import torch
import torch.nn.functional as F
from torch import nn

import utils

CPU, BATCH, EPOCHS = torch.device("cpu"), 128, 20
SEEDS = range(3)


class ImageDataset(torch.utils.data.Dataset):
    """What torchvision.datasets.MNIST and SVHN do for an index: array, PIL image, transforms."""

    def __init__(self, split: utils.Split) -> None:
        from torchvision import transforms

        steps = [transforms.Grayscale()] if split.images.shape[1] == 3 else []
        steps += [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        self.arrays = split.images.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()
        self.labels, self.transform = split.labels, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), int(self.labels[index])


def starter_epochs(train: utils.Split, epochs: int, nb) -> tuple[nn.Module, float]:
    """The starter's training: the model, and the seconds it took."""
    torch.manual_seed(0)
    model = nb.classifier()
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
    train: utils.Split, recipe: str, epochs: int, seed: int, nb
) -> tuple[nn.Module, float]:
    """Our training, from an empty runs folder: the model, and the seconds of all of it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["A3_RUNS"] = folder
        started = time.perf_counter()
        model, _ = nb.train_single(train, None, recipe, epochs=epochs, run="bench", seed=seed)
        return model, time.perf_counter() - started


def accuracy(model: nn.Module, test: utils.Split, dtype: str, nb) -> float:
    """Test accuracy in percent; the starter's model is read in fp32, as it was trained."""
    os.environ["A3_PRECISION"] = dtype
    value = nb.accuracy(utils.predict(model, test), test.labels)
    os.environ["A3_PRECISION"] = "auto"
    return value


def images_a_second(data: utils.DigitData, recipe: str, nb, steps: int = 30) -> list[float]:
    """Training images a second on one thread: the starter's way, its recipe in ours, our recipe."""
    torch.set_num_threads(1)
    some = data.train.first(steps * BATCH)
    ours = nb.gray(some)
    runs = [
        lambda: starter_epochs(some, 1, nb),
        lambda: our_training(ours, "suggested", 1, 0, nb),
        lambda: our_training(ours, recipe, 1, 0, nb),
    ]
    best = [min(run()[1] for _ in range(2)) for run in runs]
    return [len(some) / seconds for seconds in best]


def compare(data: utils.DigitData, recipe: str, nb, full: bool, threads: int) -> None:
    """Print time and accuracy of both ways on one data set."""
    plain, wrapped, ours = images_a_second(data, recipe, nb)
    print(
        f"\n{data.name}, training images a second on one thread: starter {plain:,.0f}, ours "
        f"{wrapped:,.0f} with the suggested recipe ({wrapped / plain:.1f} times) and {ours:,.0f} "
        f"with {recipe!r} ({ours / plain:.1f} times)"
    )
    torch.set_num_threads(threads)
    # The quick form trains on a part, and the starter's 20 epochs are measured on less of it.
    train = data.train if full else data.train.first(6_000)
    train_gray, test_gray = nb.gray(train), nb.gray(data.test)
    timed = train if full else train.first(1_500)
    if full:
        model, seconds = starter_epochs(train, EPOCHS, nb)
    else:
        _, part = starter_epochs(timed, 1, nb)
        seconds = part * len(train) / len(timed) * EPOCHS
        # The same steps without its slow loading give its accuracy: plain Adam, 20 epochs.
        model, _ = our_training(train_gray, "suggested", EPOCHS, 0, nb)
    goal = accuracy(model, test_gray, "fp32" if full else "auto", nb)
    how = "measured" if full else f"extrapolated from one epoch of {len(timed):,}"
    print(
        f"  starter's way, {EPOCHS} epochs of {len(train):,} images: {goal:.2f} % "
        f"in {seconds:.0f} s ({how})"
    )
    for epochs in range(1, EPOCHS + 1):
        runs = [our_training(train_gray, recipe, epochs, seed, nb) for seed in SEEDS]
        reached = [accuracy(model, test_gray, "auto", nb) for model, _ in runs]
        middle = statistics.median(seconds for _, seconds in runs)
        shown = ", ".join(f"{value:.2f}" for value in reached)
        print(f"  ours, {recipe!r}, {epochs} epochs: {shown} % in {middle:.1f} s", flush=True)
        if statistics.median(reached) > goal:
            print(
                f"  => {seconds / middle:.0f} times less time to the starter's accuracy: "
                f"{middle:.1f} s, not {seconds:.0f} s; {threads} threads, median of 3 seeds"
            )
            return
    print("  => ours did not pass the starter's accuracy within its 20 epochs")


def main() -> None:
    """Compare on MNIST, and on SVHN where it is at hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole comparison")
    parser.add_argument("--recipe", default="smoothed", help="recipe of ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    threads = max(arguments.threads, min(2, os.cpu_count() or 1))
    nb = conftest.definitions()
    print(f"{utils.machine()}; {threads} threads; ours runs in {utils.precision_policy(CPU)}")
    for load in (utils.load_handwritten, utils.load_street):
        data = load()
        if not data.real and load is utils.load_street:
            print(f"\nSVHN is not at hand (only {data.name}).")
            continue
        compare(data, arguments.recipe, nb, arguments.full, threads)


if __name__ == "__main__":
    main()
