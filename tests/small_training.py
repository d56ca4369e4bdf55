"""A small training for the tests: the pieces that a notebook gives to `utils.fit`."""

import os

import torch
import torch.nn.functional as F
from torch import nn

import utils

STEPS = 4


def make_model(dropout=0.3):
    """Ten classes from eight numbers, with all that has a state: dropout and batch norm."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 10))


class Watch:
    """Notes the epochs that are trained, and can stop one; no fingerprint sees its state."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.epochs = []
        self.stop_at = None  # (epoch, step) at which a KeyboardInterrupt comes

    def __reduce_ex__(self, protocol):
        raise TypeError("not for fingerprints")


watch = Watch()


def batches(epoch):
    """Random inputs; the label is where the greatest of them stands."""
    watch.epochs.append(epoch)
    generator = utils.random_stream(0, epoch)
    for step in range(STEPS):
        if (epoch, step) == watch.stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 8, generator=generator)
        yield inputs, inputs.argmax(1)


def loss_fn(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels), {}


def train_epoch(training, batches, loss_fn):
    training.model.train()
    total = 0.0
    for batch in batches:
        loss, _ = loss_fn(training.model, batch)
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()
        total += loss.item()
    return {"loss": total / STEPS}


def train(model=None, batches=batches, loss=loss_fn, loop=train_epoch, **change):
    """The trained model and its history; `change` is of the plan."""
    model = model or make_model()
    settings = {"name": "Noise, seed 0", "epochs": 5, "lr": 1e-2, "schedule": "onecycle"}
    plan = utils.Plan(steps_per_epoch=STEPS, **settings | change)
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
    model, history = train(name=f"Noise, seed {seed}", seed=seed, epochs=3)
    return utils.fingerprint(model), rows(history), os.getpid(), torch.get_num_threads()
