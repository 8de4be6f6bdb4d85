"""The benchmark of the host's path follows the run's own functions: it must still run when they change."""

from __future__ import annotations

from tools.bench_scale import Step, path_of


def test_a_small_step_goes_the_whole_path() -> None:
    """On 1 and on 3 data-parallel ranks; 8 bytes a token are sent, and what stands beside them."""
    step = Step(0.01, 100)
    found = path_of(step, [1, 3], 1)
    assert found["tokens"] == step.num_tokens >= 10_000 and found["responses"] == len(step.requests)
    assert list(found["before_dealing"]) == [
        "completions, in an engine",
        "pickle, in an engine",
        "unpickle",
        "metrics",
        "sequences",
        "records, handed over",
    ]
    for num_ranks, one in found["by_ranks"].items():
        assert list(one["seconds"]) == ["outlines", "dealing", "encode, all", "decode, own", "pack, own"]
        assert 8 * step.num_tokens <= one["sent_bytes"] < 12 * step.num_tokens
        assert one["largest_bytes"] == one["sent_bytes"] if num_ranks == 1 else one["largest_bytes"] < one["sent_bytes"] / 2
