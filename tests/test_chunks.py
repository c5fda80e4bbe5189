import itertools
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from charlm.data import permutation
from charlm.data.chunks import BATCHES_PER_DRAW, IGNORE, RandomChunks, Windows, gather_chunks
from charlm.data.permutation import Permutation
from charlm.errors import InputError

SPLITS = st.integers(2, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@given(SPLITS, st.data())
def test_a_chunk_is_a_slice_and_its_targets_the_next_characters(split, data):
    n, block_size = split
    ids = torch.randint(0, 200, (n,), dtype=torch.uint8)
    starts = data.draw(st.lists(st.integers(0, n - block_size - 1), min_size=1, max_size=5))
    x, y = gather_chunks(ids, torch.tensor(starts), block_size)
    for row, start in enumerate(starts):
        assert x[row].tolist() == ids[start : start + block_size].tolist()
        assert y[row].tolist() == ids[start + 1 : start + block_size + 1].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(0, 7), st.lists(st.integers(0, 5 * BATCHES_PER_DRAW), max_size=20))
def test_a_batch_depends_on_seed_rank_and_number_alone(seed, rank, numbers):
    ids = torch.arange(1000)
    asked_in_any_order = RandomChunks(ids, 4, 3, seed, rank)
    for k in numbers:
        fresh = RandomChunks(ids, 4, 3, seed, rank, batches_per_epoch=k + 5, first=partial(int, k))
        for number, (x, y) in enumerate(fresh, start=k):
            again_x, again_y = asked_in_any_order.batch(number)
            assert torch.equal(x, again_x)
            assert torch.equal(y, again_y)


def test_epochs_follow_each_other_without_a_batch_left_out_or_repeated():
    chunks = RandomChunks(torch.arange(1000), 4, 3, seed=0, batches_per_epoch=7)
    assert len(chunks) == 7
    served = [batch for _ in range(3) for batch in chunks]
    assert len(served) == 21
    for k, (x, y) in enumerate(served):
        assert all(torch.equal(a, b) for a, b in zip((x, y), chunks.batch(k), strict=True))


@given(st.integers(0, 600), st.integers(0, 600), st.integers(1, 40))
def test_gathers_are_the_batches_several_at_once(k, n, batch_size):
    chunks = RandomChunks(torch.arange(1000), 64, batch_size, seed=0)
    gathered = [batch for xs, ys in chunks.gathers(k, k + n) for batch in zip(xs, ys, strict=True)]
    assert len(gathered) == n
    for number in {0, n // 2, n - 1} if n else set():
        assert all(torch.equal(a, b) for a, b in zip(gathered[number], chunks.batch(k + number), strict=True))


def test_seeds_ranks_and_numbers_each_give_other_chunks():
    ids = torch.arange(100_000)
    drawn = {
        (seed, rank, k): tuple(RandomChunks(ids, 8, 16, seed, rank).starts(k).tolist())
        for seed, rank, k in itertools.product((0, 1, 1337), (0, 1, 2), (0, 1, BATCHES_PER_DRAW))
    }
    assert len(set(drawn.values())) == len(drawn)


def test_every_place_is_drawn_and_none_more_often():
    ids = torch.arange(21)
    chunks = RandomChunks(ids, 8, 64, seed=0)
    starts = torch.cat([chunks.starts(k) for k in range(2000)])
    counts = torch.bincount(starts, minlength=13).double()
    assert len(counts) == 13  # 0 to 12: the last chunk's target is the last character
    expected = len(starts) / 13
    assert float(((counts - expected) ** 2 / expected).sum()) < 32.9  # chi square, 12 degrees, p = 0.001


@given(SPLITS, st.data())
def test_every_target_is_counted_exactly_once(split, data):
    n, block_size = split
    stride = data.draw(st.integers(1, block_size))
    tokens_per_batch = data.draw(st.integers(1, 1000))
    world_size = data.draw(st.integers(1, 4))
    ids = torch.arange(n)  # the target says which one it is
    counted = []
    for rank in range(world_size):
        windows = Windows(ids, block_size, stride, tokens_per_batch, rank, world_size)
        for x, y in windows:
            assert x.shape == y.shape == (len(x), block_size)
            assert torch.equal(y[y != IGNORE], x[y != IGNORE] + 1)
            counted += y[y != IGNORE].tolist()
    assert sorted(counted) == list(range(1, n))


@given(SPLITS, st.data())
def test_a_stride_promises_context(split, data):
    n, block_size = split
    stride = data.draw(st.integers(1, block_size))
    for number, (x, y) in enumerate(Windows(torch.arange(n), block_size, stride, block_size)):
        context = torch.arange(1, block_size + 1).expand_as(x)
        later = slice(None) if number else slice(0)
        assert bool((context[later][y[later] != IGNORE] > block_size - stride).all())


@given(SPLITS, st.integers(1, 5), st.integers(1, 40))
def test_batches_do_not_depend_on_the_number_of_ranks(split, world_size, tokens_per_batch):
    n, block_size = split
    ids = torch.arange(n)
    alone = [*Windows(ids, block_size, tokens_per_batch=tokens_per_batch)]
    ranks = [[*Windows(ids, block_size, None, tokens_per_batch, rank, world_size)] for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    shared = [batch for step in zip(*ranks, strict=True) for batch in step]
    for one, other in zip(alone, shared, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for x, y in shared[len(alone) :]:
        assert len(x) > 0
        assert bool((y == IGNORE).all())


def test_counts_are_those_of_the_batches():
    windows = Windows(torch.arange(101), 8, 3, tokens_per_batch=40)
    assert torch.equal(torch.cat([(y != IGNORE).sum(1) for _, y in windows]), windows.counts())


@pytest.mark.parametrize("make", [lambda ids: RandomChunks(ids, 8, 1, 0), lambda ids: Windows(ids, 8)])
def test_a_split_needs_one_character_more_than_a_block(make):
    make(torch.arange(9))
    with pytest.raises(InputError, match=r"has 8 characters, and block_size=8 needs at least 9"):
        make(torch.arange(8))


# Order


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_epoch_shows_each_chunk_once_to_all_ranks_together(ranks):
    for n, batch_size in [(40, 3), (1000, 7), (1003, 64), (5, 1)]:
        ids = torch.arange(4 * n + 1)
        loaders = [
            RandomChunks(ids, 4, batch_size, seed=5, rank=rank, order="epoch", world_size=ranks)
            for rank in range(ranks)
        ]
        batches = -(-3 * n // (batch_size * ranks))
        shown = torch.stack([loader.starts(k) for k in range(batches) for loader in loaders]).flatten()[: 3 * n]
        for epoch in shown.view(3, n):
            assert sorted(epoch.tolist()) == [*range(0, 4 * n, 4)]
        if n > 10:
            assert len({tuple(epoch.tolist()) for epoch in shown.view(3, n)}) == 3


@given(st.integers(0, 2**20), st.integers(0, 3))
def test_a_batch_of_an_epoch_depends_on_its_number_alone(k, rank):
    ids = torch.arange(1001)
    asked = RandomChunks(ids, 4, 3, 9, rank, order="epoch", world_size=4)
    asked.starts(k + 77)
    assert torch.equal(asked.starts(k), RandomChunks(ids, 4, 3, 9, rank, order="epoch", world_size=4).starts(k))


@pytest.mark.parametrize("table", [0, permutation.TABLE])
def test_every_number_of_things_has_orders(monkeypatch, table):
    monkeypatch.setattr(permutation, "TABLE", table)
    for n in range(1, 301):
        assert sorted(Permutation(n, (1, n))(np.arange(n)).tolist()) == [*range(n)]


@given(st.integers(1, 10**6), st.integers(0, 2**32), st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_large_order_repeats_nothing(n, seed, epoch):
    found = Permutation(n, (seed, epoch))(np.arange(n))
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


def test_all_orders_come_equally_often():
    for n, rounds in [(3, 3000), (4, 4800), (5, 12_000)]:
        often = Counter(tuple(Permutation(n, (seed, 0))(np.arange(n)).tolist()) for seed in range(rounds))
        assert len(often) == math.factorial(n)
        assert chisquare([*often.values()]).pvalue > 1e-4


def test_neighbours_are_not_neighbours_in_a_random_order():
    assert permutation.TABLE < 100_000
    found = Permutation(100_000, (0, 0))(np.arange(100_000))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(found, np.arange(100_000))[0, 1]) < 0.02


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 9), st.sampled_from(["random", "epoch"]))
def test_no_chunk_holds_two_documents(lengths, block_size, order):
    begins = np.cumsum([0, *lengths[:-1]])
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # which document each id is in
    documents = np.append(begins, len(of) + 5)  # one begins in another split
    if len(of) < block_size + 1 or max(lengths) < block_size + 1:
        with pytest.raises(InputError, match=r"characters, and block_size|no document of the train split is longer"):
            RandomChunks(of, block_size, 4, seed=0, order=order, documents=documents)
        return
    chunks = RandomChunks(of, block_size, 4, seed=0, order=order, documents=documents)
    for k in range(20):
        x, y = chunks.batch(k)
        assert (x == x[:, :1]).all()
        assert (y == x[:, :1]).all()
    possible = [
        begin + place
        for begin, length in zip(begins, lengths, strict=True)
        for place in range(0, max(0, length - block_size), 1 if order == "random" else block_size)
    ]
    [part] = chunks.parts
    assert part.starts(np.arange(part.n)).tolist() == possible


# A part of a large split


@given(SPLITS, st.data())
def test_a_part_of_a_split_is_evenly_spaced_windows_and_the_rest_of_the_code_sees_no_difference(split, data):
    n, block_size = split
    stride = data.draw(st.integers(1, block_size))
    most = data.draw(st.integers(1, n + 3))
    whole = Windows(torch.arange(n), block_size, stride, 50)
    part = Windows(torch.arange(n), block_size, stride, 50, most=most)
    assert part.partial == (int(part.counts().sum()) < n - 1)
    if most >= n - 1:
        assert not part.partial
        return
    assert int(part.counts().sum()) <= max(most, block_size)
    of_whole = {int(t) for _, y in whole for t in y[y != IGNORE]}
    targets = [int(t) for _, y in part for t in y[y != IGNORE]]
    assert len(targets) == len({*targets}) == int(part.counts().sum())
    assert {*targets} <= of_whole
    gaps = part.numbers.diff()
    assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1


def test_ranks_share_a_part_of_a_split():
    alone = [*Windows(torch.arange(1000), 10, 4, 30, most=200)]
    shared = [[*Windows(torch.arange(1000), 10, 4, 30, rank, 2, most=200)] for rank in (0, 1)]
    for j, (x, y) in enumerate(alone):
        assert torch.equal(shared[j % 2][j // 2][0], x)
        assert torch.equal(shared[j % 2][j // 2][1], y)
