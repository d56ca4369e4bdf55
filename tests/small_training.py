"""A small training for the tests: the pieces that a notebook gives to `utils.fit`."""

import os

import torch
import torch.nn.functional as F
from torch import nn

import utils

CPU = torch.device("cpu")
STEPS = 4


class Net(nn.Module):
    """Ten classes from eight numbers, with all that has a state: dropout and batch norm."""

    def __init__(self, dropout=0.3):
        super().__init__()
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x)


def make_model(dropout=0.3):
    torch.manual_seed(0)
    return Net(dropout)


class Watch:
    """Notes the epochs that are trained, and can spoil one; no fingerprint sees its state."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.epochs = []
        self.stop_at = None  # (epoch, step) at which a KeyboardInterrupt comes
        self.spoil_from = None  # (epoch, factor of the inputs)

    def __reduce_ex__(self, protocol):
        raise TypeError("not for fingerprints")


watch = Watch()


def batches(epoch):
    """Random inputs; the label is where the greatest of them stands."""
    watch.epochs.append(epoch)
    generator = utils.epoch_generator(0, epoch)
    for step in range(STEPS):
        if (epoch, step) == watch.stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 8, generator=generator)
        labels = inputs.argmax(1)
        if watch.spoil_from and epoch >= watch.spoil_from[0]:
            inputs = inputs * watch.spoil_from[1]
        yield inputs, labels


def loss_fn(model, batch):
    inputs, labels = batch
    logits = model(inputs).float()
    return F.cross_entropy(logits, labels), {"acc": (logits.argmax(1) == labels).float().mean()}


def train_epoch(training, batches, loss_fn):
    training.model.train()
    totals = {}
    for batch in batches:
        loss, metrics = loss_fn(training.model, batch)
        training.optimizer.zero_grad()
        training.scaler.scale(loss).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.scheduler.step()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0.0) + value
    return {name: float(total) / STEPS for name, total in totals.items()}


def length(model):
    """A figure that every weight decides."""
    return {"length": sum(p.detach().double().square().sum().item() for p in model.parameters())}


def train(model=None, batches=batches, loss=loss_fn, loop=train_epoch, **change):
    """The trained model and its history; `change` is of the plan."""
    model = model or make_model()
    settings = {"name": "Noise, seed 0", "epochs": 5, "lr": 1e-2, "schedule": "onecycle"}
    plan = utils.Plan(steps=STEPS, **settings | change)
    return model, utils.fit(loop, model, batches, loss, plan)


def rows(history):
    """A history without its times."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


def checkpoints():
    return sorted(utils.runs_folder().glob("*.pt"))


def train_and_name_process(seed):
    """A task of `run_parallel`: weights, history, process and threads of a training."""
    torch.manual_seed(seed)
    model, history = train(Net(), name=f"Noise, seed {seed}", seed=seed, epochs=3)
    return weights(model), rows(history), os.getpid(), torch.get_num_threads()
