"""Trains the digit BigGAN of Question 3 and its evaluation classifier, on one CPU core.

    A3_DATA_ROOT=FOLDER python -m offline.training.train_digit_biggan

Run it in the project's folder.

Generator      pytorch-pretrained-biggan's BigGAN at 32 x 32, 20 classes (../digit_biggan.py)
Discriminator  residual, spectral norm, projection of the class (Miyato & Koyama 2018)
Loss           hinge (Lim & Ye 2017), plus a class term as in AC-GAN (Odena et al. 2017) from a
               guide: a classifier trained on real images beforehand and then frozen
For stability  two learning rates (Heusel et al. 2017), spectral norm (Miyato et al. 2018) and an
               exponential moving average of the generator's weights

Measures the raw and the averaged generator of every 500th step, and the averaged one of the last
step, with the evaluation classifier, which the generator never meets. Writes digit_biggan.pt,
evaluation_classifier.pt and digit_biggan_log.json into offline/weights. A stopped run goes on from
what it left in A3_RUNS/digit_biggan: the guide, the last checkpoint, the evaluation classifier.
After a change here, delete that folder first.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_pretrained_biggan import BigGAN
from pytorch_pretrained_biggan.model import BigGANBatchNorm
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import utils
from offline.digit_biggan import (
    DIGIT_CLASSES,
    WEIGHTS,
    Z_DIM,
    EvaluationClassifier,
    conv_norm_relu,
    untrained_digit_biggan,
)
from offline.training.common import CPU, definitions, describe_size, round_and_save

CLASSES = len(DIGIT_CLASSES)
# Where the ten classes of each data set begin in DIGIT_CLASSES; data sets by their role in the
# notebook.
FIRST_CLASS = {"street": 0, "handwritten": 10}
STREET_BATCH = 40  # more than of the other set: SVHN is the harder one
HANDWRITTEN_BATCH = 24
BATCH = STREET_BATCH + HANDWRITTEN_BATCH
WIDTH = 32  # channels of the first layer, in the discriminator and in the guide
LR_GENERATOR = 3e-4
LR_DISCRIMINATOR = 6e-4
BETAS = (0.0, 0.99)
# Gain of the discriminator's score, until GAIN_STEP and from then on. In the run that made the
# weights the hinge loss stayed near 1.7 (2 is that of a blind discriminator), so the gain was
# raised; that changed nothing. It is kept so that the run can be repeated.
FIRST_GAIN = 4.0
LATER_GAIN = 12.0
GAIN_STEP = 2100
CLASS_WEIGHT = 0.5  # of the class term in the generator's loss
EMA_DECAY = 0.999
STEPS = 2600
LOG_EVERY = 100  # steps
SNAPSHOT_EVERY = 500  # steps
GUIDE_STEPS = 800
EVALUATION_CLASSIFIER_STEPS = 1000
CLASSIFIER_BATCH = {"street": 88, "handwritten": 40}  # in a step of guide and evaluation classifier
AFFINE = (10, 0.05, 0.1, 0.1)  # degrees, shift, zoom, shear: see the notebook's random_affine
FRECHET_IMAGES = 2_000  # on each side of a Fréchet distance
SEED = 0
STATISTICS_SEED = 7  # of the noise that fills the batch-norm tables


def noise(count: int, rng: torch.Generator, truncation: float = 1.0) -> Tensor:
    """The library's truncated noise, count x 32: a normal cut to -2..2, times the truncation."""
    z = nn.init.trunc_normal_(torch.empty(count, Z_DIM), a=-2.0, b=2.0, generator=rng)
    return truncation * z


def one_hot(labels: Tensor) -> Tensor:
    """Class weights, N x 20, of pure classes."""
    return F.one_hot(labels, CLASSES).float()


# ---- real images ---------------------------------------------------------------------


class RealImages:
    """One split ('train' or 'test') of both sets, MNIST padded to 32 x 32.

    `splits` has labels 0 to 9, and MNIST in one channel. `draw` and `batch` give three channels and
    the classes of DIGIT_CLASSES: 0 to 9 for SVHN, 10 to 19 for MNIST.
    """

    def __init__(
        self, street: utils.DigitData, handwritten: utils.DigitData, split_name: str
    ) -> None:
        small = getattr(handwritten, split_name)
        padded = utils.Split(F.pad(small.images, (2, 2, 2, 2)), small.labels)
        self.splits = {"street": getattr(street, split_name), "handwritten": padded}

    def draw(self, role: str, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` random images of one set, float N x 3 x 32 x 32 in -1..1, and their classes."""
        split = self.splits[role]
        index = torch.randint(len(split), (count,), generator=rng)
        images = utils.to_float(split.images[index]).expand(-1, 3, -1, -1)  # SVHN has three already
        return images, split.labels[index] + FIRST_CLASS[role]

    def batch(self, counts: dict[str, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """So many random images of each set, in the order of `counts`, and their classes."""
        drawn = [self.draw(role, count, rng) for role, count in counts.items()]
        images = torch.cat([images for images, _ in drawn])
        labels = torch.cat([labels for _, labels in drawn])
        return images.contiguous(memory_format=torch.channels_last), labels


# ---- networks ------------------------------------------------------------------------


class TrainableBatchNorm(BigGANBatchNorm):
    """The library's batch norm, which only knows stored statistics, made trainable.

    In train mode it uses the batch's statistics; with `row` set it also stores them as that row
    of the table (row i: truncation i/50). In eval mode it is the library's, key for key.
    """

    row: int | None = None

    def forward(self, x: Tensor, truncation: float, condition: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, truncation, condition)
        if self.row is not None:
            self.running_means[self.row] = x.mean((0, 2, 3))
            self.running_vars[self.row] = x.var((0, 2, 3))
        if not self.conditional:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        x = F.batch_norm(x, None, None, training=True, eps=self.eps)
        scale, offset = 1 + self.scale(condition), self.offset(condition)
        return torch.addcmul(offset[:, :, None, None], x, scale[:, :, None, None])


def initialize(model: BigGAN) -> None:
    """Random weights to begin with: orthogonal convolutions and linear layers."""
    for name, weight in model.named_parameters():
        if name.endswith("weight_orig"):  # as spectral norm names them
            nn.init.orthogonal_(weight)
    nn.init.normal_(model.embeddings.weight, std=0.7)
    nn.init.ones_(model.generator.bn.weight)
    nn.init.zeros_(model.generator.bn.bias)


def trainable_biggan(state: dict[str, Tensor] | None = None) -> BigGAN:
    """The library's BigGAN at our size in train mode, with random weights or a copy of `state`."""
    model = untrained_digit_biggan()
    for module in model.modules():
        if isinstance(module, BigGANBatchNorm):
            # The library always builds its own norms. Ours has the same attributes, and can train.
            module.__class__ = TrainableBatchNorm
    if state is None:
        initialize(model)
    else:
        model.load_state_dict(state)
    return model.to(memory_format=torch.channels_last)


class Block(nn.Module):
    """Residual block of the discriminator: relu, conv, relu, conv, and half the size if asked."""

    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(inputs, outputs, 1))
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.skip(x)


class Discriminator(nn.Module):
    """Score of an image given its class: `gain` times (w.h + e_y.h).

    The gain is there because spectral norm keeps w and every e_y at length 1 or less.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = FIRST_GAIN
        self.blocks = nn.Sequential(
            spectral_norm(nn.Conv2d(3, WIDTH, 4, stride=2, padding=1)),
            Block(WIDTH, 2 * WIDTH, down=True),
            Block(2 * WIDTH, 4 * WIDTH, down=True),
            Block(4 * WIDTH, 4 * WIDTH, down=False),
        )
        self.score = spectral_norm(nn.Linear(4 * WIDTH, 1))
        self.project = spectral_norm(nn.Embedding(CLASSES, 4 * WIDTH))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = F.relu(self.blocks(images)).sum((2, 3))
        return self.gain * (self.score(h)[:, 0] + (h * self.project(labels)).sum(1))


def guide_network() -> nn.Sequential:
    """The guide: N x 3 x 32 x 32 in -1..1 to N x 20 logits."""
    return nn.Sequential(
        *conv_norm_relu(3, WIDTH, kernel=5),
        nn.MaxPool2d(2),
        *conv_norm_relu(WIDTH, 2 * WIDTH, kernel=5),
        nn.MaxPool2d(2),
        *conv_norm_relu(2 * WIDTH, 4 * WIDTH),
        *conv_norm_relu(4 * WIDTH, 4 * WIDTH),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, CLASSES),
    )


def load_or_train_classifier(
    model: nn.Module, real: RealImages, steps: int, path: Path, seed: int
) -> nn.Module:
    """Train `model` to name the class of real images, or load it when `path` is there.

    AdamW, one cycle, label smoothing, small random rotations, shifts, zooms and shears. The
    weights are rounded to float16.
    """
    model = model.to(memory_format=torch.channels_last)
    if path.exists():
        return utils.load_weights(model, path)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        images, labels = real.batch(CLASSIFIER_BATCH, rng)
        images = definitions.random_affine(images, rng, AFFINE)
        with utils.autocast(CPU):
            logits = model(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    round_and_save(model, path)
    return model


# ---- training of the generator -------------------------------------------------------


class Trainer:
    """Both networks, their optimizers, the moving average, the log, and where they stand."""

    def __init__(self, guide: nn.Module) -> None:
        torch.manual_seed(SEED)
        self.guide = guide.requires_grad_(False)  # frozen: no gradients of its weights
        self.generator = trainable_biggan()
        self.average = trainable_biggan(self.generator.state_dict())
        self.discriminator = Discriminator().to(memory_format=torch.channels_last)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), LR_GENERATOR, BETAS)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), LR_DISCRIMINATOR, BETAS)
        self.rng = torch.Generator().manual_seed(SEED)
        self.step = 0
        self.seconds = 0.0  # of one core
        self.log: list[dict[str, float]] = []

    def save(self, path: Path) -> None:
        """Write a checkpoint: all that a stopped training needs to go on."""
        state = {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "opt_g": self.opt_g.state_dict(),
            "opt_d": self.opt_d.state_dict(),
            "random": self.rng.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        utils.write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint that `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.average.load_state_dict(state["average"])
        self.opt_g.load_state_dict(state["opt_g"])
        self.opt_d.load_state_dict(state["opt_d"])
        self.rng.set_state(state["random"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.log = state["log"]

    def train_step(self, real: RealImages) -> dict[str, float]:
        """One update of the discriminator, then one of the generator on the same fakes.

        Returns the losses, and the discriminator's mean scores of the real images and the fakes.
        """
        self.discriminator.gain = FIRST_GAIN if self.step < GAIN_STEP else LATER_GAIN
        counts = {"street": STREET_BATCH, "handwritten": HANDWRITTEN_BATCH}
        images, labels = real.batch(counts, self.rng)
        with utils.autocast(CPU):
            fakes = self.generator(noise(BATCH, self.rng), one_hot(labels), 1.0).float()
            both = torch.cat([images, fakes.detach()])
            scores = self.discriminator(both, labels.repeat(2)).float()
        on_real, on_fake = scores.chunk(2)
        loss_d = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()

        self.discriminator.requires_grad_(False)
        with utils.autocast(CPU):
            scores = self.discriminator(fakes, labels).float()
            logits = self.guide(fakes).float()
        class_loss = F.cross_entropy(logits, labels)
        loss_g = -scores.mean() + CLASS_WEIGHT * class_loss
        self.opt_g.zero_grad()
        loss_g.backward()
        self.opt_g.step()
        self.discriminator.requires_grad_(True)

        self.step += 1
        self.update_average()
        return {
            "loss_d": loss_d.item(),
            "loss_g": loss_g.item(),
            "class_loss": class_loss.item(),
            "d_real": on_real.mean().item(),
            "d_fake": on_fake.mean().item(),
        }

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards the generator's; at first they average few steps."""
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        weights = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, latest in weights:
            average.lerp_(latest, 1 - decay)
        buffers = zip(self.average.buffers(), self.generator.buffers(), strict=True)
        for average, latest in buffers:
            average.copy_(latest)


def log_row(step: int, measured: list[dict[str, float]]) -> dict[str, float]:
    """What the log says of the steps since its last entry: the means of what `train_step` gave."""
    row: dict[str, float] = {"step": step}
    for name in measured[0]:
        row[name] = round(statistics.mean(entry[name] for entry in measured), 4)
    return row


def save_snapshot(trainer: Trainer, runs: Path) -> None:
    """Keep the raw and the averaged generator of this step, to be measured at the end."""
    states = {
        "generator": trainer.generator.state_dict(),
        "average": trainer.average.state_dict(),
    }
    path = runs / f"snapshot-{trainer.step:06d}.pt"
    utils.write_atomically(path, lambda temporary: torch.save(states, temporary))


def train(trainer: Trainer, real: RealImages, runs: Path) -> None:
    """Train up to STEPS, with a snapshot every SNAPSHOT_EVERY steps.

    A log entry and a checkpoint come every LOG_EVERY steps.
    """
    start = time.process_time() - trainer.seconds  # as if nothing had interrupted it
    measured: list[dict[str, float]] = []
    while trainer.step < STEPS:
        measured.append(trainer.train_step(real))
        # Before the checkpoint: a run that goes on from there would not come by here again.
        if trainer.step % SNAPSHOT_EVERY == 0:
            save_snapshot(trainer, runs)
        if trainer.step % LOG_EVERY == 0:
            row = log_row(trainer.step, measured)
            measured = []
            trainer.log.append(row)
            trainer.seconds = time.process_time() - start
            trainer.save(runs / "checkpoint.pt")
            print(f"{trainer.seconds:.0f} s", row, flush=True)
    trainer.seconds = time.process_time() - start


# ---- measuring -----------------------------------------------------------------------


@torch.no_grad()
def settle_spectral_norms(model: BigGAN) -> None:
    """Bring the power iterations of the spectral norms to rest; leave `model` in train mode."""
    model.train()
    z = noise(CLASSES, torch.Generator().manual_seed(STATISTICS_SEED))
    for _ in range(20):
        model(z, one_hot(torch.arange(CLASSES)), 1.0)


@torch.no_grad()
def fill_statistics(model: BigGAN, rows: Iterable[int], per_class: int) -> None:
    """Fill rows of the batch-norm tables (row i: truncation i/50); leave `model` in eval mode.

    For each row, noise of that truncation goes through with only the batch norms in train mode, so
    that each stores what it sees. The same noise directions serve every row, so the tables vary
    smoothly with the truncation.
    """
    settle_spectral_norms(model)
    model.eval()
    labels = torch.arange(CLASSES).repeat(per_class)
    # Each conditional norm holds linear layers with spectral norms, which must stay as they are. So
    # only the norm's own `training` is set: norm.train() would reach them too.
    norms = [module for module in model.modules() if isinstance(module, TrainableBatchNorm)]
    for row in rows:
        rng = torch.Generator().manual_seed(STATISTICS_SEED)  # the same directions for all
        z = noise(len(labels), rng, truncation=row / 50)
        for norm in norms:
            norm.training = True
            norm.row = row
        # Norms in train mode take no notice of this truncation; the library refuses 0.
        model(z, one_hot(labels), 1.0)
    for norm in norms:
        norm.training = False
        norm.row = None


@torch.no_grad()
def sample(model: BigGAN, labels: Tensor, truncation: float, seed: int) -> Tensor:
    """Images of the classes `labels`, float N x 3 x 32 x 32 in -1..1; all are kept, good or bad."""
    z = noise(len(labels), torch.Generator().manual_seed(seed), truncation)
    batches = zip(z.split(250), one_hot(labels).split(250), strict=True)
    return torch.cat([model(part, classes, truncation) for part, classes in batches])


@torch.no_grad()
def features_and_accuracy(
    classifier: EvaluationClassifier, images: Tensor, labels: Tensor
) -> tuple[Tensor, float]:
    """Features (N x 64), and the percentage of `images` recognized as their class."""
    features = torch.cat([classifier.features(chunk) for chunk in images.split(250)])
    right = classifier.head(F.relu(features)).argmax(1) == labels
    return features, 100 * right.float().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features (N x D and M x D), each taken as a Gaussian.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, equation (6), in
    float64; the last trace from the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric.
    Raises ValueError for fewer than two rows or numbers that are not finite.
    """
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a and b must have two rows or more, and be finite")
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def quality(
    model: BigGAN, classifier: EvaluationClassifier, reference: dict[str, Tensor], truncation: float
) -> dict[str, float]:
    """For each role: percent of generated images recognized, their Fréchet distance to real ones.

    reference: features of real training images by role; as many images are generated.
    """
    result = {}
    for role, first in FIRST_CLASS.items():
        labels = first + torch.arange(10).repeat(len(reference[role]) // 10)
        images = sample(model, labels, truncation, seed=11)
        features, accuracy = features_and_accuracy(classifier, images, labels)
        result[f"recognized_{role}"] = round(accuracy, 2)
        result[f"frechet_{role}"] = round(frechet_distance(features, reference[role]), 2)
    return result


def reference_features(
    parts: dict[str, RealImages], classifier: EvaluationClassifier
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Features of real training images of each role, and the quality of real images.

    The distance is that of training to test images: what a perfect generator would come to.
    """
    reference, measures = {}, {}
    for role in FIRST_CLASS:
        train_batch = parts["train"].draw(role, FRECHET_IMAGES, torch.Generator().manual_seed(3))
        test_batch = parts["test"].draw(role, FRECHET_IMAGES, torch.Generator().manual_seed(4))
        reference[role], train_accuracy = features_and_accuracy(classifier, *train_batch)
        test_features, test_accuracy = features_and_accuracy(classifier, *test_batch)
        measures[f"recognized_{role}_train"] = round(train_accuracy, 2)
        measures[f"recognized_{role}_test"] = round(test_accuracy, 2)
        measures[f"frechet_{role}"] = round(frechet_distance(reference[role], test_features), 2)
    return reference, measures


def measure_snapshots(
    runs: Path, classifier: EvaluationClassifier, reference: dict[str, Tensor]
) -> list[dict]:
    """The quality of the raw and the averaged generator of every snapshot, at truncation 1.

    Of all snapshots in `runs`, those of an earlier training too.
    """
    entries = []
    for path in sorted(runs.glob("snapshot-*.pt")):
        entry: dict = {"step": int(path.stem.partition("-")[2])}
        for name, state in torch.load(path, weights_only=True).items():
            model = trainable_biggan(state)
            fill_statistics(model, [50], per_class=40)  # truncation 1 alone
            entry[name] = quality(model, classifier, reference, 1.0)
        entries.append(entry)
        print(json.dumps(entry), flush=True)
    return entries


def save_final(
    model: BigGAN, classifier: EvaluationClassifier, reference: dict[str, Tensor]
) -> dict:
    """Give `model` its statistics for every truncation, write digit_biggan.pt, and measure it."""
    fill_statistics(model, range(51), per_class=25)
    sha256 = round_and_save(model, WEIGHTS / "digit_biggan.pt")
    final = {}
    for truncation in (0.4, 0.7, 1.0):
        final[f"{truncation}"] = quality(model, classifier, reference, truncation)
    print(json.dumps(final), flush=True)
    return {"sha256": sha256, "final": final}


def settings_record(trainer: Trainer, trained_on: list[str]) -> dict:
    """The main settings of training and measuring, and what the training took, for the log."""
    return {
        "trained_on": trained_on,
        "steps": trainer.step,
        "core_minutes": round(trainer.seconds / 60, 1),
        "batch": [STREET_BATCH, HANDWRITTEN_BATCH],
        "lr_generator": LR_GENERATOR,
        "lr_discriminator": LR_DISCRIMINATOR,
        "betas": BETAS,
        "score_gain": [FIRST_GAIN, LATER_GAIN],
        "gain_step": GAIN_STEP,
        "class_weight": CLASS_WEIGHT,
        "ema_decay": EMA_DECAY,
        "guide_steps": GUIDE_STEPS,
        "evaluation_classifier_steps": EVALUATION_CLASSIFIER_STEPS,
        "images_compared": FRECHET_IMAGES,
        "machine": utils.describe_machine(),
    }


def main() -> None:
    """Train guide, generator and evaluation classifier, measure, replace the committed files."""
    os.environ.update(A3_PROFILE="full", A3_DATA="real")
    torch.set_num_threads(1)  # the same sums in the same order
    runs = utils.runs_folder() / "digit_biggan"
    runs.mkdir(parents=True, exist_ok=True)
    street, handwritten = utils.load_svhn(), utils.load_mnist()
    train_images = RealImages(street, handwritten, "train")
    test_images = RealImages(street, handwritten, "test")

    torch.manual_seed(SEED + 1)
    guide = load_or_train_classifier(
        guide_network(), train_images, GUIDE_STEPS, runs / "guide.pt", seed=1
    )
    trainer = Trainer(guide)
    checkpoint = runs / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"going on from step {trainer.step}", flush=True)
    train(trainer, train_images, runs)

    torch.manual_seed(SEED + 2)
    # Trained into the runs folder: the file in WEIGHTS is an earlier run's.
    classifier = load_or_train_classifier(
        EvaluationClassifier(),
        train_images,
        EVALUATION_CLASSIFIER_STEPS,
        runs / "evaluation_classifier.pt",
        seed=2,
    )
    sha256 = round_and_save(classifier, WEIGHTS / "evaluation_classifier.pt")

    parts = {"train": train_images, "test": test_images}
    reference, measures_of_real = reference_features(parts, classifier)
    print(json.dumps(measures_of_real), flush=True)
    trained_on = [describe_size(data) for data in (street, handwritten)]
    log: dict = {"settings": settings_record(trainer, trained_on)}
    log["real"] = measures_of_real
    log["snapshots"] = measure_snapshots(runs, classifier, reference)
    log |= save_final(trainer.average, classifier, reference)
    log["sha256_evaluation_classifier"] = sha256
    log["steps"] = trainer.log
    text = json.dumps(log, indent=1) + "\n"
    (WEIGHTS / "digit_biggan_log.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
