"""Figures of judged games: win rates with a bootstrap over questions, how much the order of the answers matters, and the
length-controlled win rate of the alpaca_eval package. It asks nobody.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.benchmarks.answers import Answer
from engine.benchmarks.judge import Judged
from engine.core.errors import ConfigError, DataError

POINTS = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}  # for A
STRONG_WEIGHT = 3  # Arena-Hard v0.1 counts "much better" three times
RESAMPLES, SEED = 1000, 0
ALPACA_EVAL_QUESTIONS = 805


def win_rates(judged: Sequence[Judged]) -> dict[str, Any]:
    """Figures as fractions, from the model's side: a win is 1, a tie 0.5. A question counts by the mean of its games;
    `standard_error` is a bootstrap's over questions. `arena_score` weighs strong verdicts as Arena-Hard does, over games,
    with a 95% interval of the same bootstrap. `first_win_rate` is that of whoever stood first: 0.5 without a position bias.
    Games without a verdict count nowhere but in `num_unparsable`. DataError when none has one."""
    read = [game for game in judged if game.verdict is not None]
    if not read:
        raise DataError(f"at least one reply must hold a verdict; found none in {len(judged)}: look at the replies in --output")
    sums: dict[str, list[float]] = {}  # question -> points, games, weighted points, weights
    for game in read:
        points, weight = points_of(game), STRONG_WEIGHT if game.verdict in ("A>>B", "B>>A") else 1
        row = sums.setdefault(game.question_id, [0.0] * 4)
        for place, value in enumerate((points, 1.0, weight * points, float(weight))):
            row[place] += value
    table = np.array(list(sums.values()))
    draws = table[np.random.default_rng(SEED).integers(0, len(table), (RESAMPLES, len(table)))]  # [RESAMPLES, questions, 4]
    rates = (draws[:, :, 0] / draws[:, :, 1]).mean(1)
    scores = draws[:, :, 2].sum(1) / draws[:, :, 3].sum(1)
    low, high = np.quantile(scores, (0.025, 0.975))
    return {
        "win_rate": float((table[:, 0] / table[:, 1]).mean()),
        "standard_error": float(rates.std(ddof=1)),
        "arena_score": float(table[:, 2].sum() / table[:, 3].sum()),
        "arena_interval": [float(low), float(high)],
        "first_win_rate": math.fsum(POINTS[str(game.verdict)] for game in read) / len(read),
        "num_questions": len(table),
        "num_games": len(read),
        "num_unparsable": len(judged) - len(read),
        "verdicts": dict(sorted(Counter(str(game.verdict) for game in read).items())),
    }


def points_of(game: Judged) -> float:
    """1, 0.5 or 0 for the model."""
    points = POINTS[str(game.verdict)]
    return points if game.model_first else 1.0 - points


def check_length_control(answers: Sequence[Answer]) -> None:
    """ConfigError or DataError when the length-controlled win rate could not be had; asked before the judge is paid."""
    if importlib.util.find_spec("alpaca_eval") is None:
        raise ConfigError(
            "--length-controlled needs the alpaca_eval package; found none: install it (pip install alpaca_eval==0.6.6), or "
            "leave the option out"
        )
    if len(answers) != ALPACA_EVAL_QUESTIONS:
        raise DataError(
            f"--length-controlled needs answers to AlpacaEval's {ALPACA_EVAL_QUESTIONS} questions in their order, whose "
            f"difficulties it knows by number; found {len(answers)}: leave the option out"
        )


def length_controlled(
    judged: Sequence[Judged], answers: Sequence[Answer], baseline: Sequence[Answer], annotator: str
) -> dict[str, float]:
    """AlpacaEval's `length_controlled_v1` win rate and its standard error, as fractions (Dubois et al. 2024, arXiv
    2404.04475), by the package itself: a logistic regression on the difference in length and on each question's difficulty.

    A question's preference is the mean of its games; one without a verdict is left out of the fit. The package reads a table
    of its own from the Hugging Face hub or its cache; DataError where it cannot.
    """
    from alpaca_eval.metrics.glm_winrate import get_length_controlled_winrate

    points: dict[str, list[float]] = {}
    for game in judged:
        if game.verdict is not None:
            points.setdefault(game.question_id, []).append(points_of(game))
    theirs = {answer.question_id: answer for answer in baseline}
    annotations = [
        {
            "instruction": answer.instruction,
            "output_1": theirs[answer.question_id].output,
            "generator_1": theirs[answer.question_id].generator,
            "output_2": answer.output,
            "generator_2": answer.generator,
            "annotator": annotator,
            "preference": 1.0 + float(np.mean(points.get(answer.question_id, [math.nan]))),
        }
        for answer in answers
    ]
    try:
        found = get_length_controlled_winrate(annotations, save_weights_dir=None)
    except OSError as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"--length-controlled needs AlpacaEval's table df_gamed.csv from the Hugging Face hub or its cache; found: {why}: "
            f"run once with a network"
        ) from error
    return {
        "length_controlled_win_rate": float(found["length_controlled_winrate"]) / 100,
        "length_controlled_standard_error": float(found["lc_standard_error"]) / 100,
    }
