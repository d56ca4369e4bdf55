"""What the scripts of this folder share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import utils
from tools.notebook import load_definitions

definitions = load_definitions()

CPU = torch.device("cpu")


def round_and_save(model: nn.Module, path: Path) -> str:
    """Round the weights of `model` to float16, save them to `path`, and return the file's sha256.

    `model` is left in eval mode with the rounded numbers, as those are the ones to measure.
    """
    half = {}
    for name, value in model.state_dict().items():
        rounded = value.half() if value.is_floating_point() else value
        half[name] = rounded.contiguous()

    def write(temporary: Path) -> None:
        # Given a path, torch.save writes its name into the file, and the temporary name is
        # another one in each process: the same weights would get another sha256.
        with temporary.open("wb") as file:
            torch.save(half, file)

    utils.write_atomically(path, write)
    utils.load_weights(model, path)
    return utils.file_sha256(path)


def describe_size(data: utils.DigitData) -> str:
    """'SVHN: 73,257 training and 6,000 of 26,032 test images'."""
    parts = {}
    for part, split in (("train", data.train), ("test", data.test)):
        parts[part] = f"{len(split):,}"
        if data.real and len(split) != utils.SIZES[data.name][part]:
            parts[part] += f" of {utils.SIZES[data.name][part]:,}"
    return f"{data.name}: {parts['train']} training and {parts['test']} test images"
