"""The losses by name, and the one that a configuration asks for."""

from __future__ import annotations

from engine.algorithms.base import Objective, SumObjective
from engine.algorithms.dpo import DpoObjective
from engine.algorithms.entropy import EntropyObjective
from engine.algorithms.grpo import GrpoObjective
from engine.config.options import Algorithm


def make_objective(algorithm: Algorithm, *, sampled: bool = True) -> Objective:
    """What the configuration asks for: DPO, GroupDPO with alpha * GRPO, or GRPO; and entropy_weight * entropy. `sampled`:
    see DpoObjective."""
    main = GrpoObjective(algorithm) if algorithm.loss == "grpo" else DpoObjective(algorithm, sampled=sampled)
    parts: list[tuple[float, Objective]] = [(1.0, main)]
    if algorithm.alpha:
        parts.append((algorithm.alpha, GrpoObjective(algorithm)))
    if algorithm.entropy_weight:
        parts.append((algorithm.entropy_weight, EntropyObjective(algorithm)))
    return main if len(parts) == 1 else SumObjective(parts)
