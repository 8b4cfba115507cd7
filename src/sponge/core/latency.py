"""Predicted latency of a batch: what the solver and the controller know about a model.

Rules, and why they hold:

* Latency never rises with cores and never falls with the batch size, inside the measured range and beyond it.
  A solver that looks for the smallest adequate allocation may therefore invert the prediction
  (`Latency.cores_for`) and has nothing to enumerate.
* ``lanes`` batches that run at the same time disturb each other; the prediction for one of them, on its own
  cores, is multiplied by a factor that depends on how many run.
* Everything is a plain function of numbers. Scalars give a ``float`` without a detour through numpy, since
  the controller asks for one number at a time; arrays broadcast.
"""

from __future__ import annotations

from typing import Any, Protocol, overload

from sponge.core.four_terms import Array, FloatArray, LatencyModel
from sponge.core.table import LatencyTable

__all__ = ["Latency", "LatencyModel", "LatencyTable"]


class Latency(Protocol):
    """What `Solver` and `Controller` need to know about a model."""

    @overload
    def latency_s(self, batch_size: float, cores: float, lanes: int = 1) -> float: ...
    @overload
    def latency_s(self, batch_size: Array, cores: float | Array, lanes: int | Array = 1) -> FloatArray: ...
    @overload
    def latency_s(self, batch_size: float, cores: Array, lanes: int | Array = 1) -> FloatArray: ...
    def latency_s(self, batch_size: Any, cores: Any, lanes: Any = 1) -> Any:
        """Latency [s] of a batch on one lane's *cores* while *lanes* lanes are busy."""

    @overload
    def throughput_rps(self, batch_size: float, cores: float, lanes: int = 1) -> float: ...
    @overload
    def throughput_rps(self, batch_size: Array, cores: float | Array, lanes: int | Array = 1) -> FloatArray: ...
    @overload
    def throughput_rps(self, batch_size: float, cores: Array, lanes: int | Array = 1) -> FloatArray: ...
    def throughput_rps(self, batch_size: Any, cores: Any, lanes: Any = 1) -> Any:
        """Requests per second of one lane: batch size over latency."""

    @overload
    def cores_for(self, batch_size: float, latency_s: float, lanes: int = 1) -> float: ...
    @overload
    def cores_for(self, batch_size: Array, latency_s: float | Array, lanes: int | Array = 1) -> FloatArray: ...
    @overload
    def cores_for(self, batch_size: float, latency_s: Array, lanes: int | Array = 1) -> FloatArray: ...
    def cores_for(self, batch_size: Any, latency_s: Any, lanes: Any = 1) -> Any:
        """Smallest cores of one lane that keep a batch within *latency_s*; ``inf`` where none do."""
