"""scikit-learn's 1,797 handwritten digits, the stand-in for MNIST where it cannot be had."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import utils


def stand_in() -> utils.DigitData:
    """1,437 training and 360 test images, 1 x 28 x 28.

    The 8 x 8 digits fill their frame; they are resized to 20 x 20, which MNIST's fill of 28 x 28.
    """
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    digits = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad((digits / 16 * 255).round().clamp(0, 255).to(torch.uint8), (4, 4, 4, 4))
    parts = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    train, test = (utils.Split(images, torch.from_numpy(labels).long()).take(p) for p in parts)
    return utils.DigitData("scikit-learn digits", train, test, real=False)
