"""A workload: who arrives when, and by when the answer is due."""

from __future__ import annotations

import math

import attrs
import numpy as np
import numpy.typing as npt

from sponge.workload.bandwidth import BandwidthTrace, FloatArray


def _as_floats(values: npt.ArrayLike) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


@attrs.frozen(kw_only=True, eq=False)
class Workload:
    """Requests in order of arrival, as three arrays of shape ``(n_requests,)`` [s from the start of the
    workload].

    The order of arrival is not that of sending: a request sent during a dip of the network is overtaken.

    Raises
    ------
    ValueError
        If the arrays differ in length, hold something not finite (deadlines may be ``inf``), are not sorted
        by arrival, or a request arrives before it was sent.
    """

    sent_at_s: FloatArray = attrs.field(converter=_as_floats)
    arrived_at_s: FloatArray = attrs.field(converter=_as_floats)
    deadline_s: FloatArray = attrs.field(converter=_as_floats)

    def __attrs_post_init__(self) -> None:
        sent, arrived, deadline = self.sent_at_s, self.arrived_at_s, self.deadline_s
        if sent.ndim != 1 or not sent.shape == arrived.shape == deadline.shape:
            raise ValueError(
                "sent_at_s, arrived_at_s and deadline_s must be one-dimensional and of equal length, "
                f"got shapes {sent.shape}, {arrived.shape} and {deadline.shape}"
            )
        if not (np.all(np.isfinite(sent)) and np.all(np.isfinite(arrived))) or np.any(np.isnan(deadline)):
            raise ValueError("sent_at_s and arrived_at_s must be finite, and deadline_s must be numbers")
        if np.any(np.diff(arrived) < 0):
            raise ValueError("arrived_at_s must be sorted")
        if np.any(arrived < sent):
            raise ValueError("arrived_at_s must not precede sent_at_s")

    def __len__(self) -> int:
        return len(self.arrived_at_s)

    @property
    def budget_s(self) -> FloatArray:
        """What the network has left of each request's time at its arrival [s]; negative if too late."""
        return self.deadline_s - self.arrived_at_s

    @property
    def slo_s(self) -> FloatArray:
        """Allowance of each request from sending to the answer [s]; rounding aside, one of its SLO classes."""
        return self.deadline_s - self.sent_at_s

    @property
    def network_s(self) -> FloatArray:
        """What the network took of it [s]."""
        return self.arrived_at_s - self.sent_at_s

    @classmethod
    def from_network(
        cls,
        sent_at_s: npt.ArrayLike,
        trace: BandwidthTrace,
        payload_bytes: npt.ArrayLike,
        slo_s: npt.ArrayLike,
        *,
        offset_s: npt.ArrayLike = 0.0,
        shortcut: bool = False,
    ) -> Workload:
        """Send requests through a network.

        Parameters
        ----------
        sent_at_s
            Send times [s], shape ``(n_requests,)``, in any order.
        trace
            The bandwidth that each request has to itself.
        payload_bytes, slo_s
            Size [bytes] and allowance from sending to answer [s, > 0]: one for all, or one for each.
        offset_s
            Place in the trace at time 0 [s, ≥ 0]: one for all, or one for each, for clients that travel apart.
        shortcut
            See `BandwidthTrace.upload_time_s`.

        Raises
        ------
        ValueError
            If *slo_s* is not positive, an upload would never end, or `BandwidthTrace.upload_time_s` raises
            it.
        """
        sent = np.asarray(sent_at_s, dtype=np.float64)
        slo = np.broadcast_to(np.asarray(slo_s, dtype=np.float64), sent.shape)
        if not np.all(slo > 0):
            raise ValueError(f"slo_s must be positive, got {float(slo[~(slo > 0)][0])!r}")
        starts_s = sent + np.broadcast_to(np.asarray(offset_s, dtype=np.float64), sent.shape)
        upload_s = np.broadcast_to(trace.upload_time_s(starts_s, payload_bytes, shortcut=shortcut), sent.shape)
        if not np.all(np.isfinite(upload_s)):
            stuck = float(sent[~np.isfinite(upload_s)][0])
            raise ValueError(f"the upload sent at {stuck:g} s never ends: the trace has no bandwidth from then on")
        arrived = sent + upload_s
        order = np.argsort(arrived, kind="stable")
        return cls(sent_at_s=sent[order], arrived_at_s=arrived[order], deadline_s=(sent + slo)[order])

    def until(self, duration_s: float) -> Workload:
        """Return the requests that arrive before *duration_s* [s]."""
        if math.isnan(duration_s):
            raise ValueError(f"duration_s must be a number, got {duration_s!r}")
        kept = self.arrived_at_s < duration_s
        return Workload(
            sent_at_s=self.sent_at_s[kept],
            arrived_at_s=self.arrived_at_s[kept],
            deadline_s=self.deadline_s[kept],
        )
