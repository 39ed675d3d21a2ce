"""The order of samples: every epoch exactly once, streams in step, and never another order than today's."""

import hashlib
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ig_dist.data.order import SampleOrder
from ig_dist.errors import ConfigError


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    streams = draw(st.integers(1, min(12, sum(sizes))))
    per_stream = draw(st.integers(1, 9))
    return SampleOrder(
        sizes,
        streams=streams,
        global_batch_size=streams * per_stream,
        window_samples=draw(st.integers(1, 50)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@settings(max_examples=30, deadline=None)
@given(orders())
def test_every_epoch_has_every_sample_exactly_once(order: SampleOrder) -> None:
    epochs = 3
    seen: dict[int, list[int]] = defaultdict(list)
    # streams differ by at most one sample, so this many batches reach into epoch `epochs` on every stream
    batches = ((epochs + 1) * (order.num_samples // order.streams + 1)) // order.samples_per_stream + 1
    for number in range(batches):
        for sample, epoch in zip(*order.batch(number), strict=True):
            seen[int(epoch)].append(int(sample))
    for epoch in range(epochs):
        assert sorted(seen[epoch]) == list(range(order.num_samples))


@settings(max_examples=50, deadline=None)
@given(orders(), st.integers(0, 500))
def test_streams_never_differ_by_more_than_one(order: SampleOrder, epoch: int) -> None:
    before = [order._samples_before(stream, epoch) for stream in range(order.streams)]
    assert max(before) - min(before) <= 1
    assert sum(before) == epoch * order.num_samples


@settings(max_examples=50, deadline=None)
@given(orders(), st.integers(0, 400))
def test_a_window_is_found_from_any_of_its_samples(order: SampleOrder, number: int) -> None:
    stream = number % order.streams
    window = order.window(stream, number)
    assert window.first <= number < window.stop
    assert len(window.permutation) <= order.window_samples
    again = order.window(stream, window.stop - 1)
    assert again.stretches == window.stretches and (again.permutation == window.permutation).all()
    assert order.window(stream, window.stop).first == window.stop


def test_epochs_and_seeds_give_other_orders() -> None:
    def first_epoch(seed: int) -> list[int]:
        order = SampleOrder([30, 30, 4], streams=4, global_batch_size=16, window_samples=8, seed=seed)
        return np.concatenate([order.batch(number)[0] for number in range(8)]).tolist()

    one = first_epoch(1)
    assert sorted(one[:64]) == sorted(one[64:]) and one[:64] != one[64:]
    assert first_epoch(2) != one
    assert one[:64] != sorted(one[:64])


def test_the_order_is_the_one_that_runs_in_the_field_have_seen() -> None:
    """A change here breaks the resume of every existing run: it must be deliberate."""
    order = SampleOrder([100, 7, 64, 33], streams=6, global_batch_size=24, window_samples=10, seed=123456789)
    digest = hashlib.sha256()
    for number in (0, 1, 7, 8, 9, 1000):
        for column in order.batch(number):
            digest.update(column.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "3579c173ed28341b"


def test_more_streams_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 5"):
        SampleOrder([5], streams=6, global_batch_size=6, window_samples=2, seed=0)
