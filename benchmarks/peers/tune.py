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
SEED = 90_000
"""Of no trace that is raced."""


def tune(race: Race) -> dict[str, Any]:
    """Return, for each contender with something to tune, the settings that met most deadlines."""
    tuned = dict(race.tuned)
    for contender in race.contenders:
        if not contender.grid:
            continue
        scored = []
        for combination in map(dict, contender.grid):
            try:
                scored.append((_score(race, contender, combination), combination))
            except ContenderFailed as failure:
                say(f"{combination}: {failure}")
        if scored:
            best, tuned[contender.name] = max(scored, key=lambda pair: pair[0])
            say(f"{contender.name}: {tuned[contender.name]} (met {best[0]:.1f} %)")
    return tuned


def _score(race: Race, contender: Contender, combination: dict[str, Any]) -> tuple[float, float]:
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
