"""Trains g, the SVHN classifier of Question 1 (e), on real SVHN, on one CPU core.

    A3_DATA_ROOT=FOLDER python offline/street_classifier.py

Architecture and augmentation are the notebook's, out of its cells tagged 'definitions'. Writes
street_classifier.pt (state dict, float16) and street_classifier.json (accuracies in percent,
recipe, sha256) beside this file. A stopped run resumes from its last checkpoint (A3_RUNS).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import utils  # noqa: E402

BATCH, PEAK_LR, WEIGHT_DECAY, SMOOTHING = 128, 4e-3, 0.02, 0.1
STEPS, WARM_UP, DECAY = 4_000, 100, 0.5  # the last half of the steps decays to zero
DROPOUT = 0.0  # the starter's 0.3 in every layer needs many more epochs
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 200  # steps


@functools.cache
def from_notebook(*wanted: str) -> list[Callable]:
    """The functions and classes of these names out of the notebook's 'definitions' cells."""
    notebook = HERE.parent / "assignment3.ipynb"
    names: dict = {"device": torch.device("cpu"), "FULL": True}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "definitions" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
        if names.keys() >= set(wanted):
            return [names[name] for name in wanted]
    raise RuntimeError(f"{notebook} has no cells tagged 'definitions' with {', '.join(wanted)}.")


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotated, zoomed, sheared and shifted a little, of another contrast, 8 x 8 pixels erased.

    images: float N x 3 x 32 x 32 in -1..1. The shifts are small: a crop's neighboring digits must
    not move to its middle.
    """
    random_affine, random_erase = from_notebook("random_affine", "random_erase")
    images = random_affine(images, generator, degrees=8, shift=0.04, zoom=0.1, shear=0.1)
    gain, offset = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    images = ((0.6 + 0.6 * gain) * images + 0.4 * offset - 0.2).clamp(-1, 1)
    return random_erase(images, generator, size=8)


def batch_of(split: utils.Split, step: int) -> tuple[Tensor, Tensor]:
    """The batch of one step, the same in a resumed run; each epoch has its own order."""
    per_epoch = len(split) // BATCH
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(split), generator=utils.epoch_generator(0, epoch))
    index = order[place * BATCH : (place + 1) * BATCH]
    images = augmented(utils.to_float(split.images[index]), utils.epoch_generator(1, step))
    return images.contiguous(memory_format=torch.channels_last), split.labels[index]


def train(model: nn.Module, split: utils.Split, steps: int, path: Path) -> float:
    """Trains `model` for `steps`; leaves in it the moving average of its weights.

    AdamW with label smoothing; the learning rate warms up, stays, and decays to zero. `path` is
    the checkpoint. Returns the core-minutes taken, those before an interruption included.
    """
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, weight_decay=WEIGHT_DECAY)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    done, seconds, losses = 0, 0.0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, seconds = state["step"], state["seconds"]
    precision = utils.precision_policy(torch.device("cpu"))
    forward = torch.compile(model, dynamic=False)  # fuses norm and ReLU: a quarter faster
    start = time.process_time() - seconds
    for step in range(done, steps):
        rate = PEAK_LR * min(1, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = batch_of(split, step)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses += loss.item() / CHECKPOINT_EVERY
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            seconds = time.process_time() - start
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "seconds": seconds}
            utils.write_atomically(path, lambda target, state=state: torch.save(state, target))
            print(f"step {step + 1}: loss {losses:.4f}, {seconds / 60:.1f} min", flush=True)
            losses = 0.0
    model.load_state_dict(average.module.state_dict())
    return seconds / 60


def percent(model: nn.Module, split: utils.Split) -> float:
    """Accuracy of `model` on `split`, in percent, rounded to two digits."""
    (accuracy,) = from_notebook("accuracy")
    return round(accuracy(utils.predict(model.eval(), split), split.labels), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--target", type=Path, default=HERE / "street_classifier.pt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(A3_PROFILE="full", A3_DATA="real")
    street = utils.load_street()
    torch.manual_seed(0)
    (model_class,) = from_notebook("StreetClassifier")
    model = model_class(dropout=DROPOUT)
    checkpoint = utils.runs_folder() / "street_classifier_checkpoint.pt"
    minutes = train(model, street.train, args.steps, checkpoint)
    # The notebook loads the rounded weights, so those are the ones to measure.
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    half = {k: v.contiguous() for k, v in half.items()}
    utils.write_atomically(args.target, lambda path: torch.save(half, path))
    model.load_state_dict(half)
    os.environ["A3_DATA"] = "embedded"
    rendered = utils.load_street()
    facts = {
        "accuracy": {data.name: percent(model, data.test) for data in (street, rendered)},
        "trained_on": f"{street.name}, all {len(street.train):,} training images",
        "recipe": {
            "augmentation": " ".join(augmented.__doc__.split(".")[0].split()),
            "batch": BATCH, "optimizer": "AdamW", "peak_lr": PEAK_LR, "weight_decay": WEIGHT_DECAY,
            "warm_up_steps": WARM_UP, "share_of_decay": DECAY, "label_smoothing": SMOOTHING,
            "dropout": DROPOUT, "ema_decay": EMA_DECAY,
        },
        "steps": args.steps,
        "epochs": round(args.steps * BATCH / len(street.train), 1),
        "core_minutes": round(minutes, 1),
        "machine": utils.machine(),
        "sha256": hashlib.sha256(args.target.read_bytes()).hexdigest(),
    }  # fmt: skip
    text = json.dumps(facts, indent=1) + "\n"
    utils.write_atomically(
        args.target.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8")
    )
    print(text)


if __name__ == "__main__":
    main()
