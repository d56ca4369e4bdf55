"""Training speed: the starter's way against ours, same network, same data, same steps, one run.

make bench                        both ways, in turns, three pairs
A3_PRECISION=fp32 make bench      ours without bf16
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent)]
import conftest  # noqa: E402

import utils  # noqa: E402

BATCH = 128


def starter_model() -> nn.Module:
    """The network in the starter's order of layers."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class PictureDataset(torch.utils.data.Dataset):
    """What torchvision.datasets.MNIST does for an index: array, PIL picture, transforms."""

    def __init__(self, split: utils.Split) -> None:
        from torchvision import transforms

        self.split = split
        steps = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        picture = Image.fromarray(self.split.images[index, 0].numpy())
        return self.transform(picture), int(self.split.labels[index])


def starters_way(split: utils.Split) -> float:
    """Seconds of one epoch: DataLoader, per-image transforms, fp32, plain Adam."""
    torch.manual_seed(0)
    model = starter_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(PictureDataset(split), batch_size=BATCH, shuffle=True)
    started = time.perf_counter()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return time.perf_counter() - started


def our_way(split: utils.Split, nb) -> tuple[float, float]:
    """Seconds of one epoch of utils.fit, and the seconds of it spent on making batches."""
    utils.seed_everything(0)
    model, loader, waited = nb.classifier(), utils.Loader(split, BATCH), [0.0]

    def timed(epoch: int):
        batches = loader.epoch(epoch)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            waited[0] += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    started = time.perf_counter()
    utils.fit(
        model, timed, nb.classification_loss, epochs=1, steps_per_epoch=len(loader), run="bench"
    )
    return time.perf_counter() - started, waited[0]


def main() -> None:
    """Print pictures a second of both ways, their ratio, and the share of making batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    arguments = parser.parse_args()
    threads = arguments.threads or torch.get_num_threads()
    nb = conftest.definitions()
    data = utils.load_handwritten()
    count = arguments.steps * BATCH
    split = data.train.take(np.arange(count) % len(data.train))
    torch.set_num_threads(threads)
    dtype = utils.precision_policy(torch.device("cpu"))
    print(f"{utils.machine()}, {threads} threads; {data.name}, {arguments.steps} steps of {BATCH}")
    print(f"ours runs in {dtype}")
    rows = []
    for pair in range(arguments.pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            conftest.os.environ["A3_RUNS"] = folder
            theirs = starters_way(split)
            ours, waited = our_way(split, nb)
        if pair:  # the first pair warms up
            rows.append((count / theirs, count / ours, theirs / ours, 100 * waited / ours))
            print(
                "starter {:6.0f}/s   ours {:6.0f}/s   ratio {:4.2f}   batches {:4.1f} %".format(
                    *rows[-1]
                )
            )
    ratios = [row[2] for row in rows]
    print(f"ratio: median {np.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
