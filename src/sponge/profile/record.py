"""Profile: what was measured of a model on a machine, and everything needed to judge whether it still holds.

* Raw samples are kept, not summaries: which percentile matters is the user's choice, made later.
* A profile is data. It is stored as JSON and read with every field checked and every size bounded, so that a file from
  elsewhere can be wrong but not harmful.
* Latencies belong to one model on one kind of machine under one way of limiting CPU. All three are recorded, and
  `Profile.check` refuses a profile that was measured elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import attrs
import numpy as np

from sponge.core.fitting import Estimate
from sponge.core.percentiles import estimate_cells
from sponge.errors import ProfileMismatch
from sponge.files import write_data
from sponge.profile import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "sponge-profile"
FORMAT_VERSION = 1
MAX_SAMPLES_PER_CELL = 1_000
"""Enough for a p99 of its own in every cell, and 8 kB of JSON at most."""
MAX_CELLS = 10_000
_MAX_SAMPLE_US = 10**10
_COMPARED_VERSIONS = ("onnxruntime",)


def _positive(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{attribute.name} must be a number above 0, got {value!r}")


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


@attrs.frozen(kw_only=True)
class Cell:
    """Latencies of one batch size on one CPU share, with as many lanes busy.

    Raises
    ------
    ValueError
        If a number is not above 0, or there is no sample or more than `MAX_SAMPLES_PER_CELL`.
    """

    batch_size: int = attrs.field(validator=_positive)
    cores: float = attrs.field(validator=_positive, converter=float)
    """Share of each busy lane [cores]."""
    lanes: int = attrs.field(default=1, validator=_positive)
    """Lanes that were busy, each on its own `cores`."""
    threads: int = attrs.field(validator=_positive)
    """Intra-op threads of a run."""
    samples_s: tuple[float, ...] = attrs.field(converter=_floats, repr=lambda s: f"<{len(s)} samples>")
    """Latencies [s], in whole microseconds."""
    runs: int = 0
    """Runs measured; more than there are samples if only some were kept."""
    settled: bool = True
    """False if measuring ended before the percentile was known as closely as asked."""

    def __attrs_post_init__(self) -> None:
        if not 1 <= len(self.samples_s) <= MAX_SAMPLES_PER_CELL:
            raise ValueError(f"samples_s must hold 1 to {MAX_SAMPLES_PER_CELL} samples, got {len(self.samples_s)}")
        if not all(0 < sample < float("inf") for sample in self.samples_s):
            raise ValueError("samples_s must hold numbers above 0 only")

    @classmethod
    def of(
        cls,
        *,
        batch_size: int,
        cores: float,
        threads: int,
        samples_s: Iterable[float],
        lanes: int = 1,
        settled: bool = True,
        seed: int = 0,
    ) -> Cell:
        """Make a cell from any number of samples: rounded to 1 µs, and a random choice if they are too many."""
        values = np.asarray(list(samples_s), np.float64)
        runs = int(values.size)
        if runs > MAX_SAMPLES_PER_CELL:
            chosen = np.random.default_rng(seed).choice(runs, MAX_SAMPLES_PER_CELL, replace=False)
            values = values[np.sort(chosen)]
        whole = np.maximum(np.round(values * 1e6), 1.0)
        return cls(
            batch_size=batch_size,
            cores=cores,
            lanes=lanes,
            threads=threads,
            samples_s=tuple((whole / 1e6).tolist()),
            runs=runs,
            settled=settled,
        )


def _cells(values: Iterable[Cell]) -> tuple[Cell, ...]:
    return tuple(values)


class Expected(TypedDict, total=False):
    """What a profile is compared with; the arguments of `Profile.check`."""

    model_hash: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    cpu_control: str


@attrs.frozen(kw_only=True)
class Profile:
    """Measured latencies of a model over batch sizes, CPU shares and busy lanes.

    Raises
    ------
    ValueError
        If there is no cell, or one twice.
    """

    cells: tuple[Cell, ...] = attrs.field(converter=_cells, repr=lambda cells: f"<{len(cells)} cells>")
    model_hash: str = ""
    """SHA-256 of the model."""
    model_name: str = ""
    input_shapes: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    """By input name, with a batch of one."""
    machine: Mapping[str, str] = attrs.field(factory=dict)
    """Fingerprint, see `machine_fingerprint`."""
    versions: Mapping[str, str] = attrs.field(factory=dict)
    """By package, see `package_versions`."""
    cpu_control: str = ""
    """What limited the CPU share, such as ``"cgroup v2 quota"``."""
    measured_at: str = ""
    """When, in ISO 8601; only for people to read."""
    notes: tuple[str, ...] = ()
    """What else a reader should know, such as cells that were left out."""

    def __attrs_post_init__(self) -> None:
        keys = {(cell.batch_size, cell.cores, cell.lanes) for cell in self.cells}
        if not self.cells or len(keys) < len(self.cells) or len(keys) > MAX_CELLS:
            raise ValueError(f"cells must hold 1 to {MAX_CELLS} cells, each once, got {len(self.cells)}")

    # -- reading

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that were measured, ascending."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    @property
    def cores(self) -> tuple[float, ...]:
        """CPU shares of a lane that were measured, ascending."""
        return tuple(sorted({cell.cores for cell in self.cells}))

    @property
    def lanes(self) -> tuple[int, ...]:
        """Numbers of busy lanes that were measured, ascending."""
        return tuple(sorted({cell.lanes for cell in self.cells}))

    def cell(self, batch_size: int, cores: float, lanes: int = 1) -> Cell:
        """Return one cell.

        Raises
        ------
        KeyError
            If it was not measured.
        """
        for cell in self.cells:
            if (cell.batch_size, cell.cores, cell.lanes) == (batch_size, cores, lanes):
                return cell
        raise KeyError((batch_size, cores, lanes))

    def estimates(self, percentile: float = 99) -> tuple[Estimate, ...]:
        """Return a percentile of every cell with its 95 % confidence interval, in the order of `cells`.

        A cell with too few samples for the tail of its own borrows it from similar cells, and says so (``pooled``).
        """
        return estimate_cells(self.cells, percentile)

    def summary(self, percentile: float = 99) -> str:
        """Return a table for people: latency, throughput, and which allocations are worth their cores."""
        from sponge.profile import view

        return view.summary(self, percentile)

    def plot(self, path: str | os.PathLike[str] | None = None, percentile: float = 99) -> Figure:
        """Draw latency over cores for each batch size, with confidence intervals and the fitted model's lines.

        Parameters
        ----------
        path
            Where to save it (the ending chooses the format); not saved by default.
        percentile
            Percentile to draw [%].

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        from sponge.profile import view

        return view.plot(self, path, percentile)

    # -- whose it is

    def check(
        self,
        model_hash: str | None = None,
        machine: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
        *,
        cpu_control: str | None = None,
        force: bool = False,
    ) -> None:
        """Make sure that the profile was measured on this model, machine and software.

        Parameters
        ----------
        model_hash, machine, versions, cpu_control
            What is here; what is not given is not compared. Of the versions only ONNX Runtime's counts: the other
            packages do not run the model.
        force
            Compare nothing.

        Raises
        ------
        ProfileMismatch
            If anything differs; it names the differences.
        """
        differences: dict[str, tuple[str, str]] = {}

        def compare(name: str, saved: str | None, here: str | None) -> None:
            if here is not None and saved != here:
                differences[name] = (saved or "unknown", here)

        compare("model", self.model_hash, model_hash)
        for name, value in (machine or {}).items():
            compare(f"machine's {name}", self.machine.get(name), value)
        for name in _COMPARED_VERSIONS:
            compare(name, self.versions.get(name), (versions or {}).get(name))
        compare("CPU control", self.cpu_control, cpu_control)
        if differences and not force:
            raise ProfileMismatch(differences)

    # -- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, readable by this user only.

        A reader meets the old file or the new one, never a part: it is written beside *path* and moved into place.

        Raises
        ------
        OSError
            If it cannot be written.
        ValueError
            If it is larger than what `load` reads.
        """
        content = json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) > checks.MAX_FILE_BYTES:
            raise ValueError(f"cells must fit into {checks.MAX_FILE_BYTES} bytes of JSON, these take {len(content)}")
        write_data(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, force: bool = False, expect: Expected | None = None) -> Profile:
        """Read a saved profile.

        Parameters
        ----------
        path
            File that `save` wrote.
        expect
            What it is compared with (the arguments of `check`, by name); by default nothing.
        force
            Accept it whatever it was measured on.

        Raises
        ------
        ProfileMismatch
            If it was measured on something else than expected.
        ValueError
            If the file is no profile; the message names the file and the field.
        OSError
            If it cannot be read.
        """
        try:
            profile = cls.from_dict(checks.read_json(path))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a usable profile: {error}") from error
        profile.check(**(expect or {}), force=force)
        return profile

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON types; `from_dict` reads it back."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": {
                "name": self.model_name,
                "hash": self.model_hash,
                "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            },
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "cpu_control": self.cpu_control,
            "measured_at": self.measured_at,
            "notes": list(self.notes),
            "cells": [
                {
                    "batch_size": cell.batch_size,
                    "cores": cell.cores,
                    "lanes": cell.lanes,
                    "threads": cell.threads,
                    "runs": cell.runs,
                    "settled": cell.settled,
                    "samples_us": [max(1, round(sample * 1e6)) for sample in cell.samples_s],
                }
                for cell in self.cells
            ],
        }

    @classmethod
    def from_dict(cls, data: object) -> Profile:
        """Make a profile from what `to_dict` returned, checking everything.

        Raises
        ------
        ValueError
            If anything is missing, of a wrong type or out of range; the message names the field.
        """
        top = checks.mapping(data, "the top level")
        if top.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {checks.short(top.get('format'))}")
        if top.get("version") != FORMAT_VERSION:
            raise ValueError(f"version must be {FORMAT_VERSION}, got {checks.short(top.get('version'))}")
        model = checks.mapping(top.get("model"), "model")
        shapes = checks.mapping(model.get("input_shapes"), "model.input_shapes", most=1_000)
        return cls(
            cells=tuple(
                _cell(value, f"cells[{k}]")
                for k, value in enumerate(checks.sequence(top.get("cells"), "cells", 1, MAX_CELLS))
            ),
            model_name=checks.text(model.get("name"), "model.name"),
            model_hash=checks.text(model.get("hash"), "model.hash"),
            input_shapes={
                checks.text(name, "model.input_shapes"): tuple(
                    checks.whole(size, f"model.input_shapes.{checks.short(name)}", 0, 2**40)
                    for size in checks.sequence(shape, f"model.input_shapes.{checks.short(name)}", 0, 64)
                )
                for name, shape in shapes.items()
            },
            machine=checks.texts(top.get("machine"), "machine"),
            versions=checks.texts(top.get("versions"), "versions"),
            cpu_control=checks.text(top.get("cpu_control"), "cpu_control"),
            measured_at=checks.text(top.get("measured_at"), "measured_at"),
            notes=tuple(checks.text(note, "notes") for note in checks.sequence(top.get("notes"), "notes", 0, 1_000)),
        )


def _cell(value: object, field: str) -> Cell:
    data = checks.mapping(value, field)
    samples = checks.sequence(data.get("samples_us"), f"{field}.samples_us", 1, MAX_SAMPLES_PER_CELL)
    return Cell(
        batch_size=checks.whole(data.get("batch_size"), f"{field}.batch_size", 1, 2**20),
        cores=checks.positive(data.get("cores"), f"{field}.cores", 2.0**16),
        lanes=checks.whole(data.get("lanes"), f"{field}.lanes", 1, 2**16),
        threads=checks.whole(data.get("threads"), f"{field}.threads", 1, 2**16),
        runs=checks.whole(data.get("runs"), f"{field}.runs", 0, 2**53),
        settled=checks.flag(data.get("settled"), f"{field}.settled"),
        samples_s=tuple(
            checks.whole(sample, f"{field}.samples_us[{k}]", 1, _MAX_SAMPLE_US) / 1e6
            for k, sample in enumerate(samples)
        ),
    )
