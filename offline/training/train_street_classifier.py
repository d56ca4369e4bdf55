"""Trains g, the SVHN classifier of Question 1 (e), on real SVHN, on one CPU core.

    A3_DATA_ROOT=FOLDER python -m offline.training.train_street_classifier

Run it in the project's folder. The architecture is the notebook's; the augmentation is this file's
own. Writes street_classifier.pt (state dict, float16) and street_classifier.json (accuracies in
percent, recipe, sha256) into offline/weights. A stopped run goes on from its last checkpoint, in
the folder A3_RUNS; after a change of the recipe, delete that checkpoint first.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import utils
from offline.training.common import CPU, definitions, describe_size, round_and_save

TARGET = utils.OFFLINE_FOLDER / "weights" / "street_classifier.pt"
AUGMENTATION = (  # in words, for the .json; `augmented` does it
    "Rotated, zoomed, sheared and shifted a little, of another contrast, 8 x 8 pixels erased."
)
BATCH = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.02
SMOOTHING = 0.1  # of the labels
STEPS = 4_000
WARM_UP = 100  # steps
LR_DECAY_SHARE = 0.5  # the share of the steps, at the end, in which the learning rate falls to zero
DROPOUT = 0.0  # the starter's 0.3 in every layer needs many more epochs
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 200  # steps
ORDER_SEED = 0  # one random stream an epoch
AUGMENTATION_SEED = 1  # one random stream a step


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images changed at random, as AUGMENTATION says.

    images: float N x 3 x 32 x 32 in -1..1. The shifts are small: a crop's neighboring digits must
    not move to its middle.
    """
    images = definitions.random_affine(images, generator, (8, 0.04, 0.1, 0.1))
    gain, offset = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    gain = 0.6 + 0.6 * gain  # 0.6 to 1.2
    offset = 0.4 * offset - 0.2  # -0.2 to 0.2
    images = (gain * images + offset).clamp(-1, 1)
    return definitions.random_erase(images, generator, size=8)


def batch_of(split: utils.Split, step: int) -> tuple[Tensor, Tensor]:
    """The batch of one step, the same in a resumed run; each epoch has its own order."""
    steps_an_epoch = len(split) // BATCH
    epoch, place = divmod(step, steps_an_epoch)
    order = torch.randperm(len(split), generator=utils.random_stream(ORDER_SEED, epoch))
    index = order[place * BATCH : (place + 1) * BATCH]
    generator = utils.random_stream(AUGMENTATION_SEED, step)  # by step, in place of an epoch
    images = augmented(utils.to_float(split.images[index]), generator)
    return images.contiguous(memory_format=torch.channels_last), split.labels[index]


def learning_rate(step: int) -> float:
    """The rate of a step: it warms up, stays at its peak, and falls to zero in a straight line."""
    share_of_warm_up = (step + 1) / WARM_UP  # above 1 when it is over
    share_of_decay_left = (STEPS - step) / (LR_DECAY_SHARE * STEPS)  # above 1 before it begins
    return PEAK_LR * min(1, share_of_warm_up, share_of_decay_left)


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
        """Write a checkpoint: all that a stopped training needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        utils.write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint that `save` wrote."""
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


def train(model: nn.Module, split: utils.Split, checkpoint: Path) -> float:
    """Train `model` for STEPS steps, and leave in it the moving average of its weights.

    Goes on from `checkpoint` where there is one. Returns the core-minutes taken, those before an
    interruption included.
    """
    trainer = Trainer(model)
    if checkpoint.exists():
        trainer.load(checkpoint)
    start = time.process_time() - trainer.seconds  # as if nothing had interrupted it
    losses = []
    while trainer.step < STEPS:
        images, labels = batch_of(split, trainer.step)
        rate = learning_rate(trainer.step)
        losses.append(trainer.train_step(images, labels, rate))
        if trainer.step % CHECKPOINT_EVERY == 0:
            trainer.seconds = time.process_time() - start
            trainer.save(checkpoint)
            loss = statistics.mean(losses)
            minutes = trainer.seconds / 60
            print(f"step {trainer.step}: loss {loss:.4f}, {minutes:.1f} min", flush=True)
            losses = []
    model.load_state_dict(trainer.average.module.state_dict())
    return (time.process_time() - start) / 60


def recipe() -> dict[str, object]:
    """The settings of the training, for the .json; seeds and steps are not among them."""
    return {
        "augmentation": AUGMENTATION,
        "batch": BATCH,
        "optimizer": "AdamW",
        "peak_lr": PEAK_LR,
        "weight_decay": WEIGHT_DECAY,
        "warm_up_steps": WARM_UP,
        "share_of_decay": LR_DECAY_SHARE,
        "label_smoothing": SMOOTHING,
        "dropout": DROPOUT,
        "ema_decay": EMA_DECAY,
    }


def main() -> None:
    """Train g, measure it on real and on rendered crops, and replace the committed weights."""
    torch.set_num_threads(1)  # the same sums in the same order
    os.environ.update(A3_PROFILE="full", A3_DATA="real")
    street = utils.load_svhn()

    torch.manual_seed(0)
    model = definitions.StreetClassifier(dropout=DROPOUT)
    checkpoint = utils.runs_folder() / "street_classifier_checkpoint.pt"
    minutes = train(model, street.train, checkpoint)
    sha256 = round_and_save(model, TARGET)

    accuracy = {}
    for data in (street, utils.svhn_stand_in()):
        accuracy[data.name] = round(utils.classifier_accuracy(model, data.test, CPU), 2)
    record = {
        "accuracy": accuracy,
        "trained_on": describe_size(street),
        "recipe": recipe(),
        "steps": STEPS,
        "epochs": round(STEPS * BATCH / len(street.train), 1),
        "core_minutes": round(minutes, 1),
        "machine": utils.describe_machine(),
        "sha256": sha256,
    }
    text = json.dumps(record, indent=1) + "\n"
    TARGET.with_suffix(".json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
