from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.plan import batch_indices, epoch_order


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_epoch_visits_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(samples, seed, epoch)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(samples))


def test_promise_2_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(1000, seed=3, epoch=7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    epoch_order(1000, seed=3, epoch=6)
    assert torch.equal(epoch_order(1000, seed=3, epoch=7), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(epoch_order(1000, seed=3, epoch=8), first)
    assert not torch.equal(epoch_order(1000, seed=4, epoch=7), first)


def test_batches_follow_each_other_in_the_order() -> None:
    order = epoch_order(100, 0, 0)
    batches = [batch_indices(order, step, 30) for step in range(3)]
    assert torch.equal(torch.cat(batches), order[:90])


def test_each_epoch_leaves_out_another_part() -> None:
    left_out = {tuple(epoch_order(100, 0, epoch)[90:].tolist()) for epoch in range(5)}
    assert len(left_out) == 5
