"""Samples of times."""

from visualglm_tools.benchmarking import timing


def test_token_times_leave_out_the_prompt_and_the_first_token():
    streamer = timing.TokenTimes()
    streamer.times = [0.0, 5.0, 5.5, 5.75]
    assert streamer.intervals() == [500, 250]


def test_sampling_ends_when_the_time_is_up_but_never_without_a_sample():
    assert len(timing.collect(lambda: 1.0, repeats=5, warmup=2)) == 5
    assert len(timing.collect(lambda: 1.0, repeats=5, seconds=0)) == 1
