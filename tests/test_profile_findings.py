"""The plain sentences of a profile say what its numbers say."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from sponge.profile import Cell, Profile
from sponge.profile.findings import findings


def profile(latency_s: Callable[[int, float, int], float], *, batch_sizes: tuple[int, ...] = (1, 4)) -> Profile:
    cells = [
        Cell.of(batch_size=b, cores=c, lanes=k, threads=1, samples_s=[latency_s(b, c, k)] * 20)
        for b in batch_sizes
        for c, k in ((0.5, 1), (1.0, 1), (2.0, 1), (1.0, 2))
    ]
    return Profile(
        cells=cells,
        model_hash="ab",
        model_name="m.onnx",
        input_shapes={"x": (1, 4)},
        machine={"cpu": "one"},
        versions={},
        cpu_control="threads",
        measured_at="2026-01-02T03:04:05+00:00",
    )


@pytest.mark.parametrize(
    ("latency_s", "said"),
    [
        (
            lambda b, c, k: 0.01 * b / c,
            [
                "A request by itself takes 10 ms on 1 core, 5 ms on 2 cores: 2.0 times as fast on 2 times the cores.",
                "Batches are not worth waiting for: 10 core-ms a request one by one, 10 core-ms in batches of 4.",
                "Lanes make no difference: 2 lanes of 1 core serve 200 requests/s, one lane of 2 cores 200.",
                "Budgets below 5 ms cannot be kept for 99 % of the requests; the p99 is lowest on 2 cores.",
            ],
        ),
        (
            lambda b, c, k: 0.01 + 0.001 * b,
            [
                "A request by itself takes 11 ms on 1 core, and no less on more.",
                "Batches of 4 cost 68% less a request: 3.5 core-ms instead of 11 core-ms.",
                "Lanes pay: 2 lanes of 1 core serve 571 requests/s, one lane of 2 cores 286.",
                "Budgets below 11 ms cannot be kept for 99 % of the requests; the p99 is lowest on 0.5 cores.",
            ],
        ),
        (
            lambda b, c, k: 0.01 * b / c * (1.5 if k == 2 else 1.0),
            [
                "A request by itself takes 10 ms on 1 core, 5 ms on 2 cores: 2.0 times as fast on 2 times the cores.",
                "Batches are not worth waiting for: 10 core-ms a request one by one, 10 core-ms in batches of 4.",
                "Lanes disturb each other here: 2 lanes of 1 core serve 133 requests/s, one lane of 2 cores 200.",
                "Budgets below 5 ms cannot be kept for 99 % of the requests; the p99 is lowest on 2 cores.",
            ],
        ),
    ],
    ids=["parallel", "serial", "disturbed"],
)
def test_what_cores_batches_and_lanes_are_worth(latency_s: Callable[[int, float, int], float], said: list[str]) -> None:
    """Three machines that differ in one respect each."""
    assert findings(profile(latency_s)) == said


def test_lowest_budget_is_that_of_the_best_tail() -> None:
    """The cores of the fastest median may have a worse tail than others, on which smaller budgets are kept."""

    def samples(cores: float) -> list[float]:
        return [0.010] * 380 + [0.020] * 20 if cores == 1.5 else [0.009] * 380 + [0.050] * 20

    cells = [
        Cell.of(batch_size=1, cores=cores, threads=1 + (cores > 1), lanes=1, samples_s=samples(cores))
        for cores in (1.0, 1.5, 2.0)
    ]
    assert findings(attrs.evolve(profile(lambda *_: 1.0), cells=cells))[-1] == (
        "Budgets below 20 ms cannot be kept for 99 % of the requests; the p99 is lowest on 1.5 cores."
    )


def test_a_model_of_fixed_batch_is_not_told_of_batches() -> None:
    """Nor one that was measured with a single size."""
    lines = findings(profile(lambda b, c, k: 0.01 / c, batch_sizes=(1,)))
    assert not any("atch" in line for line in lines)
    assert len(lines) == 3
