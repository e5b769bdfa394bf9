"""Batched entropic partial optimal transport with an implicit gradient.

The plan is the KL projection of exp(-cost / epsilon) on {rows <= 1/n, columns <= 1/m, total = mass}
(Benamou et al., 2015, arXiv:1412.5154, prop. 5), the problem that POT's
``entropic_partial_wasserstein`` solves. It has the form exp(f_i + g_j + h - cost_ij / epsilon) with
potentials f, g <= 0 that are zero where a constraint is slack, so a concave dual of n + m + 1
numbers is all there is to find.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EXACT = (
    1024  # up to this size the dual is solved in float64: cheap there, and small epsilon needs it
)
LIMIT = 10.0  # longest Newton step in a potential; the curvature changes by e for each unit
TRIALS = (0.0, 0.2, 1.0)  # step lengths that compete in each round; 0 is a plain Sinkhorn sweep


class Plan(NamedTuple):
    """A solved transport problem.

    ``log_plan`` is (b, n, m). ``residual`` (b,) is the largest violation of the optimality conditions
    in units of one entry's share: 1e-3 means that a row sum is off by 1e-3 / n.
    """

    log_plan: Tensor
    residual: Tensor


def partial_plan(cost: Tensor, mass: float, epsilon: float = 0.1, steps: int = 20) -> Tensor:
    """Match the cheapest share of two uniform sets and leave the rest unmatched.

    Args:
        cost: (b, n, m) pairwise costs, finite.
        mass: share of the total mass to move, in (0, 1].
        epsilon: entropic softening in units of the cost, > 0; the plan tends to a sparse one with it.
        steps: Newton rounds, fixed; see `solve` for a residual that tells whether they sufficed.

    Returns:
        (b, n, m) plan: rows sum to <= 1/n, columns to <= 1/m, everything to ``mass``. Differentiable.
    """
    return solve(cost, mass, epsilon, steps).log_plan.exp()


def solve(cost: Tensor, mass: float, epsilon: float = 0.1, steps: int = 20) -> Plan:
    """Logarithm of the plan, where no entry underflows, and the residual of the solver.

    Args are those of `partial_plan`. Runs in float32 or better, also inside autocast.

    Raises:
        ValueError: ``cost`` is not (b, n, m), or ``mass``, ``epsilon`` or ``steps`` is out of range.
    """
    if cost.ndim != 3 or 0 in cost.shape:
        raise ValueError(
            f"cost must have shape (b, n, m) with no empty axis, got {tuple(cost.shape)}; "
            "add a batch axis with cost[None]"
        )
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}; 1 matches everything")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}; 0.1 is the default")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}; 20 is the default")
    with torch.autocast(cost.device.type, enabled=False):
        cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
        return Plan(*_Transport.apply(cost, float(mass), float(epsilon), steps))


class _Transport(torch.autograd.Function):
    """The solver, differentiated at its fixed point: no iteration is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, mass: float, epsilon: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        f, g, h = _potentials(cost, mass, epsilon, steps)
        log_plan = (f[:, :, None] + (g + h)[:, None]).to(cost.dtype).sub_(cost, alpha=1 / epsilon)
        plan = log_plan.exp()
        rows = plan.sum(2, dtype=f.dtype) * f.shape[1] - 1
        columns = plan.sum(1, dtype=f.dtype) * g.shape[1] - 1
        slack = f == 0, g == 0
        violation = (
            torch.where(slack[0], rows.clamp_min(0), rows.abs()).amax(1),
            torch.where(slack[1], columns.clamp_min(0), columns.abs()).amax(1),
        )
        residual = torch.maximum(*violation).to(cost.dtype)
        ctx.save_for_backward(log_plan, *slack)
        ctx.epsilon = epsilon
        ctx.mark_non_differentiable(residual)
        return log_plan, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        log_plan, slack_rows, slack_columns = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            plan = log_plan.to(_work(log_plan)).exp_()
            row = plan.sum(2)
            pull = grad.sum(2, dtype=plan.dtype).masked_fill_(slack_rows, 0) / _safe(row)
            column = grad.sum(1, dtype=plan.dtype) - _times(pull, plan)
            g = _newton(plan, row, slack_rows, slack_columns, column, 0.0)
            f = (pull - _times(g, plan.mT) / _safe(row)).masked_fill_(slack_rows, 0)
            plan.mul_(f[:, :, None] + g[:, None]).sub_(grad)
            return plan.div_(ctx.epsilon).to(grad.dtype), None, None, None


def _potentials(
    cost: Tensor, mass: float, epsilon: float, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the dual: each round takes the best of three Newton lengths, then a Sinkhorn sweep.

    The sweep settles the bounds f, g <= 0 exactly, where a projected Newton step alone stalls, and
    never loses ground; so the rounds converge from anywhere. At mass 1 every constraint is an equality
    and the bounds are void.
    """
    b, n, m = cost.shape
    cost = cost.to(_work(cost))
    bound = 0.0 if mass < 1 else math.inf
    trials = cost.new_tensor(TRIALS)[None, :, None]
    coarse = (0.1 * (cost.amax((1, 2)) - cost.amin((1, 2)))).clamp_min(epsilon)[:, None]
    g, h = cost.new_zeros(b, m), cost.amin((1, 2))[:, None] / coarse
    for step in range(steps):
        scale = coarse if step == 0 else torch.full_like(coarse, epsilon)
        if step == 1:
            g, h = g * coarse / epsilon, h * coarse / epsilon
        logits = (g + h)[:, None] - cost / scale[:, :, None]
        f = (-math.log(n) - logits.logsumexp(2)).clamp_max(bound)
        if bound == 0:
            top_f, top_g = f.amax(1, keepdim=True), g.amax(1, keepdim=True)
            f, g, h = f - top_f, g - top_g, h + top_f + top_g
            logits = logits + top_f[:, :, None]
        plan = (logits + f[:, :, None]).exp_()
        del logits
        row, column = plan.sum(2), plan.sum(1)
        want = 1 / m - column
        tied = (g >= bound) & (want >= 0)
        move = _newton(plan, row, f >= bound, tied, want, mass - 1)
        dh = torch.where(tied, move, -math.inf).amax(1, keepdim=True)
        dh = torch.where(dh.isfinite(), dh, 0.0)
        dg = (move - dh).clamp(-LIMIT, LIMIT)
        dh = dh.clamp(-LIMIT, LIMIT)
        dg = torch.minimum(trials * dg[:, None], bound - g[:, None])
        dh = trials * dh[:, None]
        row = (dg + dh).exp() @ plan.mT
        df = torch.minimum(-math.log(n) - _safe(row).log(), (bound - f[:, None]).clamp_max(40))
        col = df.exp() @ plan
        dg = torch.minimum(-math.log(m) - _safe(col).log() - dh, bound - g[:, None])
        dh = math.log(mass) - _safe((dg.exp() * col).sum(2, keepdim=True)).log()
        gain = df.mean(2) + dg.mean(2) + mass * dh[:, :, 0]
        best = gain.nan_to_num(-math.inf).argmax(1)[:, None, None]
        f = f + df.gather(1, best.expand(-1, -1, n))[:, 0]
        g = g + dg.gather(1, best.expand(-1, -1, m))[:, 0]
        h = h + dh.gather(1, best)[:, 0]
    return f, g, h


def _newton(
    plan: Tensor, row: Tensor, slack: Tensor, tied: Tensor, rhs: Tensor, extra: float
) -> Tensor:
    """Solve the dual's Hessian, reduced to the columns.

    Eliminating the rows leaves a graph Laplacian over the columns: plan' diag(1/row) plan off the
    diagonal, grounded by the slack rows. Slack columns move together (only with h), as one node.
    """
    b, m = rhs.shape
    weight = plan / _safe(row)[:, :, None].sqrt()
    weight.masked_fill_(slack[:, :, None], 0)
    lap = -(weight.mT @ weight)
    del weight
    lap.diagonal(dim1=1, dim2=2).zero_()
    ground = (plan * slack[:, :, None]).sum(1)
    lap.diagonal(dim1=1, dim2=2).copy_(ground - lap.sum(2))
    border = _times(tied.to(lap.dtype), lap)
    corner = (border * tied).sum(1) + 0
    H = lap.new_zeros(b, m + 1, m + 1)
    H[:, :m, :m] = lap.masked_fill_(tied[:, :, None] | tied[:, None], 0)
    H[:, :m, m] = H[:, m, :m] = border.masked_fill(tied, 0)
    H[:, m, m] = corner
    d = H.diagonal(dim1=1, dim2=2)
    d[:, :m] += tied
    eps = torch.finfo(H.dtype).eps
    d.mul_(1 + 1e3 * eps if H.dtype == torch.float64 else 1 + 10 * eps).add_(
        torch.finfo(H.dtype).tiny
    )
    r = torch.cat([rhs.masked_fill(tied, 0), (rhs * tied).sum(1, keepdim=True) + extra], 1)
    L, info = torch.linalg.cholesky_ex(H)
    x = torch.cholesky_solve(r[:, :, None], L)[:, :, 0]
    x = torch.where((info == 0)[:, None], x, 0).nan_to_num(0, 0, 0)
    return torch.where(tied, x[:, m:], x[:, :m])


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if max(x.shape[1:]) <= EXACT else x.dtype


def _times(vector: Tensor, matrix: Tensor) -> Tensor:
    return (vector[:, None] @ matrix)[:, 0]


def _safe(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)
