"""Question 2: the formulas for every learning rate (SymPy), and the notebook's functions.

That the closed form is the iterated map, the notebook itself shows: test_notebook.py.
"""

import math
import re

import numpy as np
import pytest
import sympy as sp
import torch

from tools import notebook as tool

# ---- the formulas, for every learning rate ----

a = sp.Symbol("alpha", positive=True)
I2 = sp.eye(2)


def exact(matrix: np.ndarray) -> sp.Matrix:
    """A matrix that the notebook made of the symbol, without its floating-point numbers."""
    return sp.nsimplify(sp.Matrix(matrix))


def same(left: sp.Matrix, right: sp.Matrix) -> bool:
    gap = (left - right).applyfunc(lambda x: sp.simplify(sp.expand_trig(sp.expand(x))))
    return gap == sp.zeros(*gap.shape)


def test_eigenvalues_stationary_point_and_closed_form_hold_for_every_learning_rate(nb):
    matrix = exact(nb.update_matrix(a))
    assert set(matrix.eigenvals()) == {1 + sp.I * a, 1 - sp.I * a}
    assert same(matrix.T * matrix, (1 + a**2) * I2)
    assert (matrix - I2).nullspace() == []  # (0, 0) alone is stationary
    k, theta = sp.Symbol("k", positive=True), sp.atan(a)

    def power(k):
        cos, sin = sp.cos(k * theta), sp.sin(k * theta)
        return sp.sqrt(1 + a**2) ** k * sp.Matrix([[cos, sin], [-sin, cos]])

    assert power(sp.S.Zero) == I2
    assert same(power(k + 1), matrix * power(k))


# ---- the notebook's functions ----


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 1.0])
def test_the_closed_form_is_the_iterated_map(nb, alpha):
    start = (0.3, -1.2)
    iterated = nb.iterate(nb.update_matrix(alpha), start, 1000)
    predicted = nb.closed_form(alpha, start, np.arange(1001))
    error = np.linalg.norm(iterated - predicted, axis=1)
    assert (error <= 1e-10 * np.linalg.norm(predicted, axis=1)).all()


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 0.5, 1.0, 2.0, 4.0])
def test_a_step_is_the_matrix_and_alone_d_raises_the_value_and_g_lowers_it(nb, alpha):
    d, g = 2.0, 3.0
    new_d, new_g = nb.simultaneous_step(torch.tensor([d, g], dtype=torch.float64), alpha).tolist()
    assert [new_d, new_g] == pytest.approx(list(nb.update_matrix(alpha) @ (d, g)), rel=1e-12)
    assert new_d * g > d * g > d * new_g


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
        r"\\ln\(1 \+ \\alpha\^2\)\$ steps, about \$([\d.]+) / \\alpha\^2", text_of_notebook()
    )
    assert number == f"{2 * math.log(2):.2f}"
