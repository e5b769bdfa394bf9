"""Batched entropic partial optimal transport with an implicit gradient.

The plan is the KL projection of exp(-cost / epsilon) on {rows <= 1/n, columns <= 1/m, total = mass}
(Benamou et al., 2015, arXiv:1412.5154, prop. 5), the problem that POT's
``entropic_partial_wasserstein`` solves. It has the form exp(f_i + g_j + h - cost_ij / epsilon) with
potentials f, g <= 0 that are zero where their constraint is slack: n + m + 1 numbers to find.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_STEP = 10.0  # bound on a Newton step in any potential; these are logarithms


class Plan(NamedTuple):
    """A solved problem: ``log_plan`` (b, n, m) and ``residual`` (b,).

    The residual is the largest violation of the optimality conditions as a share of one marginal:
    1e-3 means that a row is off by 1e-3 / n, or a column by 1e-3 / m. It carries no gradient.
    """

    log_plan: Tensor
    residual: Tensor


def solve(cost: Tensor, mass: float, epsilon: float = 0.1, steps: int = 16) -> Plan:
    """Match the cheapest share of two uniform sets and leave the rest unmatched.

    Runs in float32 or better, also inside autocast; never synchronises with the device.

    Args:
        cost: (b, n, m) pairwise costs, finite.
        mass: share of the total mass to move, in (0, 1].
        epsilon: entropic softening, > 0, in units of the cost; towards 0 the plan becomes sparse.
        steps: rounds of the solver, fixed; the residual shows whether they sufficed.

    Returns:
        Logarithm of the plan, in which no entry underflows, differentiable; and the residual. Rows
        of the plan sum to <= 1/n, columns to <= 1/m, all to ``mass``.

    Raises:
        ValueError: ``cost`` is not (b, n, m), or another argument is out of range.

    Examples:
        >>> cost = torch.tensor([[[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]])
        >>> solve(cost, mass=2 / 3, epsilon=0.05).log_plan[0].exp().mul(3).round(decimals=2)
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 0.]])
    """
    if cost.ndim != 3 or 0 in cost.shape:
        raise ValueError(
            f"cost must have shape (b, n, m) without an empty axis, got {tuple(cost.shape)}; "
            "add the batch axis with cost[None]"
        )
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}; 1 matches everything")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}; try 0.1")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}; try 16")
    with torch.autocast(cost.device.type, enabled=False):
        cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
        return Plan(*_Transport.apply(cost, mass, epsilon, steps))


class _Transport(torch.autograd.Function):
    """The solver, differentiated at its fixed point: the backward pass keeps no iteration."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, mass: float, epsilon: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        f, k, slack_rows, slack_columns = _potentials(cost, mass, epsilon, steps)
        log_plan = (f[:, :, None] + k[:, None]).sub_(cost, alpha=1 / epsilon)
        plan = log_plan.exp()
        residual = torch.maximum(
            _violation(plan.sum(2), slack_rows), _violation(plan.sum(1), slack_columns)
        )
        ctx.save_for_backward(log_plan, slack_rows, slack_columns)
        ctx.epsilon = epsilon
        ctx.mark_non_differentiable(residual)
        return log_plan, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        log_plan, slack_rows, slack_columns = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            plan = log_plan.exp()
            row = _positive(plan.sum(2))
            pull = grad.sum(2).masked_fill_(slack_rows, 0) / row
            column = grad.sum(1) - _apply(pull, plan)
            k, _ = _solve_columns(plan, slack_rows, slack_columns, column)
            f = (pull - _apply(k, plan.mT) / row).masked_fill_(slack_rows, 0)
            grad_cost = plan.mul_(f[:, :, None] + k[:, None]).sub_(grad).div_(ctx.epsilon)
            return grad_cost, None, None, None


def _potentials(
    cost: Tensor, mass: float, epsilon: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximise the dual; returns f (b, n), g + h (b, m) and where rows and columns are slack.

    A round solves f and h exactly for the given g, tries three lengths (one of them 0) of a Newton
    step on g and h, ends each with a Sinkhorn sweep and keeps the best. The sweep settles the
    bounds, on which a projected Newton step stalls. One round at a coarser epsilon goes first. At
    mass 1 every constraint is an equality and the bounds are void.
    """
    bound = 0.0 if mass < 1 else math.inf
    n, m = cost.shape[1:]
    lengths = torch.linspace(0, 1, 3, dtype=cost.dtype, device=cost.device)[None, :, None] ** 2
    scale = coarse = (0.1 * (cost.amax((1, 2)) - cost.amin((1, 2)))).clamp_min(epsilon)[:, None]
    g = torch.zeros_like(cost[:, 0])
    for target in [coarse] + [torch.full_like(coarse, epsilon)] * steps:
        g, scale = g * scale / target, target
        plan = (cost / -scale[:, :, None]).add_(g[:, None])
        f, h = _fill(plan.logsumexp(2), mass)
        fh = f + h
        plan = plan.add_(fh[:, :, None]).exp_()
        missing = 1 / m - plan.sum(1)
        tied = (g >= bound) & (missing >= 0)
        step, step_h = _solve_columns(plan, f >= bound, tied, missing, mass - 1)
        step = (step - step_h).clamp(-MAX_STEP, MAX_STEP)
        step_h = step_h.clamp(-MAX_STEP, MAX_STEP)

        f, g, h, fh = f[:, None], g[:, None], h[:, None], fh[:, None]  # (b, lengths, ...) from here
        rows = torch.minimum(lengths * step[:, None], bound - g).exp() @ plan.mT
        new_h = h + lengths * step_h[:, None]
        new_f = (-math.log(n) - _positive(rows).log() + fh - new_h).clamp_max(bound)
        columns = (new_f + new_h - fh).clamp_max(80).exp() @ plan  # exp(80) is safe in float32
        new_g, new_h = _fill(_positive(columns).log() - g - new_h, mass)
        gain = (new_f - f).mean(2) + (new_g - g).mean(2) + mass * (new_h - h)[:, :, 0]
        best = gain.nan_to_num(-math.inf).argmax(1)[:, None, None]
        g = new_g.take_along_dim(best, 1)[:, 0]
    f, h = _fill((g[:, None] - cost / epsilon).logsumexp(2), mass)
    return f, g + h, f >= bound, g >= bound


def _fill(sums: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Scale sums so that, each cut at 1/n, they make ``mass``: water-filling, exact.

    With the k largest cut, k/n + e^h * (rest) = mass gives one h for each k; the largest is right.

    Args:
        sums: (..., n) logarithms.
        mass: in (0, 1]; at 1 every sum becomes 1/n, up or down.

    Returns:
        Logarithm of the cut (..., n), <= 0 unless ``mass`` is 1, and h (..., 1).
    """
    n = sums.shape[-1]
    if mass == 1:
        return -math.log(n) - sums, torch.zeros_like(sums[..., :1])
    whole, part = divmod(mass * n, 1)  # apart, or float32 loses the part at large n
    left = whole - torch.arange(n, dtype=sums.dtype, device=sums.device) + part
    rest = sums.sort(-1).values.logcumsumexp(-1).flip(-1)
    level = (left.clamp_min(1e-6) / n).log().masked_fill(left < 1e-6, -math.inf)
    h = (level - rest).amax(-1, keepdim=True)
    return (-math.log(n) - sums - h).clamp_max(0), h


def _solve_columns(
    plan: Tensor, slack_rows: Tensor, tied: Tensor, right: Tensor, right_h: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Solve the dual's Hessian, with the rows eliminated, for k = g + h.

    What is left is a graph Laplacian on the columns, grounded by the slack rows, in which the tied
    columns (g = 0) are one node that moves with h. Its diagonal is summed from the off-diagonal:
    no cancellation.

    Returns:
        k (b, m) and h (b, 1); zero where the system is singular beyond repair.
    """
    b, m = right.shape
    root = (plan / _positive(plan.sum(2, keepdim=True)).sqrt()).masked_fill_(
        slack_rows[:, :, None], 0
    )
    laplacian = (root.mT @ root).neg_()
    del root  # at n = 4096 each such matrix is 64 MB
    diagonal = laplacian.diagonal(dim1=1, dim2=2)
    diagonal.zero_()
    ground = _apply(slack_rows.to(plan.dtype), plan)
    ground[:, :1].masked_fill_(~slack_rows.any(1, keepdim=True), 1 / m)  # any one pins the constant
    diagonal.copy_(ground - laplacian.sum(2))
    border = _apply(tied.to(plan.dtype), laplacian)
    system = plan.new_zeros(b, m + 1, m + 1)
    system[:, :m, :m] = laplacian.masked_fill_(tied[:, :, None] | tied[:, None], 0)
    system[:, m, :m] = system[:, :m, m] = border.masked_fill(tied, 0)
    system[:, m, m] = (border * tied).sum(1)
    del laplacian
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal[:, :m] += tied
    eps = torch.finfo(plan.dtype).eps
    diagonal.mul_(1 + eps**0.8).add_(eps**2 / m)
    right = torch.cat(
        [right.masked_fill(tied, 0), (right * tied).sum(1, keepdim=True) + right_h], 1
    )
    factor, info = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    solution = torch.where((info == 0)[:, None], solution, 0).nan_to_num(0, 0, 0)
    k, h = solution[:, :m], solution[:, m:]
    return torch.where(tied, h, k), h


def _violation(marginal: Tensor, slack: Tensor) -> Tensor:
    excess = marginal * marginal.shape[1] - 1
    return torch.where(slack, excess.clamp_min(0), excess.abs()).amax(1)


def _apply(vector: Tensor, matrix: Tensor) -> Tensor:
    return (vector[:, None] @ matrix)[:, 0]


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)
