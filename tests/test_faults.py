"""Bad input to the public functions: a ValueError that names the argument, never a wrong number.

The property tests draw good and bad values alike. Whatever is drawn, a function either answers
with what its docstring promises or raises a ValueError (TypeError where Python itself refuses)
whose text names one of its arguments.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils

FUZZ = settings(max_examples=150, deadline=None)
DTYPES = (torch.uint8, torch.int64, torch.int32, torch.float32, torch.bool)
numbers = st.one_of(
    st.integers(-3, 40), st.floats(-2, 40), st.sampled_from([math.nan, math.inf, -math.inf, 0, 1])
)


@st.composite
def tensors(draw, most_dims=4):
    shape = draw(st.lists(st.integers(0, 5), max_size=most_dims))
    dtype = draw(st.sampled_from(DTYPES))
    low, high = draw(st.sampled_from([(0, 2), (0, 10), (-3, 12)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randint(low, high, shape, generator=generator)
    return values.to(dtype)


def outcome(call, *names):
    """The call's answer, or None when it raised a ValueError that names one of `names`."""
    try:
        return call()
    except ValueError as error:
        assert any(name in str(error) for name in names), f"names none of {names}: {error}"
        return None


def good_split(count=20, channels=1, side=8):
    images = torch.arange(count * channels * side * side) % 256
    return utils.Split(
        images.view(count, channels, side, side).to(torch.uint8), torch.arange(count) % 10
    )


@FUZZ
@given(tensors(), tensors(2))
def test_a_split_is_right_or_refused(images, labels):
    split = outcome(lambda: utils.Split(images, labels), "images", "labels")
    if split:
        assert split.images.dtype == torch.uint8 and split.images.ndim == 4
        assert split.labels.dtype == torch.int64 and len(split.images) == len(split) > 0
        assert sum(split.counts()) == len(split) and len(split.counts()) == 10


@FUZZ
@given(st.one_of(st.lists(st.integers(-25, 25), max_size=8), st.lists(st.floats(0, 9), max_size=3),
                 st.booleans(), st.integers(0, 3)))  # fmt: skip
def test_taken_pictures_are_those_asked_for(indices):
    split = good_split()
    taken = outcome(lambda: split.take(indices), "indices", "empty")
    if taken:
        assert all(0 <= i < 20 for i in indices)  # none wrapped around from the end
        assert taken.labels.tolist() == [i % 10 for i in indices]


@FUZZ
@given(st.integers(-50, 50), st.integers(-50, 50))
def test_first_padded_and_validation_split(count, size):
    split = good_split()
    first = outcome(lambda: split.first(count), "count")
    assert (first is None) == (count < 1) and (first is None or len(first) == min(count, 20))
    padded = outcome(lambda: split.padded(size), "size")
    assert (padded is None) == (size < 8)
    data = utils.DigitData("toy", split, split, real=False)
    parts = outcome(lambda: utils.validation_split(data, count), "count")
    assert (parts is None) == (not 0 < count < 20)


@FUZZ
@given(tensors())
def test_conversions_take_their_own_kind_of_pictures(images):
    floats = outcome(lambda: utils.to_float(images), "images")
    if floats is not None:
        assert images.dtype == torch.uint8 and (floats.abs() <= 1).all()
    gray = outcome(lambda: utils.luma(images), "images")
    if gray is not None:
        assert gray.shape == (len(images), 1, *images.shape[2:])


@FUZZ
@given(tensors(), numbers, numbers, numbers, numbers)
def test_affine_is_finite_or_refused(images, degrees, shift, zoom, shear):
    bounds = {"degrees": degrees, "shift": shift, "zoom": zoom, "shear": shear}
    if 0 in images.shape:
        images = torch.zeros(2, 1, 4, 4)
    moved = outcome(
        lambda: utils.random_affine(images, torch.Generator().manual_seed(0), **bounds),
        "images", *bounds,
    )  # fmt: skip
    if moved is not None:
        assert moved.shape == images.shape and moved.isfinite().all()
        assert images.min() - 1e-5 <= moved.min() and moved.max() <= images.max() + 1e-5


@FUZZ
@given(tensors(3), tensors(2), st.booleans())
def test_accuracy_is_a_percentage_or_refused(logits, labels, poison):
    logits = logits.float()
    if poison and logits.numel():
        logits.view(-1)[0] = math.nan
    share = outcome(lambda: utils.accuracy(logits, labels), "logits", "labels")
    if share is not None:
        assert 0 <= share <= 100 and not poison
        expected = (logits.numpy().argmax(1) == labels.numpy()).mean() * 100
        assert share == pytest.approx(expected)


@FUZZ
@given(st.lists(numbers, max_size=5))
def test_mean_and_std_of_numbers(values):
    summary = outcome(lambda: utils.mean_and_std(values), "values")
    assert (summary is None) == (not values or not np.isfinite(values).all())
    if summary:
        assert min(values) - 1e-9 <= summary["mean"] <= max(values) + 1e-9


@FUZZ
@given(tensors(3), tensors(3), st.booleans())
def test_frechet_distance_is_a_distance_or_refused(a, b, poison):
    a, b = a.double(), b.double()
    if poison and a.numel():
        a.view(-1)[0] = math.inf
    distance = outcome(lambda: utils.frechet_distance(a, b), "a and b")
    if distance is not None:
        rounding = 1e-6 * (1 + max(a.abs().max(), b.abs().max()).item() ** 2)
        assert -rounding <= distance < math.inf
        assert distance == pytest.approx(utils.frechet_distance(b, a), abs=rounding)


@FUZZ
@given(st.integers(-3, 30), st.integers(-2, 30))
def test_loader_gives_every_picture_whatever_the_batch_size(count, batch_size):
    if count < 1:
        return
    split = good_split(count)
    loader = outcome(lambda: utils.Loader(split, batch_size), "batch_size")
    assert (loader is None) == (batch_size < 1)
    if loader:
        sizes = [len(labels) for _, labels in loader.epoch(0)]
        assert sum(sizes) == count and len(sizes) == len(loader) and max(sizes) <= batch_size


@settings(max_examples=40, deadline=None)
@given(st.integers(-2, 3), st.lists(numbers, max_size=5))
def test_rendering_gives_pictures_or_refuses(count, lengths):
    made = outcome(
        lambda: utils.render_street_numbers(count, 0, lengths=lengths), "count", "lengths"
    )
    if made:
        assert utils.Split(*made) and len(made[1]) == count >= 1
        assert 1 <= len(lengths) <= 4 and all(0 <= share < math.inf for share in lengths)


def test_single_digits_have_no_neighbours_and_the_default_look_is_kept():
    alone, _ = utils.render_street_numbers(200, 5, lengths=(1.0,))
    crowd, _ = utils.render_street_numbers(200, 5, lengths=(0, 0, 1.0))

    def edges_at_the_sides(images):
        gray = utils.luma(images).float()
        return sum(part.diff(dim=3).abs().mean() for part in (gray[..., :6], gray[..., 26:]))

    assert edges_at_the_sides(alone) < 0.7 * edges_at_the_sides(crowd)
    default = utils.render_street_numbers(20, 5)
    spelled = utils.render_street_numbers(20, 5, lengths=(0.08, 0.42, 0.34, 0.16))
    assert torch.equal(default[0], spelled[0])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_predict_refuses_a_batch_size(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        utils.predict(torch.nn.Flatten(), good_split(), batch_size)


def test_a_model_that_has_diverged_has_no_accuracy():
    split = good_split()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(ValueError, match="NaN"):
        utils.accuracy(utils.predict(model, split), split.labels)


def test_a_task_that_was_not_trained_has_no_history():
    history = utils.History([{"epoch": 1, "seconds": 1.0, "test_acc_street": 90.0}])
    assert history.of_task("street").last["test_acc"] == 90
    with pytest.raises(ValueError, match="banana"):
        history.of_task("banana")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_results_with_a_number_that_is_none_are_not_written(number, monkeypatch):
    monkeypatch.setenv("A3_PROFILE", "tiny")
    with pytest.raises(ValueError):
        utils.write_results({"single_task": {"test_acc": number}})
    assert not (utils.figures_folder() / "results.json").exists()


# ---- the notebook's own functions ----


@FUZZ
@given(st.integers(-20, 60), st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1))
def test_subsets_are_balanced_or_refused(nb, size, seed, digits):
    labels = torch.tensor(digits * 3)
    split = utils.Split(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels)
    subset = outcome(lambda: nb.balanced_subset(split, size, seed), "size")
    if subset:
        assert subset.counts() == [size // 10] * 10 and len(subset) == size
    else:
        assert size < 10 or size % 10 or min(split.counts()) < size // 10


@FUZZ
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_paired_batches_of_any_sizes(nb, one, other, steps, epoch):
    loaders = [utils.Loader(good_split(n), 8, seed=i) for i, n in enumerate((one, other))]
    batches = list(nb.paired_batches(*loaders, steps)(epoch))
    assert len(batches) == steps
    for pair in batches:
        assert [len(labels) for _, labels in pair] == [8, 8]


@FUZZ
@given(st.text(max_size=20))
def test_unknown_classes_are_refused(nb, name):
    vector = outcome(lambda: nb.class_vector(name, utils.DIGIT_CLASSES), "no class")
    assert (vector is None) == (name not in utils.DIGIT_CLASSES)


@FUZZ
@given(numbers, st.integers(1, 5))
def test_noise_is_truncated_or_refused(nb, truncation, count):
    z = outcome(lambda: nb.truncated_noise(count, 16, truncation, seed=0), "truncation")
    assert (z is None) == (not 0 < truncation <= 1)
    if z is not None:
        assert z.shape == (count, 16) and z.abs().max() <= 2 * truncation + 1e-6
