"""Masks: within real tokens, disjoint and complete, the ratio asked for, one seed one plan."""

import pytest
import torch

from mmssl.nn.masking import axis_mask, channel_mask, plan_of, random_mask, span_mask, stripes, take
from mmssl.types import valid_mask

LENGTHS = torch.tensor([49, 30, 12, 5, 2, 1])
SEEDS = torch.arange(6)


def plans(lengths=LENGTHS, seeds=SEEDS, clones=1):
    yield random_mask(lengths, ratio=0.75, seeds=seeds, clones=clones)
    yield span_mask(lengths, prob=0.65, span=10, seeds=seeds, clones=clones)


@pytest.mark.parametrize("clones", [1, 3])
def test_hidden_and_kept_are_disjoint_and_complete_and_leave_padding_alone(clones):
    for plan in plans(clones=clones):
        valid = valid_mask(LENGTHS[plan.rows], 49)
        assert not (plan.masked & ~valid).any()
        for row in range(len(plan.rows)):
            kept = plan.keep[row][plan.keep_valid[row]]
            assert (kept.diff() > 0).all()
            shown = torch.zeros(49, dtype=torch.bool).index_fill(0, kept, True)
            assert torch.equal(shown, valid[row] & ~plan.masked[row])
            assert shown.any()


def test_a_row_has_the_same_mask_in_whatever_batch_it_comes():
    for whole, part in zip(plans(), plans(LENGTHS[1:3], SEEDS[1:3]), strict=True):
        assert torch.equal(whole.masked[1:3, :30], part.masked)


def test_copies_of_a_clip_have_masks_of_their_own():
    for plan in plans(clones=2):
        assert plan.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert not torch.equal(plan.masked[0], plan.masked[1])


def test_the_random_share_is_the_ratio_of_real_tokens_within_half_a_token():
    lengths = torch.randint(2, 200, (500,), generator=torch.Generator().manual_seed(0))
    for ratio in (0.1, 0.5, 0.75, 0.9):
        hidden = random_mask(lengths, ratio=ratio, seeds=torch.arange(500)).masked.sum(1)
        expected = (lengths * ratio).clamp_min(1).minimum(lengths - 1)
        assert ((hidden - expected).abs() <= 0.5).all()


def test_every_token_is_hidden_as_often_as_every_other():
    share = random_mask(torch.full((4000,), 20), ratio=0.75, seeds=torch.arange(4000)).masked.float().mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_spans_hide_the_share_that_independent_starts_predict():
    # A token far from the ends is visible when none of the 10 starts that reach it was drawn: 780 * .065 = 50.7
    # starts among 771 places leave it visible with chance (1 - 50.7 / 771) ** 10 = .506.
    masked = span_mask(torch.full((400,), 780), prob=0.65, span=10, seeds=torch.arange(400)).masked
    share = masked[:, 20:-20].float().mean()
    assert abs(share - (1 - (1 - 50.7 / 771) ** 10)) < 0.01


def test_spans_are_runs_of_the_length_asked_for():
    masked = span_mask(torch.full((200,), 300), prob=0.05, span=10, seeds=torch.arange(200), min_spans=1).masked
    for row in masked.int().tolist():
        runs = [len(run) for run in "".join(map(str, row)).split("0") if run]
        assert runs
        assert min(runs) >= 10


def test_a_row_has_its_least_number_of_runs_however_small_the_share():
    # two runs of 3 that begin at different tokens hide at least 4
    masked = span_mask(torch.full((200,), 60), prob=1e-6, span=3, seeds=torch.arange(200), min_spans=2).masked
    assert masked.sum(1).min() == 4
    assert masked.sum(1).max() == 6


def test_the_last_token_is_hidden_as_often_as_the_first():
    # one generator of spans hid the last row and column of a picture never; ends must be symmetric
    masked = span_mask(torch.full((4000,), 100), prob=0.3, span=5, seeds=torch.arange(4000)).masked.float().mean(0)
    assert abs(masked[0] - masked[-1]) < 0.02
    assert masked[0] > 0


def test_an_explicit_mask_becomes_a_plan():
    masked = torch.tensor([[True, False, True, False], [False, True, False, False]])
    plan = plan_of(masked, torch.tensor([4, 3]))
    assert plan.keep.tolist() == [[1, 3], [0, 2]]
    assert plan.keep_lengths.tolist() == [2, 2]
    x = torch.arange(8.0).view(2, 4, 1)
    assert take(x, plan.keep)[..., 0].tolist() == [[1, 3], [4, 6]]


def test_channels_are_hidden_in_runs_for_the_whole_clip():
    masked = channel_mask(300, 192, prob=0.5, span=64, seeds=torch.arange(300))
    assert masked.shape == (300, 192)
    assert 0.2 < masked.float().mean() < 0.5  # runs overlap, so less than .5


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5])
def test_a_ratio_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        random_mask(LENGTHS, ratio=ratio, seeds=SEEDS)


def test_an_axis_mask_hides_whole_times_and_whole_frequencies_of_a_clips_own():
    grid, times = (10, 4), torch.tensor([10, 5, 2, 1])
    plan = axis_mask(times * 4, grid=grid, ratios=[0.3, 0.25], seeds=torch.arange(4))
    for row, n in enumerate(times.tolist()):
        masked = plan.masked[row].view(grid)
        assert not masked[n:].any()
        # of 10, 5, 2 and 1 times .3 is 3, 2 (1.5 to the even), 1 and 0; of 4 frequencies .25 is 1
        whole_times, whole_bands = masked[:n].all(1), masked[:n].all(0)
        assert int(whole_times.sum()) == {10: 3, 5: 2, 2: 1, 1: 0}[n]
        assert int(whole_bands.sum()) == 1
        assert torch.equal(masked[:n], whole_times[:, None] | whole_bands)
        assert int(plan.keep_lengths[row]) == (n - int(whole_times.sum())) * 3


def test_an_axis_mask_is_the_clips_own_in_whatever_batch_it_comes():
    whole = axis_mask(torch.tensor([40, 20]), grid=(10, 4), ratios=[0.4, 0.5], seeds=torch.tensor([7, 8]))
    alone = axis_mask(torch.tensor([20]), grid=(5, 4), ratios=[0.4, 0.5], seeds=torch.tensor([8]))
    assert torch.equal(whole.masked[1, :20], alone.masked[0])
    other = axis_mask(torch.tensor([20]), grid=(5, 4), ratios=[0.4, 0.5], seeds=torch.tensor([9]))
    assert not torch.equal(other.masked, alone.masked)


def test_an_axis_mask_always_leaves_a_token():
    for seed in range(20):
        plan = axis_mask(torch.tensor([12]), grid=(3, 4), ratios=[0.99, 0.99], seeds=torch.tensor([seed]))
        assert plan.keep_lengths.tolist() == [1]


def test_stripes_are_one_run_of_a_clips_own_frames_and_one_of_bands():
    lengths = torch.tensor([40, 10, 1])
    longest = torch.zeros(3, 2, dtype=torch.int64)
    for seed in range(200):
        hidden = stripes(lengths, 12, time=0.25, frequency=0.5, seeds=torch.arange(3) + 3 * seed)
        assert hidden.shape == (3, 40, 12)
        for row, n in enumerate(lengths.tolist()):
            assert not hidden[row, n:].any()
            times, bands = hidden[row, :n].all(1), hidden[row, :n].all(0)
            assert torch.equal(hidden[row, :n], times[:, None] | bands)
            for place, line in enumerate((times, bands)):
                run = line.nonzero()[:, 0]
                assert len(run) == 0 or int(run[-1] - run[0]) + 1 == len(run)
                longest[row, place] = max(int(longest[row, place]), len(run))
    # a quarter of 40, 10 and 1 frames, and half of 12 bands
    assert longest.tolist() == [[10, 6], [2, 6], [0, 6]]


def test_stripes_reach_every_frame_and_are_the_clips_own_in_any_batch():
    seeds = torch.arange(400)
    hidden = stripes(torch.full((400,), 8), 4, time=0.5, frequency=0.0, seeds=seeds)
    assert hidden.any(2).any(0).all()
    alone = stripes(torch.tensor([8]), 4, time=0.5, frequency=0.0, seeds=seeds[3:4])
    together = stripes(torch.tensor([20, 8]), 4, time=0.5, frequency=0.0, seeds=torch.tensor([1, 3]))
    assert torch.equal(together[1, :8], alone[0])
