"""``sponge profile``: measure a model, and say what came of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from sponge.core.latency import LatencyModel
from sponge.live.profiler import Profiler
from sponge.live.session import ElasticSession, available_cpus
from sponge.profile import Profile
from sponge.profile.findings import findings

PERCENTILES = (50, 95, 99)


@attrs.frozen(kw_only=True)
class Measured:
    """A profile and what the command says about it."""

    profile: Profile
    latency: LatencyModel

    def explain(self) -> str:
        """Return it in plain words."""
        report = self.latency.report
        parts = [self.profile.summary()] if report is None else [self.profile.summary(), report.explain()]
        return "\n\n".join([*parts, "\n".join(["In short:", *(f"- {line}" for line in findings(self.profile))])])

    def to_json(self) -> dict[str, Any]:
        """Return cells and fit as JSON values; the samples are left to the saved profile."""
        data = self.profile.to_dict()
        data["findings"] = findings(self.profile)
        for shown, cell in zip(data["cells"], self.profile.cells, strict=True):
            del shown["samples_us"]
            for percentile, value in zip(PERCENTILES, np.percentile(cell.samples_s, PERCENTILES), strict=True):
                shown[f"latency_s_p{percentile}"] = round(float(value), 6)
        latency, report = self.latency, self.latency.report
        data["latency_model"] = {
            "form": None if report is None else report.form,
            "percentile": None if report is None else report.percentile,
            "gamma_s": latency.gamma_s,
            "epsilon_s": latency.epsilon_s,
            "delta_s": latency.delta_s,
            "eta_s": latency.eta_s,
            "mean_error": None if report is None else report.mean_error,
            "worst_error": None if report is None else report.worst_error,
        }
        return data


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Read shapes as they are typed.

    Parameters
    ----------
    texts
        Each ``name=1,3,640,640``: an input's name and the sizes of its axes, with or without the batch axis.

    Raises
    ------
    ValueError
        If one is not of that form, or a name comes twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        # From the right: an input's name may itself hold an equals sign, sizes cannot.
        name, _, sizes = text.rpartition("=")
        fields = [field.strip() for field in sizes.split(",")]
        if not name or not all(field.isascii() and field.isdigit() and 0 < int(field) < 2**31 for field in fields):
            raise ValueError(f"shape must be like images=1,3,640,640, got {text!r}")
        if name in shapes:
            raise ValueError(f"shape of {name!r} is given twice")
        shapes[name] = tuple(map(int, fields))
    return shapes


def next_step(saved: os.PathLike[str] | None) -> str:
    """Return what a user may do with the profile that was saved there, or that was not saved."""
    if saved is None:
        return (
            "Not saved: with --out profile.json it is, and sponge simulate profile.json says how many cores you need."
        )
    name = shlex.quote(os.fspath(saved))
    return f"Saved to {name}. How many cores you need: sponge simulate {name}"


def batch_sizes_up_to(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, … and *most*."""
    return tuple(sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most}))


def measure(
    model: str | os.PathLike[str],
    *,
    max_cores: int | None,
    max_batch_size: int,
    shapes: dict[str, tuple[int, ...]],
    budget_s: float,
    quiet: bool,
) -> Measured:
    """Measure a model's latency and fit the latency model.

    Parameters
    ----------
    model
        An ONNX file.
    max_cores
        Most cores of all lanes together; None: all that this process may use.
    max_batch_size
        Largest batch; 1 is used where the model fixes its batch axis.
    shapes
        By input name, for inputs with free axes.
    budget_s
        Time to spend [s].
    quiet
        Show no progress.

    Raises
    ------
    ValueError
        If a shape is missing or contradicts the model.
    UnsupportedModel, FileNotFoundError
        As of `sponge.ElasticSession`.
    """
    cores = available_cpus() if max_cores is None else max_cores
    with ElasticSession(os.fspath(model), max_threads=cores, max_lanes=cores) as session:
        profile = Profiler(
            session,
            batch_sizes=batch_sizes_up_to(max_batch_size) if session.dynamic_batch else (1,),
            shapes=shapes or None,
            budget_s=budget_s,
            progress=not quiet,
            model_name=os.path.basename(os.fspath(model)),
        ).run()
    return Measured(profile=profile, latency=LatencyModel.fit(profile))
