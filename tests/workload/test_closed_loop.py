"""Clients of a closed loop: think times, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from sponge.workload import BandwidthTrace, ClosedLoop, always, exponential
from sponge.workload.closed_loop import Clients

LINK = BandwidthTrace(times_s=[0.0], bytes_per_s=[1e6], end_s=1.0)


def loop(**more: object) -> ClosedLoop:
    return ClosedLoop(**{"clients": 3, "duration_s": 10.0, "trace": LINK, **more})  # type: ignore[arg-type]


def test_clients_begin_at_random_places_of_their_think_time() -> None:
    """Equal think times would else have all clients send at one instant, again and again."""
    clients = Clients(loop(clients=200, think=always(4.0)))
    sent_at_s = np.array([clients.take()[2] for _ in range(200)])
    assert clients.next_at == np.inf
    assert sent_at_s.min() >= 0
    assert sent_at_s.max() < 4.0
    assert np.histogram(sent_at_s, [0, 1, 2, 3, 4])[0].min() > 25


def test_answered_client_thinks_then_sends() -> None:
    """From the answer, not from the sending; and nobody sends at the end or after it."""
    clients = Clients(loop(clients=1, think=always(2.0)))
    arrives_at, client, sent_at, _ = clients.take()
    clients.answered(client, sent_at, arrives_at + 3.0)
    assert clients.next_at == arrives_at + 5.0
    _, client, sent_at, _ = clients.take()
    clients.answered(client, sent_at, 8.0)
    assert clients.next_at == np.inf


def test_think_times_have_their_mean() -> None:
    """Four standard errors of 10,000 exponential numbers are 4 %."""
    drawn_s = exponential(2.0)(10_000, np.random.default_rng(0))
    assert drawn_s.mean() == pytest.approx(2.0, rel=0.04)
    assert drawn_s.std() == pytest.approx(2.0, rel=0.06)
    assert always(2.0)(3, np.random.default_rng(0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clients": 0}, "clients must be from 1 to 1,000,000, got 0"),
        ({"duration_s": 0.0}, "duration_s must be positive and finite, got 0.0"),
        ({"duration_s": np.nan}, "duration_s must be positive and finite, got nan"),
        ({"slos": ()}, "slos must hold at least one class"),
        ({"offset_s": [1.0, 2.0]}, r"offset_s must be one number or one for each of 3 clients, got shape \(2,\)"),
        ({"seed": -1}, "seed must be a whole number and not negative, got -1"),
    ],
)
def test_impossible_loops_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**fields)


def test_impossible_think_times_are_refused() -> None:
    """By the two of this package at once, by a function of one's own when it is drawn from."""
    for make in (exponential, always):
        for bad in (-1.0, np.nan, np.inf):
            with pytest.raises(ValueError, match="must be finite and not negative, got"):
                make(bad)
    with pytest.raises(ValueError, match="think must give times that are finite and not negative"):
        Clients(loop(think=lambda count, _: np.full(count, -1.0)))


def test_upload_that_never_ends_is_told() -> None:
    """On a trace that ends in an outage for ever."""
    trace = BandwidthTrace(times_s=[0.0, 1.0], bytes_per_s=[1e6, 0.0], end_s=2.0, loops=False)
    with pytest.raises(ValueError, match="never ends"):
        Clients(loop(trace=trace, think=always(8.0), payload=lambda count, _: np.full(count, 1e5)))
