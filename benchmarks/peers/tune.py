"""The peers' settings: a small grid on another seed, and the best of it kept for good."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import figures
import numpy as np
from environments import say
from running import ContenderFailed

if TYPE_CHECKING:
    from contenders import Contender
    from contest import Race

LOADS = (0.6, 0.9)
DURATION_S = 2.5
SMALL = "small"
SEED = 90_000
"""Of no trace that is raced."""


def tune(race: Race) -> dict[str, Any]:
    """Return, for each contender with something to tune, the best settings for the detector and for the small model."""
    tuned = dict(race.tuned)
    for contender in race.contenders:
        for name, score in ((contender.name, _deadlines), (f"{contender.name}/{SMALL}", _throughput)):
            scored = []
            for combination in map(dict, contender.grid):
                try:
                    scored.append((score(race, contender, combination), combination))
                except ContenderFailed as failure:
                    say(f"{combination}: {failure}")
            if scored:
                best, tuned[name] = max(scored, key=lambda pair: pair[0])
                say(f"{name}: {tuned[name]} ({best[0]:.1f})")
    return tuned


def _throughput(race: Race, contender: Contender, combination: dict[str, Any]) -> tuple[float]:
    """Answers a second of the small model."""
    with race.started(contender, SMALL, **combination) as running:
        rate_rps = float(np.mean([running.throughput()[0] for _ in range(2)]))
    say(f"{contender.name:15} {combination}: {rate_rps:.0f} answers/s")
    return (rate_rps,)


def _deadlines(race: Race, contender: Contender, combination: dict[str, Any]) -> tuple[float, float]:
    """Share of deadlines met, to a tenth of a percent, then how many of them a core-second gave."""
    runs = []
    with race.started(contender, "detector", **combination) as running:
        for load, seed in zip(LOADS, itertools.count(SEED), strict=False):
            at_s, budget_s = race.trace(load, seed, DURATION_S)
            runs.append(figures.judge(running.replay(at_s, budget_s), budget_s))
    met_pct, met_per_core_s = (
        float(np.mean([run[figure] for run in runs])) for figure in ("met_pct", "met_per_core_s")
    )
    score = round(met_pct, 1), met_per_core_s
    say(f"{contender.name:15} {combination}: met {score[0]:.1f} %, {score[1]:.1f} per core-second")
    return score
