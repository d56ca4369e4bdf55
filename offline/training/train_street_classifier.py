"""Trains g, the SVHN classifier of Question 1 (e), on real SVHN, on one CPU core.

    A3_DATA_ROOT=FOLDER python -m offline.training.train_street_classifier

Run it in the project's folder. Architecture and augmentation are the notebook's. Writes
street_classifier.pt (state dict, float16) and street_classifier.json (accuracies in percent,
recipe, sha256) into offline/weights. A stopped run goes on from its last checkpoint (A3_RUNS).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import utils
from tools.notebook import load_definitions

notebook = load_definitions()

CPU = torch.device("cpu")
AUGMENTATION = (  # in words, for the .json; `augmented` does it
    "Rotated, zoomed, sheared and shifted a little, of another contrast, 8 x 8 pixels erased."
)
BATCH = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.02
SMOOTHING = 0.1  # of the labels
STEPS = 4_000
WARM_UP = 100  # steps
DECAY = 0.5  # the share of the steps, at the end, in which the learning rate falls to zero
DROPOUT = 0.0  # the starter's 0.3 in every layer needs many more epochs
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 200  # steps


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotated, zoomed, sheared and shifted a little, of another contrast, 8 x 8 pixels erased.

    images: float N x 3 x 32 x 32 in -1..1. The shifts are small: a crop's neighboring digits must
    not move to its middle.
    """
    images = notebook.random_affine(images, generator, (8, 0.04, 0.1, 0.1))
    gain, offset = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    images = ((0.6 + 0.6 * gain) * images + 0.4 * offset - 0.2).clamp(-1, 1)
    return notebook.random_erase(images, generator, size=8)


def batch_of(split: utils.Split, step: int) -> tuple[Tensor, Tensor]:
    """The batch of one step, the same in a resumed run; each epoch has its own order."""
    epoch, place = divmod(step, len(split) // BATCH)
    order = torch.randperm(len(split), generator=utils.epoch_generator(0, epoch))
    index = order[place * BATCH : (place + 1) * BATCH]
    images = augmented(utils.to_float(split.images[index]), utils.epoch_generator(1, step))
    return images.contiguous(memory_format=torch.channels_last), split.labels[index]


def learning_rate(step: int, steps: int) -> float:
    """It warms up, stays at its peak, and falls to zero in a straight line."""
    warm_up = (step + 1) / WARM_UP
    decay = (steps - step) / (DECAY * steps)
    return PEAK_LR * min(1, warm_up, decay)


class Trainer:
    """Model, moving average of its weights, optimizer, and where the training stands."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, weight_decay=WEIGHT_DECAY)
        self.average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True
        )
        self.forward = torch.compile(model, dynamic=False)  # fuses norm and ReLU: a quarter faster
        self.step = 0
        self.seconds = 0.0  # of one core

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        utils.write_atomically(path, lambda part: torch.save(state, part))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.seconds = state["seconds"]

    def train_step(self, images: Tensor, labels: Tensor, rate: float) -> float:
        """One step of AdamW with label smoothing; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with utils.autocast(CPU):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.item()


def train(model: nn.Module, split: utils.Split, steps: int, checkpoint: Path) -> float:
    """Trains `model` for `steps`, and leaves in it the moving average of its weights.

    Returns the core-minutes taken, those before an interruption included.
    """
    trainer = Trainer(model)
    if checkpoint.exists():
        trainer.load(checkpoint)
    start = time.process_time() - trainer.seconds  # as if nothing had interrupted it
    losses = []
    while trainer.step < steps:
        images, labels = batch_of(split, trainer.step)
        rate = learning_rate(trainer.step, steps)
        losses.append(trainer.train_step(images, labels, rate))
        if trainer.step % CHECKPOINT_EVERY == 0 or trainer.step == steps:
            trainer.seconds = time.process_time() - start
            trainer.save(checkpoint)
            loss, minutes = sum(losses) / len(losses), trainer.seconds / 60
            print(f"step {trainer.step}: loss {loss:.4f}, {minutes:.1f} min", flush=True)
            losses = []
    model.load_state_dict(trainer.average.module.state_dict())
    return trainer.seconds / 60


def save_half(model: nn.Module, path: Path) -> str:
    """Save the state dict of `model` with its floating-point numbers as float16; its sha256.

    `model` gets the rounded numbers too, as those are the ones to measure.
    """
    half = {}
    for name, value in model.state_dict().items():
        rounded = value.half() if value.is_floating_point() else value
        half[name] = rounded.contiguous()
    utils.write_atomically(path, lambda part: torch.save(half, part))
    utils.load_weights(model, path)
    return utils.file_sha256(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, all of it or nothing."""
    utils.write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=utils.OFFLINE / "weights")
    arguments = parser.parse_args()
    target = arguments.out / "street_classifier.pt"
    torch.set_num_threads(1)
    os.environ.update(A3_PROFILE="full", A3_DATA="real")
    street = utils.load_svhn()
    torch.manual_seed(0)
    model = notebook.StreetClassifier(dropout=DROPOUT)
    checkpoint = utils.runs_folder() / "street_classifier_checkpoint.pt"
    minutes = train(model, street.train, arguments.steps, checkpoint)
    sha256 = save_half(model, target)
    rendered = utils.svhn_stand_in()
    record = {
        "accuracy": {
            data.name: round(utils.percent_right(model, data.test, CPU), 2)
            for data in (street, rendered)
        },
        "trained_on": utils.describe_size(street),
        "recipe": {
            "augmentation": AUGMENTATION,
            "batch": BATCH,
            "optimizer": "AdamW",
            "peak_lr": PEAK_LR,
            "weight_decay": WEIGHT_DECAY,
            "warm_up_steps": WARM_UP,
            "share_of_decay": DECAY,
            "label_smoothing": SMOOTHING,
            "dropout": DROPOUT,
            "ema_decay": EMA_DECAY,
        },
        "steps": arguments.steps,
        "epochs": round(arguments.steps * BATCH / len(street.train), 1),
        "core_minutes": round(minutes, 1),
        "machine": utils.machine(),
        "sha256": sha256,
    }
    write_text(target.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
