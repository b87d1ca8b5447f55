"""`allocate_bits`: the widths with the least sum of scores within a budget, an integer program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_n2uq.convert.policy import Policy, Rule
from lightning_n2uq.convert.scores import LayerScores, Sensitivity
from lightning_n2uq.convert.widths import FORMS, Width, at_width, width
from lightning_n2uq.utils.validation import check, check_choice

COSTS: dict[str, Callable[[LayerScores, Width], int]] = {
    "bitops": LayerScores.bit_operations,
    "weight_bytes": LayerScores.weight_bytes,
    "mean_bits": LayerScores.bits_of_weights,
}
"""What a budget may limit: a layer's cost at a width, integers that add up. Mean bits are per weight."""

_UNIFORM = "uniform:"
_MOST_CUTS = 200


@dataclass(frozen=True)
class Allocation:
    """The widths of all layers, and what they cost.

    Attributes:
        widths: The width of every layer by name.
        scores: The sensitivity that they were chosen by.
        by: `kl` or `loss`.
        budget: The budget as the user wrote it.
        limit: The largest cost that it allows, in the units of `COSTS`.
        cost: The cost of these widths, in the same units.
        score: The sum of the layers' scores.
    """

    widths: dict[str, Width]
    scores: Sensitivity
    by: str
    budget: str
    limit: float
    cost: int
    score: float

    def to_policy(self) -> Policy:
        """Returns the policy of the sensitivity with a rule for each layer, before the rules it had."""
        policy = self.scores.policy
        rules = [_rule(layer, self.widths[layer.name], policy) for layer in self.scores.layers]
        return Policy.from_mapping(
            {**policy.to_mapping(), "rules": [*map(vars, rules), *map(vars, policy.rules)]}
        )

    def uniform(self) -> dict[Width, tuple[int, float]]:
        """Returns cost and sum of scores of every width, were it that of all layers."""
        layers, cost = self.scores.layers, COSTS[_kind(self.budget)]
        return {
            bits: (sum(cost(x, bits) for x in layers), sum(getattr(x, self.by)[bits] for x in layers))
            for bits in self.scores.widths
        }

    def __str__(self) -> str:
        unit = _units(self.scores, self.budget)
        rows = [(name, str(bits)) for name, bits in self.widths.items()]
        size = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(size)}  {bits}" for name, bits in rows]
        cost, limit = _amount(self.cost, unit), _amount(self.limit, unit)
        lines.append(f"{self.budget}: {cost} of {limit}, sum of {self.by} {self.score:.4g}")
        lines += [
            f"uniform {bits}: {_amount(whole, unit)}, sum of {self.by} {score:.4g}"
            for bits, (whole, score) in self.uniform().items()
        ]
        return "\n".join(lines)


def allocate_bits(scores: Sensitivity, budget: str, by: str | None = None) -> Allocation:
    """Chooses a width for every layer: the least sum of scores whose cost stays within the budget.

    Scores of layers are added as if layers did not influence each other. The program is solved to optimality
    by HiGHS (`scipy.optimize.milp`); costs are checked in integers.

    Args:
        scores: What `sensitivity` has found.
        budget: `NAME=VALUE`, the name one of `COSTS`. The value is a number (bit operations of one input,
            bytes of packed weights, mean bits of a weight), or `uniform:4` for what that width would cost
            all layers, or a multiple such as `0.9*uniform:4`. Layers outside of the scores do not count.
        by: `kl` or `loss`; the first that there is by default.

    Raises:
        ValueError: The budget is none, or too small; or a score is not finite.
    """
    by = check_choice("by", scores.measures[0] if by is None else by, scores.measures)
    (kind, _, _), limit = read_budget(budget), _limit(scores, budget)
    costs = [[COSTS[kind](layer, bits) for bits in scores.widths] for layer in scores.layers]
    values = [[getattr(layer, by)[bits] for bits in scores.widths] for layer in scores.layers]
    for layer, row in zip(scores.layers, values, strict=True):
        for bits, value in zip(scores.widths, row, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"scores: got {by} {value} of {layer.name} at {bits} bits, allowed are numbers"
                )
    smallest = sum(map(min, costs))
    if smallest > limit:
        unit = _units(scores, budget)
        raise ValueError(
            f"budget: got {budget!r}, allowed is {_rounded_up(smallest / unit)} or more: the cheapest of the "
            f"widths {', '.join(map(str, scores.widths))} in all {len(scores.layers)} layers"
        )
    chosen = solve(values, costs, limit)
    return Allocation(
        {layer.name: scores.widths[i] for layer, i in zip(scores.layers, chosen, strict=True)},
        scores,
        by,
        budget,
        limit,
        sum(row[i] for row, i in zip(costs, chosen, strict=True)),
        sum(row[i] for row, i in zip(values, chosen, strict=True)),
    )


def solve(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], limit: float) -> list[int]:
    """Returns a choice per row with the least sum of `values` among those whose `costs` add up to `limit`.

    The solver works in floats; a choice that exceeds the limit by its tolerance is cut off, and it goes on.
    """
    import numpy as np
    from scipy.optimize import LinearConstraint, milp

    rows, columns = len(values), len(values[0])
    objective = np.asarray(values, float).ravel()
    objective = objective / max(np.abs(objective).max(), np.finfo(float).tiny)
    scale = max(limit, 1.0)
    one_each = LinearConstraint(np.kron(np.eye(rows), np.ones(columns)), 1, 1)  # type: ignore[arg-type]
    within = LinearConstraint(np.asarray(costs, float).reshape(1, -1) / scale, -np.inf, limit / scale)
    constraints = [one_each, within]
    for _ in range(_MOST_CUTS):
        found = milp(
            objective,
            integrality=np.ones(objective.size),
            bounds=(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        chosen = [int(i) for i in found.x.reshape(rows, columns).argmax(1)]
        if sum(row[i] for row, i in zip(costs, chosen, strict=True)) <= limit:
            return chosen
        cut = np.zeros((1, objective.size))
        cut[0, [r * columns + i for r, i in enumerate(chosen)]] = 1
        constraints.append(LinearConstraint(cut, -np.inf, rows - 1))
    raise RuntimeError(f"the solver found no widths within {limit}: {found.message}")


def read_budget(budget: str) -> tuple[str, float, Width | None]:
    """Returns the name, the number, and the uniform width that the number is a multiple of, or None.

    Raises:
        ValueError: It is none.
    """
    text = budget.partition("=")[2].strip()
    factor, star, uniform = text.rpartition("*")
    if not uniform.strip().startswith(_UNIFORM):
        return _kind(budget), _number(text, budget), None
    bits = width(uniform.strip().removeprefix(_UNIFORM), "budget")
    return _kind(budget), _number(factor, budget) if star else 1.0, bits


def _kind(budget: str) -> str:
    name, equals, _ = budget.partition("=")
    check(bool(equals), "budget", budget, f"is NAME=VALUE with {', '.join(COSTS)}")
    return check_choice("budget", name.strip(), COSTS)


def _limit(scores: Sensitivity, budget: str) -> float:
    """Returns the largest cost that a budget allows."""
    kind, number, bits = read_budget(budget)
    if bits is None:
        return number * _units(scores, budget)
    return number * sum(COSTS[kind](layer, bits) for layer in scores.layers)


def _units(scores: Sensitivity, budget: str) -> int:
    """Returns how much of a cost is 1 in the user's words: all weights for mean bits."""
    return sum(x.weights for x in scores.layers) if _kind(budget) == "mean_bits" else 1


def _number(text: str, budget: str) -> float:
    try:
        value = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = math.nan
    allowed = f"is a number above 0, {_UNIFORM}WIDTH or NUMBER*{_UNIFORM}WIDTH; widths {FORMS}"
    check(math.isfinite(value) and value > 0, "budget", budget, allowed)
    return value


def _amount(cost: float, unit: int) -> str:
    return f"{cost:,.0f}" if unit == 1 else f"{cost / unit:.4g}"


def _rounded_up(value: float) -> str:
    """Returns a number that is not below the value, whole where it is large."""
    return str(math.ceil(value)) if value >= 100 else f"{math.ceil(value * 10_000) / 10_000:g}"


def _rule(layer: LayerScores, bits: Width, policy: Policy) -> Rule:
    """Returns the rule that gives a layer its width, and its methods where they are not the policy's."""
    spec = at_width(layer.spec, bits)
    methods: dict[str, Any] = {
        name: getattr(spec, name)
        for name in ("weight_quantizer", "activation_quantizer")
        if getattr(spec, name) != getattr(policy, name)
    }
    return Rule(
        layer.name,
        position=layer.position,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        **methods,
    )
