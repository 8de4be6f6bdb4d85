"""The bench of rewards that judge while engines sample: both ways are measured, and give equal rewards."""

from tools import bench_rewards


def test_a_step_is_judged_whole_and_one_by_one():
    found = bench_rewards.measure(num_answers=16, seconds=0.2, num_engines=2, num_workers=1, repeats=1)
    assert found.keys() == {"whole", "one by one"}
    assert all(len(seconds) == 1 and seconds[0] >= 0 for seconds in found.values())
