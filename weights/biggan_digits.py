"""Trains the digit BigGAN of Question 3 on a CPU: `python weights/biggan_digits.py`.

One generator, twenty classes: 0-9 street numbers (our renderer, digits without neighbours),
10-19 handwritten digits (scikit-learn's load_digits, training part), all as 32 x 32 colour
pictures in -1..1.

Generator      the BigGAN class of pytorch-pretrained-biggan, channel width 16
Discriminator  residual, spectral norm, projection of the class (Miyato & Koyama 2018)
Loss           hinge (Lim & Ye 2017), plus a class term as in AC-GAN (Odena et al. 2017), but from
               a guide: a classifier trained on real pictures beforehand and then frozen
Against the circling of Question 2: two learning rates (TTUR, Heusel et al. 2017), spectral norm
               (Miyato et al. 2018) and an exponential moving average of the generator

When the training is over, a judge measures both the raw and the averaged generator of every 500th
step: a second classifier of real pictures, of another architecture, that the generator never met.
Stopped runs go on from the last checkpoint (`runs/biggan_digits/`, every 500 steps). Writes
biggan_digits.pt, judge_digits.pt and biggan_digits_log.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_pretrained_biggan import BigGAN
from pytorch_pretrained_biggan.model import BigGANBatchNorm
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import utils  # noqa: E402

SEED = 0
STEPS = 6000
STREET_BATCH, WRITTEN_BATCH = 40, 24  # street numbers are the harder ones
BATCH = STREET_BATCH + WRITTEN_BATCH
LR_GENERATOR, LR_DISCRIMINATOR, BETAS = 3e-4, 6e-4, (0.0, 0.99)
SCORE_GAIN = 4.0  # of the discriminator's score
CLASS_WEIGHT = 1.0  # of the class term in the generator's loss
EMA_DECAY = 0.998
EVERY, CHECKPOINT_EVERY = 50, 500  # steps between entries of the log
CLASSIFIER_STEPS = 1000  # of the guide, and of the judge
STREET_PICTURES = {"train": (16_000, 21), "test": (4_000, 22)}  # rendered, and with which seed
STREET_KEEP = 0.5  # the share of them that we keep, the clearest
CPU = torch.device("cpu")
MODEL_NAME = "digit BigGAN (32 x 32, trained in this project)"


# ---- real pictures -------------------------------------------------------------------


def clear_pictures(images: Tensor, labels: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The share `keep` of each digit's pictures that show it best; no classifier has a say in it.

    Best means strong edges in the middle (24 x 16 pixels) and few in the columns left and right of
    it: that drops the faint and the blurred.
    """

    def edges(part: Tensor) -> Tensor:
        return part.diff(dim=1).abs().mean((1, 2)) + part.diff(dim=2).abs().mean((1, 2))

    gray = images[:, :, 4:28].float().mean(1) / 255
    sides = (edges(gray[:, :, :7]) + edges(gray[:, :, 25:])) / 2
    clarity = edges(gray[:, :, 8:24]) - sides
    chosen = []
    for digit in range(10):
        of_digit = (labels == digit).nonzero()[:, 0]
        best = clarity[of_digit].argsort(descending=True)[: int(keep * len(of_digit))]
        chosen.append(of_digit[best])
    chosen = torch.cat(chosen).sort().values
    return images[chosen], labels[chosen]


def street_pictures(part: str, keep: float) -> tuple[Tensor, Tensor]:
    """The clearest street numbers, float N x 3 x 32 x 32 in -1..1, and labels 0..9."""
    count, seed = STREET_PICTURES[part]
    rendered = utils.render_street_numbers(count, seed, lengths=(1.0,))
    images, labels = clear_pictures(*rendered, keep)
    return images.float() / 127.5 - 1, labels


def handwritten_pictures(part: str) -> tuple[Tensor, Tensor]:
    """Handwritten digits, float N x 3 x 32 x 32 in -1..1, and labels 10..19."""
    split = getattr(utils.load_handwritten(), part).padded(32)
    return split.images.expand(-1, 3, -1, -1).float() / 127.5 - 1, split.labels + 10


def augment_handwriting(images: Tensor, rng: torch.Generator) -> Tensor:
    """Larger, with a little rotation, scale, slant and shift of each picture's own.

    The augmented pictures are the real distribution of the handwritten classes: 1,437 are few.
    """
    n = len(images)
    angle, slant = (0.11 * torch.randn(n, generator=rng) for _ in range(2))
    scale = 0.8 + 0.06 * torch.randn(n, generator=rng)
    shift = 0.05 * torch.randn(n, 2, generator=rng)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos(), -angle.sin() + slant
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


class RealPictures:
    """Batches of real pictures: so many street numbers, so many handwritten digits, augmented."""

    def __init__(self, part: str, keep: float = STREET_KEEP) -> None:
        self.street = street_pictures(part, keep)
        self.handwritten = handwritten_pictures(part)

    def batch(self, street: int, written: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        picks = [
            torch.randint(len(data[1]), (count,), generator=rng)
            for data, count in ((self.street, street), (self.handwritten, written))
        ]
        images = [self.street[0][picks[0]]]
        images.append(augment_handwriting(self.handwritten[0][picks[1]], rng))
        labels = torch.cat([self.street[1][picks[0]], self.handwritten[1][picks[1]]])
        return torch.cat(images), labels


# ---- networks ------------------------------------------------------------------------


class TrainableBatchNorm(BigGANBatchNorm):
    """The library's batch norm, which only knows stored statistics, made trainable.

    In train mode it uses the batch's statistics; with `row` set it also stores them as that row
    of the table (one row for each truncation). In eval mode it is the library's, key for key.
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


def trainable_biggan(state: dict[str, Tensor] | None = None) -> BigGAN:
    """The library's BigGAN at our size, in train mode: orthogonally initialised, or a given state.

    (copy.deepcopy cannot copy a module with spectral norm once it has run.)
    """
    model = BigGAN(utils.digit_biggan_config())
    for module in model.modules():
        if isinstance(module, BigGANBatchNorm):
            module.__class__ = TrainableBatchNorm
    if state is not None:
        model.load_state_dict(state)
    else:
        for name, weight in model.named_parameters():
            if name.endswith("weight_orig"):
                nn.init.orthogonal_(weight)
        nn.init.normal_(model.embeddings.weight, std=0.7)
        nn.init.ones_(model.generator.bn.weight)
        nn.init.zeros_(model.generator.bn.bias)
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
    """Score of a picture given its class: SCORE_GAIN times w.h + e_y.h.

    Spectral norm keeps w and every e_y at length 1 or less. Without a gain (and without the guide)
    the hinge loss stood at 1.75 after 1,000 steps, where 2 means no discrimination; with both at
    1.36, and the digits were legible.
    """

    def __init__(self, width: int = 32, classes: int = 20) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            Block(width, 2 * width, down=True),
            Block(2 * width, 4 * width, down=True),
            Block(4 * width, 4 * width, down=False),
        )
        self.score = spectral_norm(nn.Linear(4 * width, 1))
        self.project = spectral_norm(nn.Embedding(classes, 4 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.blocks(x)).sum((2, 3))
        return SCORE_GAIN * (self.score(h)[:, 0] + (h * self.project(y)).sum(1))


def guide_network(width: int = 32, classes: int = 20) -> nn.Sequential:
    """The guide: N x 3 x 32 x 32 in -1..1 to N x 20 logits. Not the judge's architecture."""

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, width, 5), nn.MaxPool2d(2), *block(width, 2 * width, 5), nn.MaxPool2d(2),
        *block(2 * width, 4 * width, 3), *block(4 * width, 4 * width, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def noise(n: int, rng: torch.Generator, truncation: float = 1.0) -> Tensor:
    """The library's truncated noise: a normal cut to -2..2, times the truncation."""
    z = torch.empty(n, utils.DIGIT_Z)
    return truncation * nn.init.trunc_normal_(z, a=-2.0, b=2.0, generator=rng)


def mixed_precision():
    """bf16 where the processor has it, as in the notebook's own training."""
    return utils.autocast(CPU, utils.precision_policy(CPU))


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, 20).float()


# ---- the judge and the measures ------------------------------------------------------


def train_classifier(
    model: nn.Module, real: RealPictures, steps: int, rng: torch.Generator
) -> nn.Module:
    """Trains `model` to name the class of real pictures; it never sees a generated one."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        images, labels = real.batch(64, 64, rng)
        with mixed_precision():
            logits = model(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judged(judge: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N x 64) and predicted classes (N) of many pictures."""
    features = torch.cat([judge.features(chunk) for chunk in images.split(256)])
    return features, judge.head(F.relu(features)).argmax(1)


def standing_statistics(model: BigGAN, rows: range, per_class: int, seed: int = 7) -> None:
    """Fills rows of the batch-norm tables (row i: truncation i/50) and leaves the model in eval.

    The same noise directions serve every row, so the tables vary smoothly with the truncation.
    """
    labels = torch.arange(20).repeat(per_class)
    model.train()
    with torch.no_grad():
        for _ in range(20):  # the spectral norms' power iterations settle
            model(noise(20, torch.Generator().manual_seed(seed)), one_hot(labels[:20]), 1.0)
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, TrainableBatchNorm)]
        for row in rows:
            z = noise(len(labels), torch.Generator().manual_seed(seed), row / 50)
            for norm in norms:
                norm.training, norm.row = True, row
            model(z, one_hot(labels), max(row, 1) / 50)
        for norm in norms:
            norm.training, norm.row = False, None


@torch.no_grad()
def sample(model: BigGAN, labels: Tensor, truncation: float, seed: int) -> Tensor:
    z = noise(len(labels), torch.Generator().manual_seed(seed), truncation)
    pairs = zip(z.split(250), one_hot(labels).split(250), strict=True)
    return torch.cat([model(z, c, truncation) for z, c in pairs])


def quality(
    model: BigGAN, judge: nn.Module, real: dict, per_class: int, truncation: float = 1.0
) -> dict[str, float]:
    """Class accuracy (percent) and Frechet distance to the real training pictures, per domain."""
    labels = torch.arange(20).repeat(per_class)
    features, predicted = judged(judge, sample(model, labels, truncation, seed=11))
    result = {"class_acc": 100 * (predicted == labels).float().mean().item()}
    for name, chosen in (("street", labels < 10), ("handwritten", labels >= 10)):
        right = (predicted == labels)[chosen].float().mean().item()
        result[f"class_acc_{name}"] = 100 * right
        result[f"frechet_{name}"] = utils.frechet_distance(features[chosen], real[name])
    return result


def real_features(judge: nn.Module, real: RealPictures, rng: torch.Generator) -> dict:
    """Judge features of 4,000 real pictures a domain, and the judge's accuracy on them."""
    images, labels = real.batch(4000, 4000, rng)
    features, predicted = judged(judge, images)
    right = 100 * (predicted == labels).float()
    street = labels < 10
    return {
        "street": features[street],
        "handwritten": features[~street],
        "judge_acc_street": right[street].mean().item(),
        "judge_acc_handwritten": right[~street].mean().item(),
    }


# ---- training ------------------------------------------------------------------------


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Trainer:
    """Both networks, their optimizers, the moving average, the log, and where they stand."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.generator = trainable_biggan()
        self.average = trainable_biggan(self.generator.state_dict())
        self.discriminator = Discriminator().to(memory_format=torch.channels_last)
        self.guide = guide_network().to(memory_format=torch.channels_last).eval()
        adam = {"betas": BETAS}
        self.opt_g = torch.optim.Adam(self.generator.parameters(), LR_GENERATOR, **adam)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), LR_DISCRIMINATOR, **adam)
        self.rng = torch.Generator().manual_seed(SEED)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        self.parts = ("generator", "discriminator", "average", "guide", "opt_g", "opt_d")

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        state |= {"rng": self.rng.get_state(), "step": self.step, "seconds": self.seconds}
        state["log"] = self.log
        utils.write_atomically(path, lambda target: torch.save(state, target))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def train_step(self, real: RealPictures) -> dict[str, float]:
        """One update of the discriminator, then one of the generator on the same fakes."""
        images, labels = real.batch(STREET_BATCH, WRITTEN_BATCH, self.rng)
        with mixed_precision():
            fakes = self.generator(noise(BATCH, self.rng), one_hot(labels), 1.0).float()
            both = torch.cat([images.to(memory_format=torch.channels_last), fakes.detach()])
            scores = self.discriminator(both, labels.repeat(2)).float()
        on_real, on_fake = scores.chunk(2)
        loss_d = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()

        self.discriminator.requires_grad_(False)
        with mixed_precision():
            scores = self.discriminator(fakes, labels).float()
            logits = self.guide(fakes).float()
        class_loss = F.cross_entropy(logits, labels)
        loss_g = -scores.mean() + CLASS_WEIGHT * class_loss
        self.opt_g.zero_grad()
        loss_g.backward()
        self.opt_g.step()
        self.discriminator.requires_grad_(True)

        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            ours, theirs = list(self.average.parameters()), list(self.generator.parameters())
            torch._foreach_lerp_(ours, theirs, 1 - decay)
            for mean, now in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mean.copy_(now)
        figures = {"loss_d": loss_d, "loss_g": loss_g, "class_loss": class_loss}
        figures |= {"d_real": on_real.mean(), "d_fake": on_fake.mean()}
        return {name: value.item() for name, value in figures.items()}


def train(trainer: Trainer, real: RealPictures, steps: int, runs: Path) -> None:
    """Trains up to `steps`; logs every 50 steps, saves and keeps a snapshot every 500."""
    start = time.perf_counter() - trainer.seconds
    names = ("generator", "average", "discriminator")
    sums: dict[str, float] = {}
    before = {name: flat(getattr(trainer, name)) for name in names}
    while trainer.step < steps:
        for name, value in trainer.train_step(real).items():
            sums[name] = sums.get(name, 0.0) + value / EVERY
        if trainer.step % EVERY == 0:
            after = {name: flat(getattr(trainer, name)) for name in names}
            moved = {f"moved_{n}": (after[n] - before[n]).norm().item() for n in names}
            trainer.log.append({"step": trainer.step} | sums | moved)
            before, sums = after, {}
        if trainer.step % CHECKPOINT_EVERY == 0:
            trainer.seconds = time.perf_counter() - start
            both = {name: getattr(trainer, name).state_dict() for name in names[:2]}
            torch.save(both, runs / f"snapshot-{trainer.step:06d}.pt")
            trainer.save(runs / "checkpoint.pt")
            print(f"{trainer.seconds:.0f} s", trainer.log[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--classifier-steps", type=int, default=CLASSIFIER_STEPS)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "biggan_digits")
    args = parser.parse_args()
    os.environ |= {"A3_DATA": "embedded", "A3_PROFILE": "full"}  # what utils' loaders give
    torch.set_num_threads(1)  # the same sums in the same order
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    trainer, checkpoint = Trainer(), args.runs / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"going on from step {trainer.step}", flush=True)
    real = RealPictures("train")
    if trainer.step == 0:
        rng = torch.Generator().manual_seed(SEED + 2)
        train_classifier(trainer.guide, real, args.classifier_steps, rng)
    trainer.guide.requires_grad_(False)
    train(trainer, real, args.steps, args.runs)

    # Only now the judge: a classifier of real pictures, trained on the unclear ones as well.
    torch.manual_seed(SEED + 1)
    judge = utils.DigitJudge().to(memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(SEED + 1)
    train_classifier(judge, RealPictures("train", keep=1.0), args.classifier_steps, rng)
    # What the notebook will load are the rounded weights, so those are the ones we measure.
    utils.save_half(judge, args.out / "judge_digits.pt")
    utils.load_weights(judge, args.out / "judge_digits.pt")
    reference = real_features(judge, real, torch.Generator().manual_seed(3))
    other = real_features(judge, RealPictures("test"), torch.Generator().manual_seed(4))
    facts: dict = {"street_version": utils.STREET_VERSION}
    facts["judge_on_test"] = {k: v for k, v in other.items() if k.startswith("judge")}
    for name in ("street", "handwritten"):
        facts[f"frechet_real_{name}"] = utils.frechet_distance(reference[name], other[name])
    print(json.dumps(facts), flush=True)

    facts["checkpoints"] = []
    for path in sorted(args.runs.glob("snapshot-*.pt")):
        entry: dict = {"step": int(path.stem.split("-")[1])}
        for name, state in torch.load(path, weights_only=True).items():
            model = trainable_biggan(state)
            standing_statistics(model, range(50, 51), per_class=40)
            entry[name] = quality(model, judge, reference, per_class=100)
        facts["checkpoints"].append(entry)
        print(json.dumps(entry), flush=True)

    # The weights to keep: the average, with statistics for every truncation, as fp16.
    model = trainer.average
    standing_statistics(model, range(51), per_class=50)
    utils.save_half(model, args.out / "biggan_digits.pt")
    utils.load_weights(model, args.out / "biggan_digits.pt")
    facts["final"] = {
        f"{t:.1f}": quality(model, judge, reference, 200, t) for t in (0.2, 0.4, 0.6, 0.8, 1.0)
    }
    settings = {"steps": trainer.step, "seconds": round(trainer.seconds), "batch": BATCH}
    settings |= {"lr_generator": LR_GENERATOR, "lr_discriminator": LR_DISCRIMINATOR}
    settings |= {"precision": str(utils.precision_policy(CPU))}
    settings |= {"score_gain": SCORE_GAIN}
    settings |= {"ema_decay": EMA_DECAY, "class_weight": CLASS_WEIGHT, "street_keep": STREET_KEEP}
    log = {"model": MODEL_NAME, "settings": settings} | facts | {"steps": trainer.log}
    (args.out / "biggan_digits_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(facts["final"]), flush=True)


if __name__ == "__main__":
    main()
