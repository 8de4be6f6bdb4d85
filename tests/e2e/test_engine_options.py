"""Options of sampling and of [inference.vllm] through a real engine: what masks leave, what is left of an
answer that a text ends, and that vLLM has the arguments that it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import RunConfig
from tests.e2e.test_commands import written

pytestmark = pytest.mark.timeout(600)
MASKS: tuple[dict[str, Any], ...] = ({}, {"top_k": 1}, {"min_p": 1.0})
WARM = "sampling.temperature=2.0"  # the seed model's answers are short and nearly all the same


def probed(config: RunConfig, folder: Path, *masks: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("engine_probe.py")
    command = [sys.executable, str(script), str(written(config, folder)), *map(json.dumps, masks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_masks_and_ends_of_an_engine(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    plain = probed(run_config(WARM), tmp_path, *MASKS)
    assert plain["engine"]["model_runner"] == "cpu_model_runner" and plain["engine"]["attention"] == "CPU_ATTN"
    assert plain["engine"]["sampler"] == "KernelSampler"
    assert plain["engine"]["layers"] == "KernelDecoder"
    free, first, likeliest = plain["sampled"]
    assert plain["passes"][0] >= 2 * (max(len(tokens) for tokens, *_ in free) - 1), "every decoding step of both rounds"
    for ours, theirs in zip(free, plain["vllm_layers"][0], strict=True):
        assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=1e-5), "by vLLM's layers, but for rounding"
    assert plain["in_several_calls"] == plain["sampled"], "to the last bit"
    assert all(sum(counts) == len(free) for counts in plain["counts"]) and plain["counts"][0][0] >= len(free) // 2
    assert len(free) > plain["counts"][0][0], "some end later than others"
    assert first == likeliest and len({tuple(tokens) for tokens, *_ in first}) == 1, "one token is left, whatever the seed"
    assert len({tuple(tokens) for tokens, *_ in free}) > 1
    assert min(min(log_probs) for _, log_probs, *_ in first) < -0.01, "log-probs are of all tokens, not of those left"

    *_, other, longest = sorted(free, key=lambda one: len(one[0]))
    pairs = [longest[2][i : i + 2] for i in range(len(longest[2]) - 1)]
    stop = next(pair for pair in reversed(pairs) if pair.isascii())  # no part of bytes that make no letter
    end = next(token for token in other[0] if token not in longest[0])
    options = [WARM, f"sampling.stop=[{json.dumps(stop)}, {end}]", "inference.vllm.max_num_batched_tokens=1024"]
    ended = probed(run_config(*options), tmp_path, {})
    by_text = by_token = 0
    for (tokens, log_probs, text, why), (before, known, _, _) in zip(ended["sampled"][0], free, strict=True):
        assert tokens == before[: len(tokens)], "a stop changes no token before it"
        assert log_probs == pytest.approx(known[: len(tokens)], abs=1e-5)
        assert end not in tokens[:-1] and stop not in text[:-1], "nothing follows a stop, and it stays in the answer"
        by_token += tokens[-1] == end
        by_text += text.endswith(stop)
        assert len(tokens) == len(before) or (why == "stop" and (tokens[-1] == end or text.endswith(stop)))
    assert by_token and by_text
