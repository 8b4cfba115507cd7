"""Clients that wait for their answers: by hand, by theory, and against the same requests without waiting."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sponge import Controller, LatencyModel, Run, Service, Settings, Solver, simulate
from sponge.core.protocol import ControllerProtocol
from sponge.sim.baselines import StaticController
from sponge.sim.run import Outcome
from sponge.workload import BandwidthTrace, ClosedLoop, SloClass, always, exponential, fixed, lognormal, lte_like

DETECTOR = LatencyModel(gamma_s=0.1404, epsilon_s=-0.0508, delta_s=0.0252, eta_s=0.0221)
LINK = BandwidthTrace(times_s=[0.0], bytes_per_s=[1e6], end_s=1.0)
NEVER = (SloClass(1e9),)
RUNS, STUDENT_T = 16, 4.073
"""Two-sided 99.9 % quantile for 15 degrees of freedom."""


def takes(seconds: float) -> LatencyModel:
    return LatencyModel(gamma_s=0.0, epsilon_s=0.0, delta_s=0.0, eta_s=seconds)


def one_by_one(lanes: int = 1, **more: bool) -> StaticController:
    return StaticController(float(lanes), order="fifo", max_batch_size=1, lanes=lanes, max_queue=100_000, **more)


def phones(clients: int = 30, duration_s: float = 60.0, **more: object) -> ClosedLoop:
    """Clients on one mobile network, each at its own place of it, with a mix of deadlines and sizes."""
    fields: dict[str, object] = {
        "clients": clients,
        "duration_s": duration_s,
        "trace": lte_like(120, np.random.default_rng(5)),
        "think": exponential(1.0),
        "payload": lognormal(300e3, 0.5),
        "slos": (SloClass(0.6), SloClass(1.5, 2.0)),
        "seed": 3,
        "offset_s": 7.0 * np.arange(clients),
    }
    return ClosedLoop(**{**fields, **more})  # type: ignore[arg-type]


def adaptive(max_cores: float = 4.0, **settings: object) -> Controller:
    solver = Solver(DETECTOR, max_cores=max_cores, max_batch_size=8, max_lanes=int(max_cores))
    return Controller(solver, Settings(**settings))  # type: ignore[arg-type]


CONTROLLERS = {
    "adaptive": lambda: adaptive(4.0),
    "adaptive, overloaded": lambda: adaptive(2.0),
    "adaptive, full queue": lambda: adaptive(1.0, max_queue=3),
    "static": lambda: StaticController(4.0, order="edf", max_batch_size=4, lanes=2, window_s=0.02, drop_late=True),
}
ROUGH = Service(DETECTOR, noise_cv=0.2, straggler_share=0.02, interference=0.03, resize_delay_s=0.05, decision_s=5e-4)


def test_one_client_worked_out_by_hand() -> None:
    """Upload 0.3 s, service 0.5 s, then 1 s of thought: a request every 1.8 s, the first within the first second."""
    loop = ClosedLoop(clients=1, duration_s=10.0, trace=LINK, think=always(1.0), payload=fixed(300e3), slos=NEVER)
    run = simulate(loop, one_by_one(), takes(0.5))
    first_s = float(run.sent_at_s[0])
    assert 0 <= first_s < 1
    assert run.sent_at_s.tolist() == pytest.approx([first_s + 1.8 * k for k in range(len(run))])
    assert 10 - 1.8 <= run.sent_at_s[-1] < 10
    assert (run.arrived_at_s - run.sent_at_s).tolist() == pytest.approx([0.3] * len(run))
    assert run.finished_at_s.tolist() == pytest.approx((run.arrived_at_s + 0.5).tolist())


def test_nobody_has_two_requests_at_a_time() -> None:
    """A client sends only after its answer, so that no more than all of them ever wait or run; and all are at work."""
    run = simulate(phones(5, think=always(0.0), payload=fixed(0.0), slos=NEVER), one_by_one(), takes(0.1))
    times = np.concatenate([run.sent_at_s, run.finished_at_s])
    in_system = np.cumsum(np.repeat([1, -1], len(run))[np.lexsort((np.repeat([1, 0], len(run)), times))])
    assert in_system.max() == 5
    assert len(run) == pytest.approx(60.0 / 0.1, abs=6)  # saturated: one after the other, without a gap


def test_who_is_turned_away_comes_back() -> None:
    """Nobody can be served in time here, yet each client goes on: a think time after every rejection."""
    loop = ClosedLoop(clients=4, duration_s=50.0, trace=LINK, think=always(0.5), slos=(SloClass(0.01),))
    run = simulate(loop, adaptive(), DETECTOR)
    assert run.count(Outcome.REJECTED) == len(run) == 4 * 100
    late = simulate(loop, adaptive(late="serve"), DETECTOR)
    assert late.count(Outcome.LATE) == len(late) < 4 * 100


def test_rejection_without_a_think_time_does_not_stop_the_clock() -> None:
    """Turned away at once, sent again at once: without a least distance the simulation would never get on."""
    loop = ClosedLoop(clients=1, duration_s=0.05, trace=LINK, think=always(0.0), slos=(SloClass(0.01),))
    run = simulate(loop, adaptive(), DETECTOR)
    assert run.count(Outcome.REJECTED) == len(run) == pytest.approx(500, abs=1)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_little_s_law_of_all_clients(name: str) -> None:
    """N = X·(R + Z): every client's time is spent in requests and in thought, but for what the end cuts off.

    The law is exact in the long run. Here the think times are equal, so that Z is known, and a client's time from 0 to
    T is its cycles but for a beginning and an end, each shorter than the longest cycle.
    """
    think_s, loop = 0.7, phones(think=always(0.7))
    run = simulate(loop, CONTROLLERS[name](), ROUGH, seed=2, record=True)
    assert run.log is not None
    ends_s = run.finished_at_s.copy()
    for now, _, actions in run.log:
        for action in actions:
            if hasattr(action, "request_id"):
                ends_s[action.request_id] = now
    assert np.all(np.isfinite(ends_s))
    in_request_s = ends_s - run.sent_at_s
    cycles_s = float(np.sum(in_request_s + think_s))
    edge_s = loop.clients * (float(in_request_s.max()) + think_s)
    assert abs(loop.clients * loop.duration_s - cycles_s) <= edge_s
    assert edge_s < 0.2 * cycles_s, "the run is too short to tell"


@pytest.mark.parametrize("clients", [1, 3, 8])
def test_throughput_is_that_of_the_machine_repairman(clients: int) -> None:
    """Exponential thought and service, one server: the classic of closed queues has a throughput that is known.

    X = μ·(1 − p₀) with 1/p₀ = Σ over k of N!/(N − k)! · (s/Z)^k. Sixteen runs, Student's t at a risk of 1 in 1,000.
    """
    service_s, think_s, duration_s = 0.1, 0.3, 400.0
    weights = [math.perm(clients, k) * (service_s / think_s) ** k for k in range(clients + 1)]
    expected_rps = (1 - 1 / sum(weights)) / service_s
    service = Service(takes(service_s), noise="gamma", noise_cv=1.0)
    rates_rps = []
    for seed in range(RUNS):
        loop = ClosedLoop(
            clients=clients, duration_s=duration_s, trace=LINK, think=exponential(think_s), slos=NEVER, seed=seed
        )
        run = simulate(loop, one_by_one(), service, seed=seed)
        rates_rps.append(np.count_nonzero(run.sent_at_s >= 10) / (duration_s - 10))
    allowed = STUDENT_T * float(np.std(rates_rps, ddof=1)) / math.sqrt(RUNS)
    assert allowed < 0.05 * expected_rps
    assert abs(float(np.mean(rates_rps)) - expected_rps) < allowed


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_same_requests_without_waiting_give_the_same_run(name: str) -> None:
    """The controller cannot tell: sent at the same instants as a plain workload, all is as it was, to the last bit."""
    closed = simulate(phones(), CONTROLLERS[name](), ROUGH, seed=2, record=True)
    again = simulate(closed.workload, CONTROLLERS[name](), ROUGH, seed=2, record=True)
    assert closed.log == again.log
    assert _text(closed) == _text(again)
    assert len(closed) > 100


def test_same_seed_same_clients() -> None:
    """Runs repeat, and another seed, of the clients or of the service, is another run."""
    loop = phones()
    first, again = (simulate(loop, adaptive(), ROUGH, seed=1) for _ in range(2))
    assert _text(first) == _text(again)
    assert _text(first) != _text(simulate(phones(seed=4), adaptive(), ROUGH, seed=1))
    assert _text(first) != _text(simulate(loop, adaptive(), ROUGH, seed=2))


def test_two_policies_meet_the_same_people() -> None:
    """What a client does with its k-th request does not depend on when it was answered: sizes and classes agree."""

    def first_requests(controller: ControllerProtocol) -> list[tuple[float, float]]:
        run = simulate(phones(1, payload=lognormal(300e3, 1.0), trace=LINK, offset_s=0.0), controller, DETECTOR)
        return [(round(n, 9), round(s, 9)) for n, s in zip(run.workload.network_s, run.workload.slo_s, strict=True)][
            :20
        ]

    requests = first_requests(adaptive())
    assert requests == first_requests(one_by_one())
    assert len({slo for _, slo in requests}) == 2


def _text(run: Run) -> str:
    return json.dumps(run.to_dict(), allow_nan=False)
