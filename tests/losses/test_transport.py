import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from med3dinsight_ext.losses.transport import _fill, _solve_columns, _violation, solve

MASSES = (0.3, 0.8, 0.95, 1)
EPSILONS = (0.01, 0.03, 0.1, 1)


def cost_matrix(n: int, m: int | None = None, seed: int = 0) -> Tensor:
    """Cosine costs of noisy pairs, divided by their maximum, in float64."""
    random = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, 16, generator=random, dtype=torch.float64), dim=1)
    other = torch.randn(m or n, 16, generator=random, dtype=torch.float64)
    y = F.normalize(other + (z if m is None else 0), dim=1)
    cost = 1 - z @ y.mT
    return cost / cost.max()


def partial_plan(cost: Tensor, mass: float, epsilon: float = 0.1, steps: int = 16) -> Tensor:
    return solve(cost, mass, epsilon, steps).log_plan.exp()


def oracle(cost: Tensor, mass: float, epsilon: float, tolerance: float = 1e-11) -> Tensor:
    """Dykstra's iterations in the log domain and float64, until they stand still.

    Benamou et al. (2015, arXiv:1412.5154), section 3.2: in turn the rows, the columns and the total
    are projected, each after its own last correction is undone. Independent of the Newton steps.

    Args:
        cost: (b, n, m).
        mass: share of the mass to move.
        epsilon: entropic softening.
        tolerance: largest change of an entry at which the iterations end.
    """
    kernel = -cost.double() / epsilon
    n, m = cost.shape[1:]
    g, h = kernel.new_zeros(len(cost), 1, m), torch.zeros(())
    plan = torch.zeros_like(kernel)
    for _ in range(200_000):
        before = plan
        f = (-math.log(n) - (kernel + g + h).logsumexp(2, keepdim=True)).clamp(max=0)
        g = (-math.log(m) - (kernel + f + h).logsumexp(1, keepdim=True)).clamp(max=0)
        h = math.log(mass) - (kernel + f + g).flatten(1).logsumexp(1)[:, None, None]
        plan = (kernel + f + g + h).exp()
        if (plan - before).abs().max() < tolerance:
            break
    return plan


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (8, 8), (33, 33), (3, 7), (9, 4), (1, 5)])
def test_the_plan_equals_dykstras_in_float64(n: int, m: int, mass: float) -> None:
    cost = cost_matrix(n, m if m != n else None, seed=n)
    for epsilon in EPSILONS[1:]:  # at the smallest one Dykstra's iterations take minutes
        found = solve(cost[None].float(), mass, epsilon)
        error = (found.log_plan.exp() - oracle(cost[None], mass, epsilon)).abs().max()
        assert error * max(n, m) < 1e-3, epsilon


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 5), (12, 12), (3, 8), (8, 3), (1, 6), (9, 10)])
def test_random_problems_equal_dykstras_to_the_last_digits(n: int, m: int) -> None:
    random = torch.Generator().manual_seed(100 * n + m)
    for _ in range(8):
        cost = torch.rand(1, n, m, generator=random, dtype=torch.float64)
        mass = float(torch.empty(1).uniform_(0.2, 1, generator=random))
        epsilon = float(torch.empty(1).uniform_(0.05, 1, generator=random))
        found = solve(cost, mass, epsilon, steps=64)
        error = (found.log_plan.exp() - oracle(cost, mass, epsilon, 1e-15)).abs().max()
        assert error * max(n, m) < 1e-10, (mass, epsilon)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(2, 12),
    st.sampled_from(MASSES),
    st.sampled_from(EPSILONS),
    st.integers(0, 1000),
)
def test_marginals_and_mass_hold(n: int, m: int, mass: float, epsilon: float, seed: int) -> None:
    cost = torch.rand(2, n, m, generator=torch.Generator().manual_seed(seed))
    found = solve(cost, mass, epsilon)
    plan, slack = found.log_plan.exp(), 1 + found.residual.max() + 1e-4
    assert (plan.sum(2) <= slack / n).all() and (plan.sum(1) <= slack / m).all()
    assert torch.allclose(plan.sum((1, 2)), torch.full((2,), float(mass)), atol=2e-3)
    assert found.residual.min() >= 0 and found.residual.max() < 1e-2


@pytest.mark.parametrize("seed", range(6))
def test_the_residual_is_the_largest_error_of_a_marginal(seed: int) -> None:
    cost = torch.rand(1, 9, 7, generator=torch.Generator().manual_seed(seed))
    plan, residual = solve(cost, 1, 0.02, steps=1)
    rows, columns = 9 * plan.exp().sum(2) - 1, 7 * plan.exp().sum(1) - 1
    largest = torch.maximum(rows.abs().max(), columns.abs().max())
    assert largest > 1e-3 and torch.allclose(residual, largest, rtol=1e-3)


def test_the_residual_carries_no_gradient() -> None:
    plan, residual = solve(cost_matrix(5)[None].requires_grad_(), 0.8)
    assert plan.requires_grad and not residual.requires_grad


@given(st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 1000))
def test_filling_scales_to_the_mass_and_cuts_at_the_bound(n: int, mass: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    sums = 3 * torch.randn(2, n, generator=random, dtype=torch.float64)
    for share in (mass, 1):
        cut, h = _fill(sums, share)
        filled = (sums + cut + h).exp()
        assert torch.allclose(filled.sum(1), torch.full((2,), float(share)).double(), atol=1e-6)
        assert (filled <= (1 + 1e-6) / n).all()
        free = filled < (1 - 1e-6) / n  # below the bound all are scaled alike
        assert share == 1 or (cut <= 0).all() and (cut[free].abs() < 1e-9).all()
    assert torch.allclose(cut, -math.log(n) - sums) and not h.any()  # at 1, up or down


def test_the_first_column_pins_the_constant_where_no_row_is_slack() -> None:
    plan = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    right -= right.mean(1, keepdim=True)  # of a Laplacian's range
    none, tied = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    k, _ = _solve_columns(plan, none, tied, right)
    weights = plan.mT @ (plan / plan.sum(2, keepdim=True))
    laplacian = torch.diag_embed(weights.sum(2)) - weights
    assert torch.allclose((laplacian @ k[..., None])[..., 0], right, atol=1e-6)
    assert k[:, 0].abs().max() < 1e-6 * k.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_system_that_cannot_be_solved_gives_no_step(bad: float) -> None:
    plan = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) / 20
    right = torch.full((3, 5), 0.01)
    none, tied = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    k, h = _solve_columns(plan, none, tied, right)
    assert k.isfinite().all() and k.abs().sum(1).min() > 0
    broken, wrong = plan.clone(), right.clone()
    broken[1, 2, 3], wrong[2] = bad, bad
    found, found_h = _solve_columns(broken, none, tied, wrong)
    assert torch.equal(found[0], k[0]) and not found[1:].any() and not found_h[1:].any()


def test_the_residual_is_large_when_the_rounds_do_not_suffice() -> None:
    cost = cost_matrix(64, seed=3)[None]
    assert solve(cost, 0.8, 0.01, steps=1).residual > 1e-3 > solve(cost, 0.8, 0.01).residual


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (16, 16)])
def test_hard_problems_converge_as_well(n: int, m: int) -> None:
    """Nearly sparse plans: Newton steps without a bound lose one problem in twelve."""
    cost = torch.rand(50, n, m, generator=torch.Generator().manual_seed(0))
    lost = sum((solve(cost, mass, 0.005).residual > 1e-3).sum() for mass in MASSES)
    assert lost <= 4  # of 200


def test_permuting_rows_permutes_the_plan() -> None:
    cost, order = cost_matrix(9)[None], torch.randperm(9)
    assert torch.allclose(
        partial_plan(cost[:, order], 0.8), partial_plan(cost, 0.8)[:, order], atol=1e-6
    )


def test_problems_of_a_batch_are_independent() -> None:
    cost = torch.stack((cost_matrix(6, seed=1), cost_matrix(6, seed=2)))
    assert torch.allclose(partial_plan(cost, 0.8)[1], partial_plan(cost[1:], 0.8)[0], atol=1e-6)


def test_an_outlier_is_left_unmatched() -> None:
    cost = torch.zeros(1, 4, 4)
    cost[:, 3] = 2.0  # slice 3 resembles nothing
    assert partial_plan(cost, 0.75, 0.05)[0, 3].sum() < 1e-6


def test_a_small_epsilon_finds_the_assignment() -> None:
    cost = 1 - torch.eye(5)[torch.tensor([2, 0, 1, 4, 3])][None]
    assert torch.allclose(partial_plan(cost, 1, 0.01), (1 - cost) / 5, atol=1e-5)


def test_a_large_epsilon_spreads_evenly() -> None:
    assert torch.allclose(
        partial_plan(torch.rand(1, 4, 6), 0.5, 1e4), torch.tensor(0.5 / 24), atol=1e-5
    )


@pytest.mark.parametrize("mass", [0.5, 0.9, 1])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_the_implicit_gradient_equals_finite_differences(mass: float, epsilon: float) -> None:
    cost = cost_matrix(5, seed=4)[None].requires_grad_()
    weight = torch.randn(1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(c: Tensor) -> Tensor:
        return (weight * partial_plan(c, mass, epsilon, steps=24)).sum()

    assert torch.autograd.gradcheck(value, (cost,), eps=1e-6, atol=1e-4, rtol=1e-3)


def test_the_gradient_in_float32_is_that_in_float64() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        cost = cost_matrix(10, seed=6)[None].to(dtype).requires_grad_()
        found.append(torch.autograd.grad(partial_plan(cost, 0.8).square().sum(), cost)[0].double())
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[1].abs().max()


def test_a_slack_marginal_may_fall_short_and_another_may_not() -> None:
    marginal = torch.tensor([[0.5, 0.4]])
    assert float(_violation(marginal, torch.tensor([[False, False]]))) == pytest.approx(0.2)
    assert float(_violation(marginal - 0.1, torch.tensor([[True, True]]))) == 0


@pytest.mark.parametrize("mass", [0.8, 1])
def test_finite_at_small_epsilon_in_float32_and_under_autocast(mass: float) -> None:
    """Defect 7."""
    cost = cost_matrix(40, seed=5)[None].float().requires_grad_()
    plain = solve(cost, mass, 0.005).log_plan
    with torch.autocast("cpu", torch.bfloat16):
        inside = solve(cost, mass, 0.005).log_plan
    assert plain.dtype == inside.dtype == torch.float32 and torch.equal(plain, inside)
    (gradient,) = torch.autograd.grad(inside.square().sum(), cost, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (low,) = torch.autograd.grad(inside.square().sum(), cost)
    assert torch.equal(low, gradient)
    plain.diagonal(dim1=1, dim2=2).sum().backward()
    assert plain.isfinite().all() and cost.grad is not None and cost.grad.isfinite().all()


def test_ties_and_zero_costs_are_finite() -> None:
    for cost in (torch.zeros(1, 3, 3), torch.ones(1, 3, 3), torch.eye(3)[None] * 1e4):
        leaf = cost.clone().requires_grad_()
        partial_plan(leaf, 0.8, 0.1).sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_no_iteration_is_recorded() -> None:
    """Defect 12: the public code records about 205,000 operations a loss."""
    cost = cost_matrix(8)[None].requires_grad_()
    nodes, seen = [solve(cost, 0.95).log_plan.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    assert len(seen) <= 3


def test_wrong_arguments_are_named() -> None:
    cost = torch.zeros(1, 3, 3)
    for arguments, message in (
        ((cost[0], 0.5), r"cost must have shape \(b, n, m\).* got \(3, 3\)"),
        ((cost, 0.0), r"mass must be in \(0, 1\], got 0.0"),
        ((cost, 1.5), r"mass must be in \(0, 1\], got 1.5"),
        ((cost, 0.5, 0.0), "epsilon must be > 0, got 0.0"),
        ((cost, 0.5, 0.1, 0), "steps must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            partial_plan(*arguments)
    assert math.isclose(float(partial_plan(cost, 0.5).sum()), 0.5, rel_tol=1e-4)
