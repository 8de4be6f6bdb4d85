from engine.forecast.lengths import LogNormal
from tools.bench_streaming import Case, Cut, cut
from tools.scale_balance import PROMPT


def test_waves_and_their_moments_by_hand():
    """Four prompts of two on one engine, which hands over when 4, 2, 1 and 0 are left: two are complete after 4 tokens, the
    third after 8."""
    case = Case(LogNormal(1, 0, 1), 0.0, size=2, num_prompts=4, num_engines=1)
    found = cut([1, 2, 3, 4, 5, 8, 6, 10], case)
    tokens = 4 * PROMPT + 10, 2 * PROMPT + 13, 2 * PROMPT + 16
    assert found == Cut(tuple(one / sum(tokens) for one in tokens), (0.4, 0.8, 1.0))


def test_the_time_of_a_step_by_hand():
    """Half of the training is ready at 0.4 of the sampling: it ends at 0.4 + 0.5, or later than the last response."""
    waves = Cut((0.5, 0.5), (0.4, 1.0))
    assert waves.step_time(1.0) == 1.5
    assert waves.step_time(2.0) == 0.4 + 1.0 + 1.0
    assert Cut((1.0,), (1.0,)).step_time(0.5) == 1.5
