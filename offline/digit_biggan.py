"""The digit BigGAN of Question 3 and the classifier that judges it: their form, and their weights.

One generator draws twenty classes at 32 x 32: the digits of SVHN and those of MNIST. Both models
were trained by training/train_digit_biggan.py on the real sets; the classifier saw real images
only.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent / "weights"
Z_DIM = 32  # numbers in the noise vector
SIZE = 32  # pixels of an image's side
DIGIT_CLASSES = [f"{kind} {digit}" for kind in ("SVHN", "MNIST") for digit in range(10)]
# (doubles the side?, input, output channels in units of channel_width). The sides of the images, in
# pixels: 4 -> 4 -> 8 -> 16 -> 32.
LAYERS = [(False, 16, 8), (True, 8, 4), (True, 4, 2), (True, 2, 1)]


def untrained_digit_biggan() -> nn.Module:
    """The library's BigGAN at our size: 4 x 4 to 32 x 32 pixels, self-attention at 8 x 8.

    Raises ImportError without pytorch-pretrained-biggan.
    """
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    config = BigGANConfig(
        output_dim=SIZE,
        z_dim=Z_DIM,
        class_embed_dim=Z_DIM,
        channel_width=32,
        num_classes=len(DIGIT_CLASSES),
        layers=LAYERS,
        attention_layer_position=2,
    )
    return BigGAN(config)


def load_digit_biggan(device: str | torch.device = "cpu") -> nn.Module:
    """The trained digit BigGAN on `device`, in eval mode.

    model(z, c, truncation): noise N x 32, class weights N x 20 and a truncation in (0, 1] give
    images N x 3 x 32 x 32 in -1..1. Raises FileNotFoundError without its weights, ImportError
    without pytorch-pretrained-biggan.
    """
    state = torch.load(WEIGHTS / "digit_biggan.pt", map_location="cpu", weights_only=True)
    model = untrained_digit_biggan()
    model.load_state_dict(state)
    return model.to(device).eval()


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    """A convolution that keeps the size (`kernel` is odd), batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class EvaluationClassifier(nn.Module):
    """Classifier of 32 x 32 color digits in the 20 classes of DIGIT_CLASSES.

    float N x 3 x 32 x 32 in -1..1 to N x 20 logits; `features` gives the N x 64 numbers before
    the last ReLU. It never meets the generator in training; the guide
    (training/train_digit_biggan.py), which does, has another architecture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_norm_relu(3, 24),
            *conv_norm_relu(24, 24),
            nn.MaxPool2d(2),
            *conv_norm_relu(24, 48),
            *conv_norm_relu(48, 48),
            nn.MaxPool2d(2),
            *conv_norm_relu(48, 96),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96 * 16, 64),
        )
        self.head = nn.Linear(64, len(DIGIT_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.features(images)))


def load_evaluation_classifier(device: str | torch.device = "cpu") -> EvaluationClassifier:
    """The trained evaluation classifier on `device`, in eval mode.

    Raises FileNotFoundError without its weights.
    """
    state = torch.load(WEIGHTS / "evaluation_classifier.pt", map_location="cpu", weights_only=True)
    model = EvaluationClassifier()
    model.load_state_dict(state)
    return model.to(device).eval()
