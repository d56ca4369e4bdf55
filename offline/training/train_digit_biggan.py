"""Trains the digit BigGAN of Question 3 and its evaluation classifier, on one CPU core.

    A3_DATA_ROOT=FOLDER python -m offline.training.train_digit_biggan

Run it in the project's folder.

Generator      pytorch-pretrained-biggan's BigGAN at 32 x 32, 20 classes (../digit_biggan.py)
Discriminator  residual, spectral norm, projection of the class (Miyato & Koyama 2018)
Loss           hinge (Lim & Ye 2017), plus a class term as in AC-GAN (Odena et al. 2017) from a
               guide: a classifier trained on real images beforehand and then frozen
For stability  two learning rates (Heusel et al. 2017), spectral norm (Miyato et al. 2018) and an
               exponential moving average of the generator's weights

Measures the raw and the averaged generator of every 500th step with the evaluation classifier,
which the generator never meets, and the final one by its classification accuracy score (CAS,
Ravuri & Vinyals 2019). Writes digit_biggan.pt, evaluation_classifier.pt and digit_biggan_log.json
into offline/weights. A stopped run goes on from its last checkpoint (A3_RUNS/digit_biggan).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
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
from offline.training.train_street_classifier import notebook, save_half, write_text

CPU = torch.device("cpu")
CLASSES = len(DIGIT_CLASSES)
STREET_BATCH, WRITTEN_BATCH = 40, 24  # SVHN is the harder set
BATCH = STREET_BATCH + WRITTEN_BATCH
LR_GENERATOR, LR_DISCRIMINATOR = 3e-4, 6e-4
BETAS = (0.0, 0.99)
# Gain of the discriminator's score, until GAIN_STEP and from then on. With 4 its hinge loss stood
# at 1.7 (2: nothing is told apart), with 12 it still did.
FIRST_GAIN, LATER_GAIN = 4.0, 12.0
GAIN_STEP = 2100
CLASS_WEIGHT = 0.5  # of the class term in the generator's loss
EMA_DECAY = 0.999
STEPS = 2600
LOG_EVERY, SNAPSHOT_EVERY = 100, 500  # steps
GUIDE_STEPS, EVALUATION_STEPS = 800, 1000  # batches of 128, of the two classifiers
CAS_IMAGES, CAS_EPOCHS = 20_000, 10
COMPARED = 2_000  # images on each side of a Fréchet distance
WORLDS = {"street": slice(0, 10), "handwritten": slice(10, 20)}  # the classes of each set
SEED = 0


def noise(count: int, generator: torch.Generator, truncation: float = 1.0) -> Tensor:
    """The library's truncated noise, count x 32: a normal cut to -2..2, times the truncation."""
    z = nn.init.trunc_normal_(torch.empty(count, Z_DIM), a=-2.0, b=2.0, generator=generator)
    return truncation * z


def one_hot(labels: Tensor) -> Tensor:
    """Class weights, N x 20, of pure classes."""
    return F.one_hot(labels, CLASSES).float()


# ---- real images ---------------------------------------------------------------------


class RealImages:
    """One part ('train' or 'test') of both sets, MNIST padded to 32 x 32 as three equal channels.

    Labels are those of DIGIT_CLASSES: 0 to 9 for SVHN, 10 to 19 for MNIST.
    """

    def __init__(self, street: utils.DigitData, handwritten: utils.DigitData, part: str) -> None:
        written = getattr(handwritten, part)
        self.splits = {
            "street": getattr(street, part),
            "handwritten": utils.Split(F.pad(written.images, (2, 2, 2, 2)), written.labels),
        }

    def draw(self, world: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` random images, float N x 3 x 32 x 32 in -1..1, and their classes."""
        split = self.splits[world]
        index = torch.randint(len(split), (count,), generator=generator)
        images = utils.to_float(split.images[index]).expand(-1, 3, -1, -1)
        return images, split.labels[index] + WORLDS[world].start

    def batch(self, street: int, written: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """So many images of each set, SVHN first."""
        street_images, street_labels = self.draw("street", street, generator)
        written_images, written_labels = self.draw("handwritten", written, generator)
        images = torch.cat([street_images, written_images])
        labels = torch.cat([street_labels, written_labels])
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
        if name.endswith("weight_orig"):
            nn.init.orthogonal_(weight)
    nn.init.normal_(model.embeddings.weight, std=0.7)
    nn.init.ones_(model.generator.bn.weight)
    nn.init.zeros_(model.generator.bn.bias)


def trainable_biggan(state: dict[str, Tensor] | None = None) -> BigGAN:
    """The library's BigGAN at our size in train mode, with random weights or `state`.

    (copy.deepcopy cannot copy a module with spectral norm once it has run.)
    """
    model = untrained_digit_biggan()
    for module in model.modules():
        if isinstance(module, BigGANBatchNorm):
            module.__class__ = TrainableBatchNorm  # the library builds the layers, ours can train
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

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gain = FIRST_GAIN
        self.blocks = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            Block(width, 2 * width, down=True),
            Block(2 * width, 4 * width, down=True),
            Block(4 * width, 4 * width, down=False),
        )
        self.score = spectral_norm(nn.Linear(4 * width, 1))
        self.project = spectral_norm(nn.Embedding(CLASSES, 4 * width))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = F.relu(self.blocks(images)).sum((2, 3))
        return self.gain * (self.score(h)[:, 0] + (h * self.project(labels)).sum(1))


def guide_network(width: int = 32) -> nn.Sequential:
    """The guide: N x 3 x 32 x 32 in -1..1 to N x 20 logits."""
    return nn.Sequential(
        *conv_norm_relu(3, width, kernel=5),
        nn.MaxPool2d(2),
        *conv_norm_relu(width, 2 * width, kernel=5),
        nn.MaxPool2d(2),
        *conv_norm_relu(2 * width, 4 * width),
        *conv_norm_relu(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def train_classifier(
    model: nn.Module, real: RealImages, steps: int, path: Path, seed: int
) -> nn.Module:
    """Trains `model` to name the class of real images, or loads it when `path` is there.

    AdamW, one cycle, label smoothing, small random rotations, shifts, zooms and shears.
    """
    model = model.to(memory_format=torch.channels_last)
    if path.exists():
        return utils.load_weights(model, path)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        images, labels = real.batch(88, 40, generator)
        images = notebook.random_affine(images, generator, (10, 0.05, 0.1, 0.1))
        with utils.autocast(CPU):
            logits = model(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_half(model, path)
    return model


# ---- training of the generator -------------------------------------------------------


def flat(model: nn.Module) -> Tensor:
    """All parameters in one long row."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Trainer:
    """Both networks, their optimizers, the moving average, the log, and where they stand."""

    def __init__(self, guide: nn.Module) -> None:
        torch.manual_seed(SEED)
        self.guide = guide
        self.generator = trainable_biggan()
        self.average = trainable_biggan(self.generator.state_dict())
        self.discriminator = Discriminator().to(memory_format=torch.channels_last)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), LR_GENERATOR, BETAS)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), LR_DISCRIMINATOR, BETAS)
        self.random = torch.Generator().manual_seed(SEED)
        self.step = 0
        self.seconds = 0.0  # of one core
        self.log: list[dict[str, float]] = []

    def save(self, path: Path) -> None:
        state = {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "opt_g": self.opt_g.state_dict(),
            "opt_d": self.opt_d.state_dict(),
            "random": self.random.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        utils.write_atomically(path, lambda part: torch.save(state, part))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.average.load_state_dict(state["average"])
        self.opt_g.load_state_dict(state["opt_g"])
        self.opt_d.load_state_dict(state["opt_d"])
        self.random.set_state(state["random"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.log = state["log"]

    def train_step(self, real: RealImages) -> dict[str, float]:
        """One update of the discriminator, then one of the generator on the same fakes."""
        self.discriminator.gain = FIRST_GAIN if self.step < GAIN_STEP else LATER_GAIN
        images, labels = real.batch(STREET_BATCH, WRITTEN_BATCH, self.random)
        with utils.autocast(CPU):
            fakes = self.generator(noise(BATCH, self.random), one_hot(labels), 1.0).float()
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
        """Moves the averaged weights towards the generator's; at first the average is short."""
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, latest in pairs:
            average.lerp_(latest, 1 - decay)
        for average, latest in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            average.copy_(latest)


def train(trainer: Trainer, real: RealImages, steps: int, runs: Path) -> None:
    """Trains up to `steps`; a checkpoint every 100 steps and a snapshot every 500.

    The log holds, every 100 steps, the means of what `train_step` gives and how far (Euclidean)
    the weights of each network have moved since the entry before.
    """
    networks = {
        "generator": trainer.generator,
        "average": trainer.average,
        "discriminator": trainer.discriminator,
    }
    sums: dict[str, float] = {}
    before = {name: flat(network) for name, network in networks.items()}
    start = time.process_time() - trainer.seconds  # as if nothing had interrupted it
    while trainer.step < steps:
        for name, value in trainer.train_step(real).items():
            sums[name] = sums.get(name, 0.0) + value / LOG_EVERY
        if trainer.step % LOG_EVERY == 0:
            after = {name: flat(network) for name, network in networks.items()}
            for name in networks:
                sums[f"moved_{name}"] = (after[name] - before[name]).norm().item()
            row = {name: round(value, 4) for name, value in sums.items()}
            trainer.log.append({"step": trainer.step} | row)
            before, sums = after, {}
            trainer.seconds = time.process_time() - start
            trainer.save(runs / "checkpoint.pt")
        if trainer.step % SNAPSHOT_EVERY == 0:
            states = {
                "generator": trainer.generator.state_dict(),
                "average": trainer.average.state_dict(),
            }
            torch.save(states, runs / f"snapshot-{trainer.step:06d}.pt")
            print(f"{trainer.seconds:.0f} s", trainer.log[-1], flush=True)


# ---- measuring -----------------------------------------------------------------------


@torch.no_grad()
def standing_statistics(model: BigGAN, rows: range, per_class: int, seed: int = 7) -> None:
    """Fills rows of the batch-norm tables (row i: truncation i/50); leaves `model` in eval mode.

    The same noise directions serve every row, so the tables vary smoothly with the truncation.
    """
    labels = torch.arange(CLASSES).repeat(per_class)
    model.train()
    for _ in range(20):  # the spectral norms' power iterations settle
        z = noise(CLASSES, torch.Generator().manual_seed(seed))
        model(z, one_hot(labels[:CLASSES]), 1.0)
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, TrainableBatchNorm)]
    for row in rows:
        z = noise(len(labels), torch.Generator().manual_seed(seed), row / 50)
        for norm in norms:
            norm.training, norm.row = True, row
        model(z, one_hot(labels), max(row, 1) / 50)  # the library takes no truncation of 0
    for norm in norms:
        norm.training, norm.row = False, None


@torch.no_grad()
def sample(model: BigGAN, labels: Tensor, truncation: float, seed: int) -> Tensor:
    """Images of the classes `labels`, float N x 3 x 32 x 32 in -1..1; none are left out."""
    z = noise(len(labels), torch.Generator().manual_seed(seed), truncation)
    batches = zip(z.split(250), one_hot(labels).split(250), strict=True)
    return torch.cat([model(part, classes, truncation) for part, classes in batches])


@torch.no_grad()
def features_and_right(
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
    model: BigGAN, classifier: EvaluationClassifier, real: dict[str, Tensor], truncation: float
) -> dict[str, float]:
    """Of each world: percent recognized, and Fréchet distance to as many real training images."""
    result = {}
    for world, classes in WORLDS.items():
        labels = torch.arange(classes.start, classes.stop).repeat(len(real[world]) // 10)
        images = sample(model, labels, truncation, seed=11)
        features, right = features_and_right(classifier, images, labels)
        result[f"recognized_{world}"] = round(right, 2)
        result[f"frechet_{world}"] = round(frechet_distance(features, real[world]), 2)
    return result


def train_and_test(
    model: nn.Module, train: utils.Split, test: utils.Split, epochs: int, seed: int = 0
) -> float:
    """Accuracy in percent on `test` of `model` trained on `train` (both gray).

    AdamW with one cycle, label smoothing 0.1, batches of 128, small random affine changes.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = model.train().to(memory_format=torch.channels_last)
    steps = epochs * math.ceil(len(train) / 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(train), generator=generator).split(128):
            images = utils.to_float(train.images[index])
            images = notebook.random_affine(images, generator, (10, 0.05, 0.1, 0.1))
            with utils.autocast(CPU):
                logits = model(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), train.labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return utils.percent_right(model.eval(), test, CPU)


def generated_split(model: BigGAN, world: str, count: int, seed: int = 23) -> utils.Split:
    """`count` generated images of one world at truncation 1, gray, labels 0 to 9."""
    digits = torch.arange(10).repeat(count // 10)
    images = sample(model, digits + WORLDS[world].start, 1.0, seed)
    rounded = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return notebook.gray(utils.Split(rounded, digits))


def report(
    trainer: Trainer, parts: dict[str, RealImages], classifier: nn.Module, runs: Path, out: Path
) -> dict:
    """Writes digit_biggan.pt (the averaged generator) and returns all measurements."""
    facts: dict = {"real": {}, "checkpoints": []}
    reference: dict[str, Tensor] = {}
    for world in WORLDS:
        drawn = {}
        for number, (part, real) in enumerate(parts.items()):
            images = real.draw(world, COMPARED, torch.Generator().manual_seed(3 + number))
            drawn[part], right = features_and_right(classifier, *images)
            facts["real"][f"recognized_{world}_{part}"] = round(right, 2)
        reference[world] = drawn["train"]
        facts["real"][f"frechet_{world}"] = round(frechet_distance(*drawn.values()), 2)
    print(json.dumps(facts["real"]), flush=True)

    for path in sorted(runs.glob("snapshot-*.pt")):
        entry: dict = {"step": int(path.stem.split("-")[1])}
        for name, state in torch.load(path, weights_only=True).items():
            model = trainable_biggan(state)
            standing_statistics(model, range(50, 51), per_class=40)
            entry[name] = quality(model, classifier, reference, 1.0)
        facts["checkpoints"].append(entry)
        print(json.dumps(entry), flush=True)

    # The weights to keep: the average, with statistics for every truncation, rounded to float16.
    model = trainer.average
    standing_statistics(model, range(51), per_class=25)
    facts["sha256"] = save_half(model, out / "digit_biggan.pt")
    truncations = (0.4, 0.7, 1.0)
    facts["final"] = {f"{t}": quality(model, classifier, reference, t) for t in truncations}
    print(json.dumps(facts["final"]), flush=True)
    return facts


def write_log(settings: dict, facts: dict, steps: list[dict], path: Path) -> None:
    """Writes digit_biggan_log.json: settings, measurements, and one line for every 100 steps."""
    rows = ",\n".join(json.dumps(row) for row in steps)
    head = json.dumps({"settings": settings} | facts, indent=1)[:-2]
    write_text(path, f'{head},\n "steps": [\n{rows}\n]\n}}\n')


def settings_record(trainer: Trainer, trained_on: list[str]) -> dict:
    """All that decides the weights, for the log."""
    return {
        "trained_on": trained_on,
        "steps": trainer.step,
        "core_minutes": round(trainer.seconds / 60, 1),
        "batch": [STREET_BATCH, WRITTEN_BATCH],
        "lr_generator": LR_GENERATOR,
        "lr_discriminator": LR_DISCRIMINATOR,
        "betas": BETAS,
        "score_gain": [FIRST_GAIN, LATER_GAIN],
        "gain_step": GAIN_STEP,
        "class_weight": CLASS_WEIGHT,
        "ema_decay": EMA_DECAY,
        "guide_steps": GUIDE_STEPS,
        "evaluation_steps": EVALUATION_STEPS,
        "images_compared": COMPARED,
        "cas_images": CAS_IMAGES,
        "cas_epochs": CAS_EPOCHS,
        "machine": utils.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    out = arguments.out
    os.environ.update(A3_PROFILE="full", A3_DATA="real")
    torch.set_num_threads(1)  # the same sums in the same order
    runs = utils.runs_folder() / "digit_biggan"
    runs.mkdir(parents=True, exist_ok=True)

    street, handwritten = utils.load_svhn(), utils.load_mnist()
    parts = {part: RealImages(street, handwritten, part) for part in ("train", "test")}
    torch.manual_seed(SEED + 1)
    guide = train_classifier(guide_network(), parts["train"], GUIDE_STEPS, runs / "guide.pt", 1)
    trainer = Trainer(guide)
    if (runs / "checkpoint.pt").exists():
        trainer.load(runs / "checkpoint.pt")
        print(f"going on from step {trainer.step}", flush=True)
    train(trainer, parts["train"], arguments.steps, runs)

    torch.manual_seed(SEED + 2)
    path = out / "evaluation_classifier.pt"
    classifier = train_classifier(
        EvaluationClassifier(), parts["train"], EVALUATION_STEPS, path, seed=2
    )
    facts = report(trainer, parts, classifier, runs, out)
    facts["sha256_evaluation_classifier"] = utils.file_sha256(path)
    settings = settings_record(trainer, [utils.describe_size(d) for d in (street, handwritten)])
    write_log(settings, facts, trainer.log, out / "digit_biggan_log.json")
    facts["cas"] = {}
    for world in WORLDS:
        generated = generated_split(trainer.average, world, CAS_IMAGES)
        test = notebook.gray(parts["test"].splits[world])
        model = nn.Sequential(notebook.base_trunk(), notebook.task_head())
        facts["cas"][world] = round(train_and_test(model, generated, test, CAS_EPOCHS), 2)
        print(json.dumps(facts["cas"]), flush=True)
        write_log(settings, facts, trainer.log, out / "digit_biggan_log.json")


if __name__ == "__main__":
    main()
