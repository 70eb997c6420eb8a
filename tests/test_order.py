"""Rows per optimizer step: the same for every split into micro-batches, accumulation and ranks."""

import pytest
from torch.utils.data import Dataset

from po.order import StepLoader, StepSampler


def steps(items: int, per_device: int, accumulation: int, world: int, epoch: int = 0) -> list[set[int]]:
    """The rows of each optimizer step over all ranks; every rank's micro-batches are zipped."""
    ranks = []
    for rank in range(world):
        sampler = StepSampler(items, per_device, accumulation, world, rank, seed=3)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    out = []
    for start in range(0, len(ranks[0]), accumulation):
        picks = [p for r in ranks for micro in r[start : start + accumulation] for p in micro]
        counted = [i for i, c in picks if c]
        assert len(counted) == len(set(counted))
        out.append(set(counted))
    return out


@pytest.mark.parametrize("items", [1, 7, 8, 17, 32])
@pytest.mark.parametrize(
    ("per_device", "accumulation", "world"), [(1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 1, 4)]
)
def test_every_split_takes_the_same_rows(items: int, per_device: int, accumulation: int, world: int) -> None:
    whole = steps(items, 8, 1, 1)
    assert steps(items, per_device, accumulation, world) == whole
    assert set().union(*whole) == set(range(items))


def test_epochs_differ_and_repeat() -> None:
    assert steps(64, 8, 1, 1, epoch=0) != steps(64, 8, 1, 1, epoch=1)
    assert steps(64, 8, 1, 1, epoch=1) == steps(64, 8, 1, 1, epoch=1)


def test_a_rank_without_rows_gets_a_filler_that_does_not_count() -> None:
    assert list(StepSampler(1, 2, 2, 2, rank=1, shuffle=False)) == [[(0, False)], [(0, False)]]


def test_a_resumed_epoch_continues_where_it_stopped() -> None:
    from accelerate import PartialState
    from accelerate.data_loader import skip_first_batches

    PartialState(cpu=True)
    sampler = StepSampler(20, 2, 2, seed=5)
    loader = StepLoader(_Echo(), batch_sampler=sampler, collate_fn=list)
    rest = skip_first_batches(loader, 4)
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        rest.batch_sampler.batch_sampler.set_epoch(epoch)
        assert list(rest) == list(loader)[4:]


class _Echo(Dataset[object]):
    def __getitem__(self, pick: object) -> object:
        return pick


def test_a_shuffled_run_begins_with_the_longest_rows_and_the_largest_micro_batch() -> None:
    sizes = [(7 * i) % 31 for i in range(31)]
    sampler = StepSampler(31, 2, 3, seed=1, sizes=sizes)
    batches = list_of(sampler)
    assert sorted(i for b in batches for i in b) == list(range(31))
    assert [sizes[i] for b in batches[:3] for i in b] == [30, 29, 28, 27, 26, 25]
    sampler.set_epoch(1)
    assert list_of(sampler) == list_of(StepSampler(31, 2, 3, seed=1, epoch=1))


def list_of(sampler: StepSampler) -> list[list[int]]:
    return [[i for i, counts in batch if counts] for batch in sampler]
