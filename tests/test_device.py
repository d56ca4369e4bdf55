"""A pretended GPU: no operation mixes tensors of two devices, and no step waits for the device.

Every tensor that is moved to "cuda" stays on the CPU but carries a mark. A TorchFunctionMode does
the moving and answers what `tensor.device` says; a TorchDispatchMode sees every operation, those of
the backward pass and of the optimizer too, and raises when marked and unmarked tensors meet.
"""

from functools import partial

import pytest
import torch
from conftest import noise_split
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import utils

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero", "numpy"}
MOVES = {"copy_", "_to_copy", "_pin_memory", "set_", "lift_fresh"}


def place(tensor):
    """True on the pretended GPU, False on the CPU, None where nobody can tell."""
    return getattr(tensor, "_on_gpu", False)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def mark(tree, where):
    for tensor in tensors(tree):
        tensor._on_gpu = where
    return tree


class Meeting(TorchDispatchMode):
    """Marks what operations make, counts the kernels of marked ones, and raises where both meet."""

    def __init__(self):
        super().__init__()
        self.kernels, self.backward, self.moving = 0, False, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = tensors((args, kwargs))
        places = {place(t) for t in given if t.ndim or place(t)}  # a number may come from the CPU
        name = func.overloadpacket.__name__
        if {True, False} <= places and not self.moving and name not in MOVES:
            shapes = [(place(t), tuple(t.shape)) for t in given]
            raise RuntimeError(f"{func} has tensors of two devices: {shapes}")
        if not self.moving:
            where = True in places or (None if not given and self.backward else False)
            inside = {id(t) for t in given}
            mark([t for t in tensors(out) if id(t) not in inside], where)
        self.kernels += True in places and not func.is_view and name not in {"detach", "alias"}
        return out


class Pretend(TorchFunctionMode):
    """Answers for the marked tensors as a GPU would."""

    def __init__(self):
        super().__init__()
        self.meeting, self.waits, self.stepping = Meeting(), [], False

    def __enter__(self):
        self.meeting.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.meeting.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        first = args[0] if args else None
        marked = isinstance(first, torch.Tensor) and place(first) is True
        if name == "__get__" and func == torch.Tensor.device.__get__:
            return CUDA if marked else CPU
        if name == "__set__" and func == torch.Tensor.data.__set__:
            func(*args)
            mark(first, place(args[1]))
            return None
        if marked and name in WAITS:
            self.waits.append(name)
            if name == "numpy":
                raise TypeError("can't convert cuda tensor to numpy; use Tensor.cpu() first")
        leaves = tree_leaves((args, kwargs))
        asked = [a for a in leaves if isinstance(a, torch.device)]
        if name == "to":  # also .to("cuda") and .to(other)
            asked += [torch.device(a) for a in leaves if isinstance(a, str)]
            asked += [CUDA if place(a) else CPU for a in tensors(args[1:])]
        elif name == "cpu":
            asked = [CPU]
        if not asked or name == "_parse_to":  # that one only reads arguments
            if name == "backward":
                self.meeting.backward = True
            out = func(*args, **kwargs)
            self.meeting.backward = False if name == "backward" else self.meeting.backward
            return out

        def real(leaf):
            return CPU if isinstance(leaf, torch.device) or isinstance(leaf, str) else leaf

        self.meeting.moving = True
        try:
            out = func(*tree_map(real, args), **tree_map(real, kwargs))
            if out is first and marked != (asked[0].type == "cuda"):
                out = out.clone()
        finally:
            self.meeting.moving = False
        return mark(out, asked[0].type == "cuda")


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setenv("A3_PRECISION", "fp32")  # autocast would ask the driver
    monkeypatch.setattr(utils, "default_device", lambda: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended GPU")
    with Pretend() as pretended:
        yield pretended


def test_the_pretended_device_is_noticed(pretend):
    """The check itself: it finds a mixture, forward and backward, and lets moves pass."""
    here, there = torch.ones(3, requires_grad=True), torch.ones(3).to("cuda")
    assert there.device.type == "cuda" and here.device.type == "cpu"
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    assert (here.to(there.device) * there).sum().device.type == "cuda"
    (here.to(CUDA) * there).sum().backward()
    assert (there * 2 + torch.tensor(1.0)).cpu().device.type == "cpu"
    assert torch.zeros(2, device=CUDA).device.type == "cuda"
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    layer = torch.nn.Linear(3, 2).to(CUDA)
    assert layer(there).device.type == "cuda"
    with pytest.raises(RuntimeError, match="two devices"):
        layer(torch.ones(3))


def steps_of(pretend, monkeypatch, nb):
    """Kernels of each step, by a spy on the notebook's loop."""
    counts, loop = [], nb.train_epoch

    def train_epoch(training, batches, loss_fn):
        def spy():
            kernels, waits = pretend.meeting.kernels, len(pretend.waits)
            for batch in batches:  # making the batch belongs to its step
                yield batch
                counts.append((pretend.meeting.kernels - kernels, pretend.waits[waits:]))
                kernels, waits = pretend.meeting.kernels, len(pretend.waits)

        return loop(training, spy(), loss_fn)

    monkeypatch.setitem(nb.train_single.__globals__, "train_epoch", train_epoch)
    monkeypatch.setitem(nb.train_single.__globals__, "device", CUDA)
    return counts


def test_single_and_multi_task_training_stay_on_the_device(nb, pretend, monkeypatch):
    counts = steps_of(pretend, monkeypatch, nb)
    a, b = (noise_split(utils, 40, 32, seed=n) for n in range(2))
    nb.train_single(a, b, "negatives", epochs=1, steps=2, run="gpu")
    single = counts[-1]
    for kind in nb.TwoHeads.KINDS:
        nb.train_multi([a, b], [b, a], ["negatives"] * 2, epochs=1, steps=2, run="gpu",
                       batch_norm=kind)  # fmt: skip
    print(f"kernels a step: single {single[0]}, two heads {[count for count, _ in counts[3::2]]}")
    assert all(waits == [] for _, waits in counts)
    assert single[0] < 130 and counts[-1][0] < 240  # launch-bound: few kernels is fast on a GPU


def test_embedding_step_and_evaluation_stay_on_the_device(nb, pretend, monkeypatch):
    counts = steps_of(pretend, monkeypatch, nb)
    digits, street = noise_split(utils, 60), noise_split(utils, 60, 32, channels=3)
    classifier = nb.StreetClassifier(n=8).to(CUDA)
    features = nb.street_features(classifier, street)
    assert not place(features)
    name = list(nb.VARIANTS)[-1]
    model, history = nb.train_embedding(
        name, classifier, digits, digits, features, street.labels, epochs=1, steps=2, size=20
    )
    print(f"kernels a step: embedding {counts[-1][0]}, waits {counts[-1][1]}")
    assert model(utils.to_float(street.images).to(CUDA)).device.type == "cuda"
    assert 0 <= history[-1]["val_top1"] <= 100


def test_loaders_keep_the_split_on_the_device(nb, pretend):
    split = noise_split(utils, 40)
    loader = nb.Loader(split, 8, augment=partial(nb.augment, nb.RECIPES["bold"]))
    assert place(loader.images) and place(loader.labels) and not place(split.images)
    for images, labels in nb.one_epoch(loader, 2, epoch=0):
        assert place(images) and place(labels)
    assert pretend.waits == []
