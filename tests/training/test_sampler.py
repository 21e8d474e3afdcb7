"""Which samples are seen at which step: every sample once in a pass, the same for any division among processes."""

import logging
from itertools import islice

import numpy as np
import pytest

from diffusers_sparse3d.training.balancing import BalancedBatches, SampleGroup, log_balance, make_schedule
from diffusers_sparse3d.training.phases import Phase
from diffusers_sparse3d.training.sampler import BatchSchedule, StreamBatches, TrainingSampler


def log_uniform(count, seed=0):
    """Sizes between a thousand and eighty thousand tokens, as many in each octave."""
    generator = np.random.default_rng(seed)
    return np.exp(generator.uniform(np.log(1_000), np.log(80_000), count)).astype(np.int64)


def group(sizes, batch_size=4, max_tokens=None, resolution=256):
    return SampleGroup(sizes, batch_size, max_tokens, resolution, [f"mesh-{index}" for index in range(len(sizes))])


def flat(step):
    return [key for processes in step for batch in processes for key in batch]


def test_stream_covers_the_data_in_batches_of_one_length():
    batches = StreamBatches(10, 3, seed=7, num_processes=2, num_passes=2)
    stream = [key for number in range(20) for key in flat(batches.step(number))]
    for epoch in range(20):
        assert sorted(key.row for key in stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert [key.row for key in stream[:10]] != [key.row for key in stream[10:20]]
    assert len({key.seed for key in stream}) == len(stream) == 240
    assert all(len(batch) == 3 for processes in batches.step(5) for batch in processes)


@pytest.mark.parametrize("division", [(1, 1, 12), (2, 1, 6), (4, 1, 3), (2, 3, 2), (1, 12, 1)])
def test_stream_is_the_same_however_it_is_divided(division):
    num_processes, num_passes, batch_size = division
    batches = StreamBatches(10, batch_size, 7, num_processes, num_passes)
    for step in (3, 0, 40):
        assert flat(batches.step(step)) == flat(StreamBatches(10, 12, 7).step(step))


def test_streams_go_through_their_resolutions():
    batches = StreamBatches(10, 4, 7, resolutions=[32, 64])
    assert [{key.resolution for key in flat(batches.step(step))} for step in range(4)] == [{32}, {64}, {32}, {64}]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_no_process_waits_for_the_largest(batch_size):
    """Sizes from 1k to 80k on 8 processes: the slowest has at most 1.05 times the mean tokens, in the mean."""
    sizes = log_uniform(2_000)
    batches = BalancedBatches([group(sizes, batch_size)], seed=1, num_processes=8)
    steps = 2 * batches.steps_per_round
    tokens = np.array(
        [[sum(sizes[key.row] for key in batch) for batch in batches.step(step)[0]] for step in range(steps)]
    )
    assert (tokens.max(axis=1) / tokens.mean(axis=1)).mean() < 1.05
    # In random order, it would not be so.
    order = np.random.default_rng(0).permutation(2_000)[: 2_000 // (8 * batch_size) * 8 * batch_size]
    shuffled = sizes[order].reshape(-1, 8, batch_size).sum(2)
    assert (shuffled.max(axis=1) / shuffled.mean(axis=1)).mean() > 1.4
    assert steps == 2 * -(-2_000 // (8 * batch_size))


@pytest.mark.parametrize(
    ("count", "batch_size", "num_processes", "num_passes", "level"),
    [
        (100, 1, 8, 1, "WARNING"),
        (2_000, 1, 64, 1, "WARNING"),
        (2_000, 1, 8, 1, "INFO"),
        (2_000, 1, 8, 8, "INFO"),
        (100, 1, 1, 8, None),
    ],
)
def test_a_training_says_how_balanced_it_is(caplog, count, batch_size, num_processes, num_passes, level):
    sizes = log_uniform(count)
    batches = BalancedBatches([group(sizes, batch_size)], 1, num_processes, num_passes)
    schedule = BatchSchedule([(5, StreamBatches(10, 2, 1, num_processes)), (0, batches)])
    with caplog.at_level(logging.INFO):
        # The first phase is cut to one length; the second round of the other is asked for.
        log_balance(schedule, 0)
        assert not caplog.messages
        log_balance(schedule, 5 + batches.steps_per_round)
    if level is None:
        assert not caplog.messages
        return
    steps = [batches.step(batches.steps_per_round + number) for number in range(batches.steps_per_round)]
    tokens = np.array([[sum(sizes[key.row] for key in batch) for batch in part] for step in steps for part in step])
    ratios = tokens.max(axis=1) / tokens.mean(axis=1)
    (record,) = caplog.records
    assert record.levelname == level and ("a larger `batch_size`" in caplog.text) == (level == "WARNING")
    assert f"has {ratios.mean():.3f} times the mean tokens of all (at most {ratios.max():.3f} times)" in caplog.text


def test_batches_of_one_forward_pass_are_nearest_in_size():
    sizes = log_uniform(64)
    batches = BalancedBatches([group(sizes, 1)], seed=1, num_processes=4, num_passes=2)
    for number in range(batches.steps_per_round):
        first, second = ([sum(sizes[key.row] for key in batch) for batch in step] for step in batches.step(number))
        assert max(first) <= min(second) and len({*first, *second}) == 8


@pytest.mark.parametrize("limit", [80_000, 100_000, 160_000, None])
@pytest.mark.parametrize(("num_processes", "num_passes"), [(1, 1), (8, 1), (3, 2)])
def test_every_sample_is_seen_once_within_the_limit(num_processes, num_passes, limit):
    sizes = log_uniform(501, seed=2)
    batches = BalancedBatches([group(sizes, 8, limit)], 5, num_processes, num_passes)
    assert batches.epochs_per_round == 1
    orders = []
    for epoch in range(2):
        steps = [batches.step(epoch * batches.steps_per_round + step) for step in range(batches.steps_per_round)]
        rows = [key.row for step in steps for key in flat(step)]
        assert sorted(rows) == list(range(501))
        orders.append(rows)
        for step in steps:
            assert [len(processes) for processes in step] == [num_processes] * num_passes
            for batch in (batch for processes in step for batch in processes):
                assert batch and (limit is None or sum(sizes[key.row] for key in batch) <= limit)
    assert orders[0] != orders[1]
    if limit is not None:
        # No more batches than the limit asks for: they are at least 9/10 full in the mean.
        number = batches.steps_per_round * num_processes * num_passes
        assert number <= max(501 / 8, sizes.sum() / (0.9 * limit)) + num_processes * num_passes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_samples_that_must_be_alone_in_their_batches(num_processes):
    """No two of them fit into one: batches are as many as samples, in as few passes as make whole steps of them."""
    sizes = np.random.default_rng(0).integers(48_000, 95_000, 997)
    batches = BalancedBatches([group(sizes, 2, 95_000)], 5, num_processes)
    assert batches.epochs_per_round == num_processes and batches.num_batches == [997 * num_processes]
    seen = [key.row for number in range(batches.steps_per_round) for key in flat(batches.step(number))]
    assert sorted(seen) == sorted(list(range(997)) * num_processes)


def test_full_batches_do_not_exceed_the_limit():
    """Pairs that fill a batch to the last token, which packing in a random order would not find."""
    large = np.arange(51, 67)
    batches = BalancedBatches([group(np.concatenate([large, 100 - large]), 2, 100)], 5, num_processes=2)
    for step in range(5 * batches.steps_per_round):
        for batch in batches.step(step)[0]:
            assert sorted(key.row % 16 for key in batch) == [batch[0].row % 16] * 2


def test_other_samples_come_together_in_every_round():
    sizes = log_uniform(64, seed=3)
    batches = BalancedBatches([group(sizes, 4)], 5)
    rounds = [
        {frozenset(key.row for key in flat(batches.step(start + step))) for step in range(batches.steps_per_round)}
        for start in (0, batches.steps_per_round)
    ]
    assert len(rounds[0] & rounds[1]) < len(rounds[0]) / 2


def test_steps_need_no_replay():
    sizes = log_uniform(100)
    one = BalancedBatches([group(sizes)], 5, num_processes=2, num_passes=2)
    steps = [one.step(step) for step in range(40)]
    other = BalancedBatches([group(sizes)], 5, num_processes=2, num_passes=2)
    assert [other.step(step) for step in (39, 2, 17)] == [steps[39], steps[2], steps[17]]
    assert BalancedBatches([group(sizes)], 6, num_processes=2, num_passes=2).step(0) != steps[0]
    for process in (0, 1):
        expected = [processes[process] for step in steps[3:6] for processes in step]
        assert list(islice(TrainingSampler(other, process, start=3), 6)) == expected
    # One process that accumulates sees the same global batches as four, sample for sample.
    divided = BalancedBatches([group(sizes)], 5, num_processes=4)
    assert all(sorted(flat(divided.step(step))) == sorted(flat(steps[step])) for step in range(40))


@pytest.mark.parametrize(("count", "num_processes"), [(1, 1), (1, 4), (3, 8), (10, 8), (20, 8)])
@pytest.mark.parametrize("limit", [None, 80_000])
def test_few_samples_on_many_processes(count, num_processes, limit):
    """Every process has a sample at every step, and each sample is seen as often as every other."""
    sizes = log_uniform(count)
    batches = BalancedBatches([group(sizes, 2, limit)], 0, num_processes)
    steps = [batches.step(step) for step in range(batches.steps_per_round)]
    assert all(batch for step in steps for batch in step[0])
    seen = np.bincount([key.row for step in steps for key in flat(step)], minlength=count)
    assert set(seen) == {batches.epochs_per_round}
    if limit is None:
        # As many passes as make a global batch, or at least a sample for each process.
        assert batches.epochs_per_round == max(1, 2 * num_processes // count, -(-num_processes // count))
    else:
        assert all(sum(sizes[key.row] for key in batch) <= limit for step in steps for batch in step[0])


def test_each_resolution_has_its_own_batches():
    small, large = log_uniform(40) // 20, log_uniform(40)
    groups = [group(small, 8, 20_000, 256), group(large, 2, 81_000, 512)]
    batches = BalancedBatches(groups, 5, num_processes=2)
    seen = []
    for number in range(batches.steps_per_round):
        step = batches.step(number)
        assert len({key.resolution for key in flat(step)}) == 1
        seen += [(key.resolution, key.row) for key in flat(step)]
        for batch in step[0]:
            sizes, limit = (small, 20_000) if batch[0].resolution == 256 else (large, 81_000)
            assert sum(sizes[key.row] for key in batch) <= limit
    assert sorted(seen) == [(resolution, row) for resolution in (256, 512) for row in range(40)]
    resolutions = [flat(batches.step(number))[0].resolution for number in range(batches.steps_per_round)]
    assert resolutions != sorted(resolutions) and resolutions != sorted(resolutions, reverse=True)


def test_samples_that_are_too_large_are_named():
    sizes = np.array([5, 30, 7, 90, 40, 20])
    with pytest.raises(
        ValueError, match=r"`max_tokens` must be at least 90.*'mesh-3' \(90\), 'mesh-4' \(40\)"
    ) as error:
        BalancedBatches([group(sizes, 2, 35, 512)], 0)
    assert "resolution 512" in str(error.value) and "mesh-1" not in str(error.value)
    with pytest.raises(ValueError, match="and 3 more"):
        BalancedBatches([group(sizes, 2, 4)], 0)
    # Three of the largest fit into 270 tokens, of which validation makes its batches.
    assert [BalancedBatches([group(sizes, 5, limit)], 0).batch_sizes for limit in (90, 270, None)] == [
        {256: 1},
        {256: 3},
        {256: 5},
    ]


def test_quantiles_are_stratified_over_the_global_batch():
    batches = BalancedBatches([group(log_uniform(100))], 5, num_processes=2, num_passes=2)
    for number in range(5):
        quantiles = sorted(key.quantile for key in flat(batches.step(number)))
        strata = [int(quantile * len(quantiles)) for quantile in quantiles]
        assert strata == list(range(len(quantiles)))
    # They are not tied to samples, nor to their order in the batch.
    first = [flat(StreamBatches(1, 4, 0).step(step))[0].quantile for step in range(200)]
    assert np.histogram(first, bins=4, range=(0, 1))[0].min() > 30


def test_phases_follow_each_other():
    """256 and 384 for three steps, then 512 in smaller batches, at steps counted from the beginning of each phase."""
    sizes = {256: np.full(8, 10), 384: np.full(8, 20), 512: np.full(8, 40)}
    phases = [Phase(3, [256, 384], [4, 2], [None, None], 1e-3), Phase(2, [512], [2], [40], 1e-4)]
    schedule = make_schedule(phases, sizes.get, list("abcdefgh"), seed=1, num_processes=2)
    steps = [schedule.step(step) for step in range(9)]
    assert {key.resolution for step in steps[:3] for key in flat(step)} <= {256, 384}
    assert {key.resolution for step in steps[3:] for key in flat(step)} == {512}
    assert all(len(batch) == 1 for step in steps[3:] for batch in step[0])
    assert steps[3:] == [schedule.phases[1][1].step(step) for step in range(6)]
    assert schedule.phase(2) == (schedule.phases[0][1], 2) and schedule.phase(7) == (schedule.phases[1][1], 4)
    with pytest.raises(ValueError, match=r"`max_tokens` must be at least 40.*'a' \(40\)"):
        make_schedule([Phase(2, [512], [2], [39], 1e-4)], sizes.get, list("abcdefgh"), 1)
