"""Question 2: every closed form and every claim of convergence or divergence, as a property.

The functions under test are the notebook's own (fixture `nb`). Distances are compared relative to
the distance itself: one coordinate alone may pass through zero.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
METHODS = ("simultaneous", "alternating", "extragradient", "optimistic")
SMALL = st.floats(1e-3, 1.0)  # 1,000 steps at 1 reach 1e150: no overflow
ANY = st.floats(1e-3, 10.0)


@st.composite
def starts(draw) -> tuple[float, float]:
    """A starting point that is not the origin, at distances from 1e-3 to 1e3."""
    radius, angle = 10 ** draw(st.floats(-3, 3)), draw(st.floats(0, 2 * math.pi))
    return radius * math.cos(angle), radius * math.sin(angle)


def distance(path: np.ndarray) -> np.ndarray:
    return np.linalg.norm(path, axis=-1)


# ------------------------------------------------------------- 2 (b) the matrix


@SETTINGS
@given(alpha=ANY, z=starts())
def test_matrix_is_the_autograd_step_with_the_right_signs(nb, alpha, z):
    matrix = nb.update_matrix(alpha)
    assert matrix.tolist() == [[1, alpha], [-alpha, 1]]
    np.testing.assert_allclose(nb.matrix_of(nb.simultaneous_step, alpha), matrix, rtol=1e-15)
    d, g = z
    after = nb.simultaneous_step(torch.tensor(z, dtype=torch.float64), alpha).numpy()
    np.testing.assert_allclose(after, [d + alpha * g, g - alpha * d], rtol=1e-12)
    # Each player alone: d raises V, g lowers it.
    assert after[0] * g >= d * g and d * after[1] <= d * g


@pytest.mark.parametrize("alpha", [0.0, -0.1, math.nan, math.inf])
def test_bad_learning_rate_is_refused(nb, alpha):
    for function in (
        nb.update_matrix,
        nb.alternating_matrix,
        nb.extragradient_matrix,
        nb.optimistic_matrix,
        nb.steps_to_double,
        lambda value: nb.closed_form(value, (1, 0), 3),
        lambda value: nb.predicted_radius("optimistic", value),
    ):
        with pytest.raises(ValueError, match="alpha must be a finite number > 0"):
            function(alpha)


def test_bad_steps_starts_and_methods_are_refused(nb):
    with pytest.raises(ValueError, match="steps must be >= 0"):
        nb.iterate(nb.update_matrix(0.1), (1, 0), -1)
    with pytest.raises(ValueError, match="start must hold 2 numbers"):
        nb.iterate(nb.update_matrix(0.1), (1, 0, 0), 5)
    with pytest.raises(ValueError, match="k must be >= 0"):
        nb.closed_form(0.1, (1, 0), -1)
    with pytest.raises(ValueError, match="method must be one of"):
        nb.predicted_radius("momentum", 0.1)


# --------------------------------------------------- 2 (c) the stationary point


@SETTINGS
@given(alpha=ANY, z=starts())
def test_only_the_origin_stays(nb, alpha, z):
    matrix = nb.update_matrix(alpha)
    assert not nb.iterate(matrix, (0, 0), 100).any()
    moved = distance(matrix @ np.array(z) - np.array(z))
    np.testing.assert_allclose(moved, alpha * math.hypot(*z), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.det(matrix - np.eye(2)), alpha**2, rtol=1e-9)


# ------------------------------------- 2 (d) eigenvalues, closed form, behaviour


@SETTINGS
@given(alpha=ANY)
def test_eigenvalues_modulus_and_argument(nb, alpha):
    low, high = sorted(np.linalg.eigvals(nb.update_matrix(alpha)), key=lambda value: value.imag)
    np.testing.assert_allclose([low, high], [1 - 1j * alpha, 1 + 1j * alpha], rtol=1e-12)
    np.testing.assert_allclose(abs(high), math.sqrt(1 + alpha**2), rtol=1e-12)
    np.testing.assert_allclose(np.angle([low, high]), [-math.atan(alpha), math.atan(alpha)])


@SETTINGS
@given(alpha=SMALL, start=starts())
def test_closed_form_follows_the_iterated_map_for_1000_steps(nb, alpha, start):
    path = nb.iterate(nb.update_matrix(alpha), start, 1000)
    exact = nb.closed_form(alpha, start, np.arange(1001))
    assert path.shape == exact.shape == (1001, 2)
    assert (distance(path - exact) <= 1e-10 * distance(exact)).all()
    assert nb.closed_form_error(alpha, start, 1000) <= 1e-10
    np.testing.assert_array_equal(nb.closed_form(alpha, start, 7), exact[7])


@SETTINGS
@given(alpha=ANY, start=starts())
def test_every_step_grows_by_exactly_rho(nb, alpha, start):
    radius = distance(nb.iterate(nb.update_matrix(alpha), start, 100))
    np.testing.assert_allclose(radius[1:] / radius[:-1], math.hypot(1, alpha), rtol=1e-12)


@SETTINGS
@given(alpha=st.floats(0.01, 10), start=starts())
def test_steps_to_double(nb, alpha, start):
    steps = nb.steps_to_double(alpha)
    np.testing.assert_allclose(math.hypot(1, alpha) ** steps, 2, rtol=1e-9)
    before, after = nb.closed_form(alpha, start, np.array([math.floor(steps), math.ceil(steps)]))
    twice = 2 * math.hypot(*start)
    assert distance(before) <= twice * (1 + 1e-9) and distance(after) >= twice * (1 - 1e-9)


@SETTINGS
@given(alpha=st.floats(0.02, 10), start=starts())
def test_both_players_swing_ever_wider_and_never_settle(nb, alpha, start):
    turn = math.ceil(2 * math.pi / math.atan(alpha)) + 1
    path = nb.closed_form(alpha, start, np.arange(3 * turn))
    share = (path / distance(path)[:, None]).reshape(3, turn, 2)  # cos and sin of the angle
    assert (share.max(axis=1) >= math.sqrt(0.5) - 1e-9).all()
    assert (share.min(axis=1) <= -math.sqrt(0.5) + 1e-9).all()


@SETTINGS
@given(time=st.floats(0.1, 20), start=starts())
def test_small_steps_approach_the_circling_flow(nb, time, start):
    d, g = start
    cos, sin = math.cos(time), math.sin(time)
    flow = np.array([d * cos + g * sin, g * cos - d * sin])
    gaps = []
    for steps in (10**3, 10**4, 10**5):
        alpha = time / steps
        point = nb.closed_form(alpha, start, steps)
        growth = distance(point) / math.hypot(d, g)
        assert 1 <= growth * (1 + 1e-9) and growth <= math.exp(alpha * time / 2) * (1 + 1e-9)
        gaps.append(distance(point - flow) / math.hypot(d, g))
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] <= 1.5 * (time / 10**5) * time / 2 + 1e-9  # first order in alpha


@SETTINGS
@given(alphas=st.lists(ANY, min_size=1, max_size=50), start=starts())
def test_no_schedule_of_learning_rates_comes_closer(nb, alphas, start):
    z = np.array(start)
    for alpha in alphas:
        z = nb.update_matrix(alpha) @ z
    predicted = math.hypot(*start) * math.prod(math.hypot(1, alpha) for alpha in alphas)
    np.testing.assert_allclose(distance(z), predicted, rtol=1e-12)
    assert distance(z) >= math.hypot(*start)


# ------------------------------------------------------------------------ beyond


@SETTINGS
@given(alpha=ANY, z=starts(), before=starts())
def test_the_other_matrices_are_their_algorithms(nb, alpha, z, before):
    for step, matrix in (
        (nb.alternating_step, nb.alternating_matrix),
        (nb.extragradient_step, nb.extragradient_matrix),
    ):
        np.testing.assert_allclose(nb.matrix_of(step, alpha), matrix(alpha), rtol=1e-12, atol=1e-12)
    now, last = torch.tensor(z, dtype=torch.float64), torch.tensor(before, dtype=torch.float64)
    state = nb.optimistic_matrix(alpha) @ np.array([*z, *before])
    scale = 1e-12 * (1 + alpha) * (math.hypot(*z) + math.hypot(*before))
    np.testing.assert_allclose(state[:2], nb.optimistic_step(now, last, alpha), atol=scale)
    np.testing.assert_array_equal(state[2:], z)


@pytest.mark.parametrize("method", METHODS)
@SETTINGS
@given(alpha=st.floats(1e-3, 4))
def test_spectral_radii(nb, method, alpha):
    numeric = nb.spectral_radius(nb.METHOD_MATRICES[method](alpha))
    # Next to a double eigenvalue (a Jordan block) eigvals keeps half of the digits only.
    np.testing.assert_allclose(numeric, nb.predicted_radius(method, alpha), rtol=1e-6)


@SETTINGS
@given(alpha=st.floats(1e-3, 1.99), start=starts())
def test_alternating_below_two_stays_on_its_ellipse(nb, alpha, start):
    matrix = nb.alternating_matrix(alpha)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, rtol=1e-9)
    assert abs(np.trace(matrix)) < 2
    path = nb.method_path("alternating", alpha, start, 2000)
    d, g = path.T
    np.testing.assert_allclose(d**2 + g**2 + alpha * d * g, (d**2 + g**2 + alpha * d * g)[0], 1e-6)
    bound = math.sqrt((2 + alpha) / (2 - alpha)) * math.hypot(*start)
    assert distance(path).max() <= bound * (1 + 1e-6)
    assert distance(path).min() >= math.hypot(*start) ** 2 / bound * (1 - 1e-6)


@SETTINGS
@given(alpha=st.floats(0.05, 1.9), start=starts())
def test_alternating_running_mean_shrinks_like_one_over_k(nb, alpha, start):
    path = nb.method_path("alternating", alpha, start, 4999)
    bound = math.sqrt((2 + alpha) / (2 - alpha)) * math.hypot(*start)
    inverse = np.linalg.norm(np.linalg.inv(nb.alternating_matrix(alpha) - np.eye(2)), 2)
    for count in (50, 500, 5000):
        mean = distance(path[:count].mean(axis=0))
        assert mean <= inverse * (bound + math.hypot(*start)) / count * (1 + 1e-6)


@SETTINGS
@given(start=starts(), k=st.integers(0, 200))
def test_alternating_at_two_grows_linearly(nb, start, k):
    d, g = start
    path = nb.method_path("alternating", 2.0, start, k)
    expected = (-1) ** k * np.array([d - 2 * k * (d + g), g + 2 * k * (d + g)])
    np.testing.assert_allclose(path[-1], expected, atol=1e-9 * math.hypot(d, g))
    still = nb.method_path("alternating", 2.0, (1.0, -1.0), k)  # the one eigenvector
    np.testing.assert_array_equal(still[-1], (-1) ** k * np.array([1.0, -1.0]))


@SETTINGS
@given(alpha=st.floats(2.1, 4))
def test_alternating_beyond_two_explodes_off_one_line(nb, alpha):
    values, vectors = np.linalg.eig(nb.alternating_matrix(alpha))
    assert (values.imag == 0).all() and (values.real < 0).all()
    vectors = vectors.real  # NumPy 2.5 gives complex arrays here even where all parts are real
    large, small = vectors[:, np.abs(values).argmax()], vectors[:, np.abs(values).argmin()]
    path = nb.method_path("alternating", alpha, large + small, 60)
    np.testing.assert_allclose(
        distance(path[60]) / distance(path[59]), nb.predicted_radius("alternating", alpha), 1e-6
    )
    assert distance(nb.alternating_matrix(alpha) @ small) < distance(small)


@SETTINGS
@given(alpha=st.floats(0.05, 3), start=starts())
def test_extragradient_shrinks_every_step_exactly_below_one(nb, alpha, start):
    radius = distance(nb.method_path("extragradient", alpha, start, 50))
    factor = math.sqrt(1 - alpha**2 + alpha**4)
    np.testing.assert_allclose(radius[1:] / radius[:-1], factor, rtol=1e-9)
    if abs(alpha - 1) > 1e-9:
        assert (factor < 1) == (alpha < 1)
    assert factor >= math.sqrt(3) / 2 - 1e-12


def test_extragradient_at_one_is_a_quarter_turn(nb):
    path = nb.method_path("extragradient", 1.0, (3.0, 4.0), 4)
    assert path.tolist() == [[3, 4], [4, -3], [-3, -4], [-4, 3], [3, 4]]


@SETTINGS
@given(alpha=st.one_of(st.floats(0.1, 0.56), st.floats(0.6, 1.5)), start=starts())
def test_optimistic_converges_exactly_below_one_over_root_three(nb, alpha, start):
    radius = distance(nb.method_path("optimistic", alpha, start, 3000 if alpha < 0.577 else 200))
    first = math.hypot(*start)
    if alpha < 1 / math.sqrt(3):
        assert nb.predicted_radius("optimistic", alpha) < 1 and radius[-1] < 1e-5 * first
    else:
        assert nb.predicted_radius("optimistic", alpha) > 1 and radius[-1] > 1e3 * first


@SETTINGS
@given(start=starts())
def test_optimistic_ends_in_a_cycle_of_six_at_the_limit(nb, start):
    path = nb.method_path("optimistic", 1 / math.sqrt(3), start, 212)
    first = math.hypot(*start)
    np.testing.assert_allclose(path[-6:], path[-12:-6], atol=1e-9 * first)
    assert distance(path[-6:]).min() > 0.1 * first
    np.testing.assert_allclose(nb.predicted_radius("optimistic", 1 / math.sqrt(3)), 1, rtol=1e-12)


@SETTINGS
@given(alpha=st.floats(1e-3, 4))
def test_optimistic_is_fastest_at_one_half(nb, alpha):
    assert nb.predicted_radius("optimistic", alpha) >= math.sqrt(0.5) - 1e-12
    np.testing.assert_allclose(nb.predicted_radius("optimistic", 0.5), math.sqrt(0.5))
