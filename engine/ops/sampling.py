"""A token drawn from each row of logits, with its log-prob and rank, as an engine on a CPU decodes: one kernel that reads a row
three times, twice of these from the cache (csrc/sampling). It masks nothing and keeps no state of a generator.

Shape legend: T rows, one a request, V vocabulary.
"""

from __future__ import annotations

import torch


def sample_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, *, raw_log_probs: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [T] int64, log_probs [T] float32, ranks [T] int64) of logits [T, V] in float32, bfloat16 or float16 on a CPU,
    temperatures [T] float32 and seeds [T] int64.

    A row's token is the first whose cumulative sum of softmax(logits / temperature) exceeds the 53 highest bits of
    splitmix64(seed), taken as a number in [0, 1): the inverse of the distribution function (Devroye 1986, section III.2). So it
    depends on the row, its temperature and its seed alone, not on other rows or on the number of threads; another instruction
    set may round a boundary differently. What is -infinity is never drawn. Its log-prob is that of softmax(logits /
    temperature), or with `raw_log_probs` of softmax(logits); its rank is how many logits are at least its own. A row that is no
    distribution (a NaN, +infinity, or nothing but -infinity) gets token 0, log-prob NaN and rank 0.

    ValueError for wrong shapes or types, an empty vocabulary, and a temperature that is not above 0 or not finite.
    """
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    found = torch.ops.semion.sample_tokens(logits, temperatures, seeds, raw_log_probs)
    return found
