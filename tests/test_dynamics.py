"""Question 2: closed forms, invariants and ranges of convergence, for drawn learning rates.

The functions are the notebook's own (fixture `nb`). Distances are compared relative to the
distance itself: one coordinate alone may pass through zero.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ALPHAS = st.floats(1e-3, 4.0)
STARTS = st.builds(
    lambda log_radius, angle: tuple(10**log_radius * np.array([math.cos(angle), math.sin(angle)])),
    st.floats(-3, 3),
    st.floats(0, 2 * math.pi),
)


def distance(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points, axis=-1)


@SETTINGS
@given(alpha=ALPHAS, z=STARTS)
def test_matrix_is_the_autograd_step_with_the_right_signs(nb, alpha, z):
    assert nb.update_matrix(alpha).tolist() == [[1, alpha], [-alpha, 1]]
    np.testing.assert_array_equal(
        nb.matrix_of(nb.simultaneous_step, alpha), nb.update_matrix(alpha)
    )
    after = nb.simultaneous_step(torch.tensor(z, dtype=torch.float64), alpha).numpy()
    # Each player alone: d raises V = d g, g lowers it.
    assert after[0] * z[1] >= z[0] * z[1] >= z[0] * after[1]


@pytest.mark.parametrize("alpha", [0.0, -0.1, math.nan, math.inf])
def test_bad_learning_rate_is_refused(nb, alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number above 0"):
        nb.update_matrix(alpha)


@SETTINGS
@given(alpha=ALPHAS, z=STARTS)
def test_only_the_origin_stays(nb, alpha, z):
    assert not nb.iterate(nb.update_matrix(alpha), (0, 0), 100).any()
    moved = distance(nb.update_matrix(alpha) @ np.array(z) - np.array(z))
    np.testing.assert_allclose(moved, alpha * math.hypot(*z), rtol=1e-9)


@SETTINGS
@given(alpha=st.floats(1e-3, 1.0), start=STARTS)
def test_closed_form_is_the_iterated_map(nb, alpha, start):
    iterated = nb.iterate(nb.update_matrix(alpha), start, 1000)
    exact = nb.closed_form(alpha, start, np.arange(1001))
    assert (distance(iterated - exact) <= 1e-10 * distance(exact)).all()
    np.testing.assert_array_equal(nb.closed_form(alpha, start, 7), exact[7])
    growth = distance(iterated)[1:] / distance(iterated)[:-1]
    np.testing.assert_allclose(growth, math.hypot(1, alpha), rtol=1e-12)


@SETTINGS
@given(alpha=st.floats(0.02, 4), start=STARTS)
def test_both_players_oscillate_ever_wider(nb, alpha, start):
    turn = math.ceil(2 * math.pi / math.atan(alpha)) + 1
    points = nb.closed_form(alpha, start, np.arange(3 * turn))
    share = (points / distance(points)[:, None]).reshape(3, turn, 2)  # cos and sin of the angle
    assert (share.max(axis=1) >= math.sqrt(0.5) - 1e-9).all()
    assert (share.min(axis=1) <= -math.sqrt(0.5) + 1e-9).all()


# ---- the optional part ----


@SETTINGS
@given(alpha=st.floats(1e-3, 1.99), start=STARTS, order=st.sampled_from([("d", 1), ("g", -1)]))
def test_alternating_invariant_of_both_orders(nb, alpha, start, order):
    first, sign = order
    d, g = nb.iterate(nb.alternating_matrix(alpha, first), start, 1000).T
    invariant = d**2 + g**2 + sign * alpha * d * g
    np.testing.assert_allclose(invariant, invariant[0], rtol=1e-6)
    bound = math.sqrt((2 + alpha) / (2 - alpha)) * math.hypot(*start)
    assert np.hypot(d, g).max() <= bound * (1 + 1e-6)


def test_alternating_orders_are_the_algorithms(nb):
    d, g, alpha = 0.7, -1.3, 0.4
    new_d, new_g = d + alpha * g, g - alpha * d
    np.testing.assert_allclose(
        nb.alternating_matrix(alpha) @ [d, g], [new_d, g - alpha * new_d], rtol=1e-12
    )
    np.testing.assert_allclose(
        nb.alternating_matrix(alpha, "g") @ [d, g], [d + alpha * new_g, new_g], rtol=1e-12
    )


@SETTINGS
@given(start=STARTS, k=st.integers(0, 100))
def test_alternating_at_two_grows_linearly_off_one_line(nb, start, k):
    for first, sign in (("d", 1), ("g", -1)):
        matrix = nb.alternating_matrix(2.0, first)
        away = 2 * k * (sign * start[0] + start[1])
        expected = (-1) ** k * (np.array(start) - away * np.array([1, -sign]))
        scale = 1e-9 * math.hypot(*start)
        np.testing.assert_allclose(nb.iterate(matrix, start, k)[-1], expected, atol=scale)
        still = np.array([1.0, -sign])  # the exceptional line: only the sign changes
        np.testing.assert_array_equal(nb.iterate(matrix, still, k)[-1], (-1) ** k * still)


@SETTINGS
@given(alpha=ALPHAS, z=STARTS, before=STARTS)
def test_extragradient_and_optimistic_are_their_algorithms(nb, alpha, z, before):
    now, last = (torch.tensor(point, dtype=torch.float64) for point in (z, before))
    ahead = nb.simultaneous_step(now, alpha)
    scale = 1e-12 * (1 + alpha) ** 2 * (math.hypot(*z) + math.hypot(*before))
    step = now + alpha * nb.play_directions(ahead)
    np.testing.assert_allclose(nb.extragradient_matrix(alpha) @ z, step, atol=scale)
    step = now + 2 * alpha * nb.play_directions(now) - alpha * nb.play_directions(last)
    state = nb.optimistic_matrix(alpha) @ np.array([*z, *before])
    np.testing.assert_allclose(state, [*step, *z], atol=scale)


@pytest.mark.parametrize("method", ["simultaneous", "alternating", "extragradient", "optimistic"])
@SETTINGS
@given(alpha=ALPHAS)
def test_largest_modulus(nb, method, alpha):
    numeric = np.abs(np.linalg.eigvals(nb.METHODS[method](alpha))).max()
    # Next to a double eigenvalue (a Jordan block) eigvals keeps half of the digits only.
    np.testing.assert_allclose(numeric, nb.largest_modulus(method, alpha), rtol=1e-6)
    limit = {"extragradient": 1.0, "optimistic": 1 / math.sqrt(3)}.get(method)
    if limit and abs(alpha - limit) > 1e-6:
        assert (numeric < 1) == (alpha < limit)


def test_behavior_at_the_limits(nb):
    turns = nb.method_path("extragradient", 1.0, (3.0, 4.0), 4)
    assert turns.tolist() == [[3, 4], [4, -3], [-3, -4], [-4, 3], [3, 4]]
    cycle = nb.method_path("optimistic", 1 / math.sqrt(3), (1.0, 0.5), 212)
    np.testing.assert_allclose(cycle[-6:], cycle[-12:-6], atol=1e-9)
    assert distance(cycle[-6:]).min() > 0.1
    for n in (100, 1000, 10_000):
        mean = nb.method_path("alternating", 0.5, (1.0, 0.5), n - 1).mean(axis=0)
        assert distance(mean) < 10 / n
