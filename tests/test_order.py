"""The order of samples is a pure function of the step."""

import pickle

import numpy as np
import pytest

from lcm_jax.data.order import Order, shuffled
from lcm_jax.errors import InputError


@pytest.mark.parametrize('sizes', [(10,), (12,), (7, 1, 16)])
@pytest.mark.parametrize('batch', [1, 3, 4])
def test_every_sample_is_seen_equally_often(sizes, batch):
    """After each epoch, but for the batch that spans its border."""
    groups = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    order = Order(groups, batch, seed=1)
    seen, buckets = np.zeros(sum(sizes), int), []
    for step in range(2 * sum(sizes)):
        bucket, ids = order(step)
        assert ids.shape == (batch,) and {*ids} <= {*groups[bucket]}
        buckets.append(bucket)
        np.add.at(seen, ids, 1)
    for group in groups:
        assert np.ptp(seen[group]) <= 1
    per_sample = [seen[group].mean() for group in groups]
    assert max(per_sample) - min(per_sample) <= 2 * batch
    if len(sizes) > 1:
        assert buckets != sorted(buckets)


def test_an_epoch_of_whole_batches_covers_all():
    order = Order([np.arange(4), np.arange(4, 12)], 4, seed=0)
    epochs = [np.concatenate([order(e * 3 + i)[1] for i in range(3)]) for e in range(3)]
    for ids in epochs:
        assert sorted(ids) == [*range(12)]
    assert [*epochs[0]] != [*epochs[1]]


def test_a_step_is_asked_for_alone():
    groups = [np.arange(50), np.arange(50, 70)]
    steps = [Order(groups, 6, 3)(i) for i in range(40)]
    again = pickle.loads(pickle.dumps(Order(groups, 6, 3)))
    for i in (39, 0, 17):
        assert again(i)[0] == steps[i][0] and (again(i)[1] == steps[i][1]).all()
    other = Order(groups, 6, 4)
    assert not all(np.array_equal(other(i)[1], steps[i][1]) for i in range(40))
    assert other(10**9)[1].shape == (6,)


def test_substitutes_are_of_the_bucket():
    order = Order([np.arange(50), np.arange(50, 70)], 6, 3)
    got = [order.substitute(1, 7, row, attempt) for row in range(6) for attempt in (1, 2)]
    assert min(got) >= 50 and len({*got}) > 4
    assert got[0] == order.substitute(1, 7, 0, 1)


def test_a_batch_larger_than_the_set():
    indices = shuffled(10, 3, seed=1)
    assert len({*np.concatenate([indices(i) for i in range(3)])}) == 9
    with pytest.raises(InputError, match='batch of 11 from 10 samples'):
        shuffled(10, 11, seed=0)
