"""What ``sponge simulate`` answers: a row for each policy and core count, and the fewest cores that are enough."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from sponge.commands.simulate_input import SimulateSettings
from sponge.measure import Allocation, Outcome, OutcomeKind, Series, save_figure, write_report
from sponge.sim.run import Run

_OUTCOME_FIELDS = ("sent_at_s", "arrived_at_s", "deadline_s", "finished_at_s")


@attrs.frozen(kw_only=True)
class Row:
    """One policy with one core count, all seeds together."""

    policy: str
    max_cores: int
    requests: int
    requests_per_s: float
    lost_at_arrival: int
    missed: int
    """Of those that were not lost."""
    met_pct: float
    """Deadlines met of those that were not lost; ``nan`` if all were."""
    met_pct_worst_seed: float
    mean_cores: float
    peak_cores: float
    response_s_p99: float
    """From arrival to the answer, of what was served; ``nan`` if nothing was."""
    first: Run = attrs.field(repr=False, eq=False)
    """The run of the first seed, for the picture."""

    @property
    def met(self) -> str:
        """Deadlines met, for people."""
        if not math.isfinite(self.met_pct):
            return "-"
        text = f"{self.met_pct:.2f} %"
        # Rounding must not claim what is not so.
        return "> 99.99 %" if self.missed and text.startswith("100") else text

    def to_json(self) -> dict[str, Any]:
        """Return the figures; what there is not becomes None."""
        values = {field.name: getattr(self, field.name) for field in attrs.fields(Row) if field.name != "first"}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@attrs.frozen(kw_only=True)
class Answer:
    """What came of it."""

    settings: SimulateSettings
    network: str
    duration_s: float
    fastest_s: float
    """A single request on the most cores [s]: with less left at arrival it is lost."""
    rows: Sequence[Row]

    def enough(self, policy: str) -> Row | None:
        """Return the row of the fewest cores that meet the target, or None."""
        fine = [row for row in self._of(policy) if row.met_pct >= self.settings.target_pct]
        return min(fine, key=lambda row: row.max_cores, default=None)

    def explain(self) -> str:
        """Return scenario, table and answer in plain words."""
        lines = [*self._scenario(), "", *self._table(), "", *map(self._verdict, self.settings.policies)]
        if not all(map(self.enough, self.settings.policies)):
            fewer = "fewer requests (--rate)" if self.settings.clients is None else "fewer clients (--clients)"
            lines.append(f"What else helps: more time (--slo), smaller uploads (--payload-kb), {fewer}.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return scenario, table and answer as JSON values; ``max_cores_needed`` is null where nothing was enough."""
        used = self.settings
        needed = {policy: self.enough(policy) for policy in used.policies}
        return {
            "settings": {
                "network": self.network,
                "rate_rps": used.rate_rps if used.clients is None else None,
                "arrivals": used.arrivals if used.clients is None else None,
                "clients": used.clients,
                "think_s": None if used.clients is None else used.think_s,
                "payload_bytes": used.payload_bytes,
                "payload_cv": used.payload_cv,
                "slos": [attrs.asdict(slo) for slo in used.slos],
                "duration_s": self.duration_s,
                "seeds": used.seeds,
                "max_batch_size": used.batch_limit,
                "max_lanes": used.max_lanes,
                "noise_cv": used.noise_cv,
                "straggler_share": used.straggler_share,
                "interference": used.interference,
                "resize_delay_s": used.resize_delay_s,
                "target_pct": used.target_pct,
                "lost_below_s": self.fastest_s,
            },
            "rows": [row.to_json() for row in self.rows],
            "max_cores_needed": {policy: None if row is None else row.max_cores for policy, row in needed.items()},
        }

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the first seed's run of each policy, with the cores that it needs, or the most that were tried.

        Errors as of `sponge.measure.save_figure`.
        """
        shown = [self.enough(policy) or self._of(policy)[-1] for policy in self.settings.policies]
        save_figure(path, [_series(row) for row in shown], title=self._scenario()[0])

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write what `draw` draws, and more, as one HTML page; errors as of `sponge.measure.write_report`."""
        shown = [self.enough(policy) or self._of(policy)[-1] for policy in self.settings.policies]
        title, *notes = self._scenario()
        verdicts = map(self._verdict, self.settings.policies)
        settings = {
            name: ", ".join(f"{slo['slo_s']:g} s (weight {slo['weight']:g})" for slo in value)
            if name == "slos"
            else "–"
            if value is None
            else str(value)
            for name, value in self.to_json()["settings"].items()
        }
        write_report(
            path,
            [row.first.recording(_label(row), fastest_s=self.fastest_s) for row in shown],
            title=title,
            notes=[*notes, *verdicts, "Below: the first seed's run of each policy."],
            settings=settings,
        )

    def _of(self, policy: str) -> list[Row]:
        return [row for row in self.rows if row.policy == policy]

    def _scenario(self) -> list[str]:
        used, some = self.settings, max(self.rows, key=lambda row: row.max_cores)
        waiting = used.clients is not None
        slos = " or ".join(f"{slo.slo_s:g} s" for slo in used.slos)
        if len(used.slos) > 1:
            slos += f" (weights {' : '.join(f'{slo.weight:g}' for slo in used.slos)})"
        payload = f"{used.payload_bytes / 1000:g} kB each over {self.network}, " if used.payload_bytes else ""
        who = f"{used.rate_rps:g} requests/s ({used.arrivals})"
        if waiting:
            count = f"{used.clients} {'client' if used.clients == 1 else 'clients'}"
            who = f"{count}, each again {used.think_s:g} s after its answer"
        number = "who waits longer asks for less" if waiting else f"{some.requests:,} requests"
        lines = [
            f"{who}, {payload}answer due {slos} after sending",
            f"{used.seeds} {'run' if used.seeds == 1 else 'runs'} of {self.duration_s:g} s, {number}, "
            f"batches of {used.batch_limit} at most",
        ]
        if some.lost_at_arrival:
            them = f"{some.requests:,} requests" if waiting else "them"
            share = f"{100 * some.lost_at_arrival / some.requests:.3g} %"
            lines.append(
                f"{some.lost_at_arrival:,} of {them} ({share}) arrive with less than {1000 * self.fastest_s:.0f} ms "
                f"left, what one takes on {used.cores_limit} cores:\n"
                "they are lost whatever is done, and not counted as deadlines below"
            )
        if used.profile is not None and max(row.max_cores for row in self.rows) > max(used.profile.cores):
            lines.append(
                f"The profile was measured on up to {max(used.profile.cores):g} cores; what it says of more is "
                "extrapolated."
            )
        return lines

    def _table(self) -> Iterator[str]:
        width = max(len("policy"), *(len(row.policy) for row in self.rows))
        waiting = self.settings.clients is not None
        asked = "  requests/s" if waiting else ""
        yield f"{'policy':{width}}  max cores  deadlines met  mean cores  peak cores  p99 response{asked}"
        for row in self.rows:
            p99_ms = 1000 * row.response_s_p99
            response = "-" if math.isnan(p99_ms) else f"{p99_ms:.0f} ms" if p99_ms >= 10 else f"{p99_ms:.2g} ms"
            yield (
                f"{row.policy:{width}}  {row.max_cores:9d}  {row.met:>13}  {row.mean_cores:10.2f}  "
                f"{row.peak_cores:10g}  {response:>12}" + (f"  {row.requests_per_s:10.2f}" if waiting else "")
            )

    def _verdict(self, policy: str) -> str:
        target = f"{self.settings.target_pct:g} %"
        row, tried = self.enough(policy), self._of(policy)
        if not any(math.isfinite(row.met_pct) for row in tried):
            unit = ""
            if self.settings.profile is None and self.fastest_s > max(slo.slo_s for slo in self.settings.slos):
                unit = " Are the numbers of --model in seconds?"
            return f"{policy}: every request is lost before it arrives; no number of cores helps.{unit}"
        if row is None:
            best = max(tried, key=lambda row: row.met_pct)
            used = max(row.peak_cores for row in tried)
            unused = f"; it never takes more than {used:g}" if used < tried[-1].max_cores else ""
            return (
                f"{policy}: up to {tried[-1].max_cores} cores are not enough for {target} of the deadlines "
                f"(at best {best.met}, with {best.max_cores}{unused})."
            )
        among = "" if not self.settings.max_cores else " (the fewest of those tried)"
        cores = f"{row.max_cores} core{' is' if row.max_cores == 1 else 's are'} enough"
        text = f"{policy}: {cores}{among} for {target} of the deadlines; {row.mean_cores:.2f} are allocated on average."
        counted = row.requests - row.lost_at_arrival
        if counted * (1 - self.settings.target_pct / 100) < 3 and self.settings.target_pct < 100:
            text += f"\nOne miss of {counted:,} requests weighs {100 / counted:.2g} %: a longer --duration says more."
        return text


def _label(row: Row) -> str:
    return f"{row.policy}, {row.max_cores} at most"


def _series(row: Row) -> Series:
    run = row.first
    columns = zip(*(getattr(run, name).tolist() for name in _OUTCOME_FIELDS), strict=True)
    outcomes = [
        Outcome(
            sent_at=sent,
            arrived_at=arrived,
            deadline=deadline,
            finished_at=finished if math.isfinite(finished) else None,
            kind=OutcomeKind.FINISHED if math.isfinite(finished) else OutcomeKind.REJECTED,
        )
        for sent, arrived, deadline, finished in columns
    ]
    steps = run.in_force
    return Series(
        policy=_label(row),
        outcomes=outcomes,
        allocation=Allocation(times_s=steps.times_s, cores=steps.cores, end_s=steps.end_s),
    )
