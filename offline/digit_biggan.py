"""The digit BigGAN of Question 3 and the evaluation classifier: their form, and how to load them.

One generator draws twenty classes at 32 x 32: the digits of SVHN and those of MNIST. Both models
were trained by train_digit_biggan.py on the real sets; the classifier saw real images only.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils

HERE = Path(__file__).resolve().parent
Z_DIM = 32  # numbers in the noise vector
DIGIT_CLASSES = [f"{kind} {digit}" for kind in ("SVHN", "MNIST") for digit in range(10)]
# (doubles the size?, input, output channels in units of channel_width): 4 -> 4 -> 8 -> 16 -> 32
LAYERS = [(False, 16, 8), (True, 8, 4), (True, 4, 2), (True, 2, 1)]


def digit_biggan_config():
    """The `BigGANConfig` of our model: 4 x 4 to 32 x 32, width 32, self-attention at 8 x 8."""
    from pytorch_pretrained_biggan import BigGANConfig

    return BigGANConfig(
        output_dim=32,
        z_dim=Z_DIM,
        class_embed_dim=Z_DIM,
        channel_width=32,
        num_classes=len(DIGIT_CLASSES),
        layers=LAYERS,
        attention_layer_position=2,
    )


def load_digit_biggan(device: str | torch.device = "cpu", folder: Path = HERE):
    """The digit BigGAN on `device`, with the fields of the notebook's Generator.

    `model(z, c, truncation)`: noise N x 32, class weights N x 20 and a truncation in (0, 1] give
    images N x 3 x 32 x 32 in -1..1. Raises FileNotFoundError without digit_biggan.pt,
    ImportError without pytorch-pretrained-biggan.
    """
    from pytorch_pretrained_biggan import BigGAN

    model = utils.load_weights(BigGAN(digit_biggan_config()), folder / "digit_biggan.pt").to(device)
    title = "digit BigGAN 32 x 32 (trained in this project)"
    return SimpleNamespace(
        model=model,
        name="biggan-digits-32",
        title=title,
        classes=DIGIT_CLASSES,
        z_dim=Z_DIM,
        size=32,
    )


class EvaluationClassifier(nn.Module):
    """Classifier of 32 x 32 color digits in the 20 classes of DIGIT_CLASSES.

    float N x 3 x 32 x 32 in -1..1 to N x 20 logits; `features` gives the N x 64 numbers before
    the last layer, in which the Fréchet distance is measured. It never meets the generator in
    training, and has another architecture than the guide that does.
    """

    def __init__(self, classes: int = len(DIGIT_CLASSES)) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(3, 24), *conv(24, 24), nn.MaxPool2d(2),
            *conv(24, 48), *conv(48, 48), nn.MaxPool2d(2),
            *conv(48, 96), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96 * 16, 64),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.features(images)))


def load_evaluation_classifier(
    device: str | torch.device = "cpu", folder: Path = HERE
) -> EvaluationClassifier:
    """The evaluation classifier in eval mode. Raises FileNotFoundError without its weights."""
    return utils.load_weights(EvaluationClassifier(), folder / "evaluation_classifier.pt").to(
        device
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features (N x D and M x D), each taken as a Gaussian.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, equation (6), in
    float64; the last trace from the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric.
    Raises ValueError for fewer than two rows, different widths, or numbers that are not finite.
    """
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] >= 1
    if not fits or min(len(a), len(b)) < 2:
        raise ValueError(
            "a and b must be N x D and M x D with N and M at least 2, D at least 1; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a and b must be finite; they hold NaN or infinity.")
    a, b = a.double(), b.double()
    cov_a, cov_b = (x.T.cov().reshape(x.shape[1], -1) for x in (a, b))  # a matrix for D = 1 too
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
