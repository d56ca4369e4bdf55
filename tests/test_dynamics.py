"""Question 2: the notebook's functions do what its formulas say, for random learning rates.

Distances are compared relative to the distance itself: one coordinate alone may pass through zero.
"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import notebook as tool

drawn = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LEARNING_RATES = st.floats(1e-3, 4.0)
POINTS = st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))


def distance(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=-1)


@drawn
@given(alpha=LEARNING_RATES, z=POINTS)
def test_step_by_autograd_is_the_matrix_and_serves_both_players(nb, alpha, z):
    matrix = nb.update_matrix(alpha)
    np.testing.assert_array_equal(nb.matrix_of(nb.simultaneous_step, alpha), matrix)
    d, g = nb.simultaneous_step(torch.tensor(z, dtype=torch.float64), alpha).numpy()
    np.testing.assert_allclose([d, g], matrix @ z, rtol=1e-12, atol=1e-12 * math.hypot(*z))
    assert d * z[1] >= z[0] * z[1] >= z[0] * g  # alone, d raises V = d g and g lowers it


@drawn
@given(alpha=st.floats(1e-3, 1.0), start=POINTS)
def test_closed_form_is_the_iterated_map(nb, alpha, start):
    iterated = nb.iterate(nb.update_matrix(alpha), start, 1000)
    predicted = nb.closed_form(alpha, start, np.arange(1001))
    assert (distance(iterated - predicted) <= 1e-10 * distance(predicted)).all()


@drawn
@given(alpha=LEARNING_RATES, now=POINTS, before=POINTS)
def test_matrices_are_their_algorithms(nb, alpha, now, before):
    def slopes(z):
        return alpha * np.array([z[1], -z[0]])

    new_d = now[0] + alpha * now[1]
    steps = {
        "alternating": np.array([new_d, now[1] - alpha * new_d]),
        "extragradient": now + slopes(now + slopes(now)),
        "optimistic": now + 2 * slopes(now) - slopes(before),
    }
    scale = (1 + alpha) ** 2 * (math.hypot(*now) + math.hypot(*before))
    for method, expected in steps.items():
        state = [*now, *before] if method == "optimistic" else now
        found = (nb.METHODS[method](alpha) @ state)[:2]
        np.testing.assert_allclose(found, expected, atol=1e-12 * scale, err_msg=method)


@drawn
@given(alpha=LEARNING_RATES)
def test_largest_modulus_is_the_one_in_the_table(nb, alpha):
    root = math.sqrt(abs(1 - 4 * alpha**2))
    beyond = (alpha + math.sqrt(max(alpha**2 - 4, 0))) ** 2 / 4
    slow, fast = math.sqrt((1 + root) / 2), math.hypot(1, 2 * alpha + root) / 2
    table = {
        "simultaneous": math.hypot(1, alpha),
        "alternating": 1 if alpha <= 2 else beyond,
        "extragradient": math.sqrt(1 - alpha**2 + alpha**4),
        "optimistic": slow if alpha <= 0.5 else fast,
    }
    for method, modulus in table.items():
        found = nb.largest_modulus(nb.METHODS[method](alpha))
        # Next to a double eigenvalue (a Jordan block) eigvals keeps half of the digits only.
        np.testing.assert_allclose(found, modulus, rtol=1e-6, err_msg=method)


@pytest.mark.parametrize(
    ("method", "limit"),
    [("alternating", 2), ("extragradient", 1), ("optimistic", math.sqrt(3) / 3)],
)
def test_a_method_is_stable_up_to_its_learning_rate_in_the_text(nb, method, limit):
    below, above = [nb.largest_modulus(nb.METHODS[method](c * limit)) for c in (0.99, 1.01)]
    assert below < 1 + 1e-9 and above > 1.001


def test_behavior_at_the_limits(nb):
    for count in (100, 10_000):  # the running mean tends to 0 like 1 / count
        mean = nb.play("alternating", 0.5, (1.0, 0.5), count - 1).mean(axis=0)
        assert distance(mean) < 10 / count
    for method in ("extragradient", "optimistic"):
        home = nb.play(method, 0.45, (1.0, 0.5), 1000)
        assert distance(home[-1]) < 1e-9


def test_the_optimistic_method_begins_as_if_it_had_stood_still(nb):
    _, first = nb.play("optimistic", 0.3, (1.0, 0.5), 1)
    np.testing.assert_allclose(first, nb.update_matrix(0.3) @ (1.0, 0.5))


def text_of_notebook():
    return "\n".join(
        cell.source for cell in tool.read(tool.NOTEBOOK).cells if cell.cell_type == "markdown"
    )


def test_the_text_gives_the_matrix_of_the_code(nb):
    found = re.findall(r"A = \\begin\{bmatrix\}(.*?)\\end", text_of_notebook())
    assert len(found) >= 2
    for matrix in found:
        text = matrix.replace(r"\alpha", "0.25")
        numbers = [[float(entry) for entry in row.split("&")] for row in text.split(r"\\")]
        np.testing.assert_array_equal(numbers, nb.update_matrix(0.25))


def test_the_number_of_steps_to_double_is_right_in_the_text():
    (number,) = re.findall(
        r"\\ln\(1 \+ \\alpha\^2\) \\approx ([\d.]+) / \\alpha\^2", text_of_notebook()
    )
    assert number == f"{2 * math.log(2):.2f}"
