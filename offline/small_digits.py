"""scikit-learn's 1,797 handwritten digits, the stand-in for MNIST where it cannot be had."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


def load_small_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) of 1,437 training and of 360 test digits in MNIST's format.

    Images: uint8, N x 1 x 28 x 28. Labels: int64, 0 to 9. The 8 x 8 digits fill their frame, so
    they are resized to 20 x 20, the part of 28 x 28 that MNIST's digits fill.
    """
    small, labels = load_digits(return_X_y=True)
    gray = torch.from_numpy(small).float().view(-1, 1, 8, 8)  # 0 to 16
    resized = F.interpolate(gray, size=(20, 20), mode="bilinear", align_corners=False)
    pixels = (resized / 16 * 255).round().clamp(0, 255).to(torch.uint8)
    images = F.pad(pixels, (4, 4, 4, 4))
    targets = torch.from_numpy(labels).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    return (images[train], targets[train]), (images[test], targets[test])
