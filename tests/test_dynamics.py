"""Question 2: each formula for every learning rate (SymPy), and the notebook's functions.

Distances are compared relative to the distance itself: one coordinate alone may pass through zero.
"""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

drawn = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LEARNING_RATES = st.floats(1e-3, 4.0)


@st.composite
def points(draw) -> tuple[float, float]:
    """A point (d, g) at a distance of 0.001 to 1,000 from the origin."""
    radius = 10 ** draw(st.floats(-3, 3))
    angle = draw(st.floats(0, 2 * math.pi))
    return radius * math.cos(angle), radius * math.sin(angle)


def distance(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=-1)


# ---- the formulas, for every learning rate ----

a = sp.Symbol("alpha", positive=True)
I2 = sp.eye(2)
J = sp.Matrix([[0, 1], [-1, 0]])
A = I2 + a * J
ALTERNATING = sp.Matrix([[1, a], [-a, 1 - a**2]])


def same(left: sp.Matrix, right: sp.Matrix) -> bool:
    gap = (left - right).applyfunc(lambda x: sp.simplify(sp.expand_trig(sp.expand(x))))
    return gap == sp.zeros(*gap.shape)


def test_update_rule_stationary_point_and_eigenvalues():
    d, g = sp.symbols("d g")
    value = d * g
    step = sp.Matrix([d + a * value.diff(d), g - a * value.diff(g)])
    assert same(step, A * sp.Matrix([d, g]))
    assert sp.solve(list(step - sp.Matrix([d, g])), [d, g]) == {d: 0, g: 0}
    assert set(A.eigenvals()) == {1 + sp.I * a, 1 - sp.I * a}
    assert same(A.T * A, (1 + a**2) * I2)


def test_closed_form_by_induction():
    k = sp.Symbol("k", positive=True)
    theta = sp.atan(a)

    def power(k):
        turn = sp.Matrix([[sp.cos(k * theta), sp.sin(k * theta)]])
        turn = turn.col_join(sp.Matrix([[-sp.sin(k * theta), sp.cos(k * theta)]]))
        return sp.sqrt(1 + a**2) ** k * turn

    assert power(sp.S.Zero) == I2
    assert same(power(k + 1), A * power(k))


def test_small_learning_rates_follow_the_flow():
    t = sp.Symbol("t", positive=True)
    exponent = sp.series(t * sp.log(1 + a**2) / (2 * a), a, 0, 4).removeO()
    assert sp.expand(exponent - (a * t / 2 - a**3 * t / 4)) == 0
    assert sp.limit((1 + a**2) ** (t / (2 * a)), a, 0, "+") == 1


def test_alternating_formulas():
    moves = sp.Matrix([[1, 0], [-a, 1]]) * sp.Matrix([[1, a], [0, 1]])
    assert same(moves, ALTERNATING)
    ellipse = sp.Matrix([[1, a / 2], [a / 2, 1]])  # d^2 + g^2 + alpha d g
    assert same(ALTERNATING.T * ellipse * ALTERNATING, ellipse)
    assert sp.solveset(ellipse.det() > 0, a, sp.Interval.open(0, sp.oo)) == sp.Interval.open(0, 2)
    root = -((a + sp.sqrt(a**2 - 4)) ** 2) / 4
    assert sp.expand(root**2 - ALTERNATING.trace() * root + ALTERNATING.det()) == 0
    nilpotent = (ALTERNATING + I2).subs(a, 2)  # a Jordan block of the eigenvalue -1
    assert nilpotent.rank() == 1
    assert nilpotent**2 == sp.zeros(2)


def test_extragradient_formulas():
    ahead = I2 + a * J
    matrix = I2 + a * J * ahead
    squared = 1 - a**2 + a**4
    assert same(matrix, (1 - a**2) * I2 + a * J)
    assert same(matrix.T * matrix, squared * I2)
    assert sp.solveset(squared < 1, a, sp.Interval.open(0, sp.oo)) == sp.Interval.open(0, 1)
    assert sp.solve(squared.diff(a), a) == [sp.sqrt(2) / 2]


def test_optimistic_formulas():
    root = sp.Symbol("lambda")
    matrix = (I2 + 2 * a * J).row_join(-a * J).col_join(I2.row_join(sp.zeros(2)))
    factors = [root**2 - (1 + sign * 2 * sp.I * a) * root + sign * sp.I * a for sign in (1, -1)]
    assert sp.expand(matrix.charpoly(root).as_expr() - factors[0] * factors[1]) == 0
    # The modulus sqrt(1 + (2 alpha + sqrt(4 alpha^2 - 1))^2) / 2 is 1 at this learning rate only.
    assert sp.solve(2 * a + sp.sqrt(4 * a**2 - 1) - sp.sqrt(3), a) == [sp.sqrt(3) / 3]


# ---- the notebook's functions ----


@drawn
@given(alpha=LEARNING_RATES, z=points())
def test_step_by_autograd_is_the_matrix_and_serves_both_players(nb, alpha, z):
    matrix = nb.update_matrix(alpha)
    np.testing.assert_array_equal(nb.matrix_of(nb.simultaneous_step, alpha), matrix)
    d, g = nb.simultaneous_step(torch.tensor(z, dtype=torch.float64), alpha).numpy()
    np.testing.assert_allclose([d, g], matrix @ z, rtol=1e-12, atol=1e-12 * math.hypot(*z))
    assert d * z[1] >= z[0] * z[1] >= z[0] * g  # alone, d raises V = d g and g lowers it


@drawn
@given(alpha=st.floats(1e-3, 1.0), start=points())
def test_closed_form_is_the_iterated_map(nb, alpha, start):
    iterated = nb.iterate(nb.update_matrix(alpha), start, 1000)
    predicted = nb.closed_form(alpha, start, np.arange(1001))
    assert (distance(iterated - predicted) <= 1e-10 * distance(predicted)).all()
    growth = distance(iterated)[1:] / distance(iterated)[:-1]
    np.testing.assert_allclose(growth, math.hypot(1, alpha), rtol=1e-12)


@drawn
@given(alpha=st.floats(0.02, 4), start=points())
def test_both_players_swing_to_both_sides_in_every_turn(nb, alpha, start):
    turn = math.ceil(2 * math.pi / math.atan(alpha)) + 1
    spiral = nb.closed_form(alpha, start, np.arange(3 * turn))
    share = (spiral / distance(spiral)[:, None]).reshape(3, turn, 2)  # cos and sin of the angle
    assert (share.max(axis=1) >= math.sqrt(0.5) - 1e-9).all()
    assert (share.min(axis=1) <= -math.sqrt(0.5) + 1e-9).all()


# ---- the optional part ----


@drawn
@given(alpha=LEARNING_RATES, now=points(), before=points())
def test_matrices_are_their_algorithms(nb, alpha, now, before):
    def directions(d, g):
        return np.array([g, -d])

    d, g = now
    new_d = d + alpha * g
    steps = {
        "alternating": np.array([new_d, g - alpha * new_d]),
        "extragradient": now + alpha * directions(*(now + alpha * directions(d, g))),
        "optimistic": now + 2 * alpha * directions(d, g) - alpha * directions(*before),
    }
    scale = (1 + alpha) ** 2 * (math.hypot(*now) + math.hypot(*before))
    for method, expected in steps.items():
        state = [*now, *before] if method == "optimistic" else now
        found = (nb.METHODS[method](alpha) @ state)[:2]
        np.testing.assert_allclose(found, expected, atol=1e-12 * scale, err_msg=method)


def modulus_in_the_table(method: str, alpha: float) -> float:
    root = math.sqrt(abs(1 - 4 * alpha**2))
    if method == "simultaneous":
        return math.sqrt(1 + alpha**2)
    if method == "alternating":
        return 1.0 if alpha <= 2 else (alpha + math.sqrt(alpha**2 - 4)) ** 2 / 4
    if method == "extragradient":
        return math.sqrt(1 - alpha**2 + alpha**4)
    if alpha <= 0.5:
        return math.sqrt((1 + root) / 2)
    return math.hypot(1, 2 * alpha + root) / 2


@pytest.mark.parametrize("method", ["simultaneous", "alternating", "extragradient", "optimistic"])
@drawn
@given(alpha=LEARNING_RATES)
def test_largest_modulus_is_the_one_in_the_table(nb, method, alpha):
    found = nb.largest_modulus(nb.METHODS[method](alpha))
    # Next to a double eigenvalue (a Jordan block) eigvals keeps half of the digits only.
    np.testing.assert_allclose(found, modulus_in_the_table(method, alpha), rtol=1e-6)


@drawn
@given(alpha=st.floats(1e-3, 1.99), start=points())
def test_alternating_players_stay_on_their_ellipse(nb, alpha, start):
    d, g = nb.play("alternating", alpha, start, 1000).T
    invariant = d**2 + g**2 + alpha * d * g
    np.testing.assert_allclose(invariant, invariant[0], rtol=1e-6)
    bound = math.sqrt((2 + alpha) / (2 - alpha)) * math.hypot(*start)
    assert np.hypot(d, g).max() <= bound * (1 + 1e-6)


def test_behavior_at_the_limits(nb):
    for count in (100, 1000, 10_000):  # the running mean tends to 0 like 1 / count
        mean = nb.play("alternating", 0.5, (1.0, 0.5), count - 1).mean(axis=0)
        assert distance(mean) < 10 / count
    grown = distance(nb.play("alternating", 2.0, (1.0, 0.5), 100))
    np.testing.assert_allclose(np.diff(grown[50:]), np.diff(grown[50:]).mean(), rtol=1e-3)
    for method in ("extragradient", "optimistic"):
        home = nb.play(method, 0.45, (1.0, 0.5), 1000)
        assert distance(home[-1]) < 1e-9
