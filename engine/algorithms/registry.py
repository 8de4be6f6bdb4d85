"""The algorithm that a configuration asks for, the loss that the policy minimises for it, and what a checkpoint records of a
user's own parts."""

from __future__ import annotations

from functools import partial
from typing import Any

from engine.algorithms.base import Algorithm, Loss, SumLoss
from engine.algorithms.entropy import EntropyBonus
from engine.config.options import LOSSES, AlgorithmOptions
from engine.core.errors import ConfigError
from engine.core.registry import called, identity


def make_algorithm(options: AlgorithmOptions, *, sampled: bool = True) -> Algorithm:
    """The algorithm of algorithm.loss. `sampled`: see Algorithm. ConfigError for a user's own that cannot be made."""
    loss = LOSSES.load(options.loss)
    if ":" in options.loss:
        loss.require_parts(options.loss)
        make = partial(_make, loss, options, sampled)
        made = called(options.loss, "algorithm.loss", make, error=ConfigError)
    else:
        made = loss(options, sampled=sampled)
    assert isinstance(made, Algorithm), made
    return made


def _make(loss: Any, options: AlgorithmOptions, sampled: bool) -> Any:
    return loss(options, sampled=sampled)


def make_loss(options: AlgorithmOptions, *, sampled: bool = True) -> Loss:
    """What the policy minimises: the algorithm's loss, and entropy_weight * minus the entropy."""
    main = make_algorithm(options, sampled=sampled)
    if not options.entropy_weight:
        return main
    return SumLoss([(1.0, main), (options.entropy_weight, EntropyBonus(options.reduction))])


def identities(options: AlgorithmOptions) -> dict[str, str | None]:
    """SHA-256 of the file of each part that is the user's own, by option; nothing for ours."""
    names = {f"algorithm.{key}": getattr(options, key, "") for key in ("loss", "normalize_advantages", "pairing")}
    return {option: identity(name, option) for option, name in names.items() if ":" in name}
