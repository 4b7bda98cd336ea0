"""The order of the ranks, and the entropy baseline."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.data import RankSampler, unigram_loss
from deepspeed_sdp.errors import DataError


@st.composite
def samplings(draw):
    world, batch = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    sequences = draw(st.integers(world * batch, 5 * world * batch + 3))
    return sequences, world, batch, draw(st.integers(0, 2**31))


def take(sampler, rank, world, batch, count, start=0):
    batches = sampler.batches(rank, world, batch, start)
    return [next(batches).tolist() for _ in range(count)]


@given(samplings())
def test_every_epoch_deals_each_index_once_and_ranks_are_disjoint(case):
    sequences, world, batch, seed = case
    sampler = RankSampler(sequences, seed)
    steps = -(-2 * sequences // (world * batch))
    by_rank = [take(sampler, rank, world, batch, steps) for rank in range(world)]
    dealt = [i for step in range(steps) for rank in range(world) for i in by_rank[rank][step]]
    for epoch in range(2):
        assert sorted(dealt[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))


@given(samplings(), st.integers(1, 6), st.integers(1, 4), st.integers(0, 5))
def test_another_number_of_ranks_goes_on_at_the_exact_sample(case, other_world, other_batch, steps):
    sequences, world, batch, seed = case
    if other_world * other_batch > sequences:
        return
    consumed, needed = steps * world * batch, other_world * other_batch
    ranks = [take(RankSampler(sequences, seed), r, other_world, other_batch, 3, consumed) for r in range(other_world)]
    dealt = [i for step in range(3) for rank in ranks for i in rank[step]]
    alone = take(RankSampler(sequences, seed), 0, 1, 1, consumed + 3 * needed)
    assert [[i] for i in dealt] == alone[consumed:]


@given(samplings())
def test_the_global_order_does_not_depend_on_how_ranks_share_it(case):
    """The same global batch, dealt to any number of ranks (N subnetworks times R replicas), is the same text."""
    sequences, world, batch, seed = case
    sampler = RankSampler(sequences, seed)
    alone = take(sampler, 0, 1, world * batch, 4)
    shared = [take(sampler, rank, world, batch, 4) for rank in range(world)]
    assert alone == [[i for rank in range(world) for i in shared[rank][step]] for step in range(4)]


@given(samplings(), st.integers(0, 25))
def test_a_start_step_resumes_exactly(case, start):
    sequences, world, batch, seed = case
    rank = seed % world
    whole = take(RankSampler(sequences, seed), rank, world, batch, start + 5)
    assert take(RankSampler(sequences, seed), rank, world, batch, 5, start * world * batch) == whole[start:]


def test_epochs_and_seeds_differ():
    first, second = take(RankSampler(100, 0), 0, 1, 100, 2)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != take(RankSampler(100, 1), 0, 1, 100, 1)[0]


def test_fewer_sequences_than_one_batch():
    with pytest.raises(DataError) as raised:
        RankSampler(15).batches(rank=0, world_size=4, batch_size=4)
    assert str(raised.value) == (
        "text: 15 sequences are too few for one batch of 16 (4 ranks of 4); give more text, a smaller seq_length or "
        "a smaller train_micro_batch_size_per_gpu"
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50), st.lists(st.integers(0, 9), min_size=6, max_size=60))
def test_the_unigram_loss_is_the_plain_computation(train, heldout):
    heldout = heldout[: len(heldout) // 3 * 3]
    frequency = {token: (train.count(token) + 1) / (len(train) + 10) for token in range(10)}
    predicted = [token for position, token in enumerate(heldout) if position % 3]
    expected = sum(-math.log(frequency[token]) for token in predicted) / len(predicted)
    loss = unigram_loss(np.asarray(train, np.int32), np.asarray(heldout, np.int32).reshape(-1, 3), 10)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_the_unigram_loss_is_what_a_model_without_context_pays():
    """Over the same tokens as the loss of a causal language model: all but the first of a sequence."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    draw = np.random.default_rng(0)
    train = draw.zipf(1.5, size=(50, 16)).clip(max=19).astype(np.int32)
    heldout = draw.zipf(1.5, size=(8, 16)).clip(max=19).astype(np.int32)
    counts = np.bincount(train.reshape(-1), minlength=20) + 1.0
    logits = torch.tensor(np.log(counts / counts.sum())).expand(8, 16, 20)
    loss = ForCausalLMLoss(logits, torch.from_numpy(heldout).long(), vocab_size=20)
    assert unigram_loss(train, heldout, 20) == pytest.approx(float(loss), rel=1e-6)
