"""What happened in a run, live or simulated, in columns: what the report page is drawn from."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import attrs
import numpy as np
import numpy.typing as npt

from sponge.measure.report import Allocation

FloatArray = npt.NDArray[np.float64]


class Ending(enum.IntEnum):
    """How a request ended, as stored in `Recording.ending`."""

    MET = 0
    """Answered by its deadline."""
    LATE = 1
    """Answered after it."""
    REJECTED = 2
    """Turned away because of its deadline."""
    QUEUE_FULL = 3
    """Turned away because too many were waiting."""
    CLOSED = 4
    """Turned away at the end."""
    FAILED = 5
    """The model raised."""
    CANCELLED = 6
    """Given up by its client."""


def _floats(values: npt.ArrayLike) -> FloatArray:
    return np.array(values, dtype=np.float64)


def _codes(values: npt.ArrayLike) -> npt.NDArray[np.int8]:
    return np.array(values).astype(np.int8)


@attrs.frozen(kw_only=True, eq=False)
class Recording:
    """Requests, batches and allocations of one run; instants count from its time zero [s].

    Arrays over requests have the shape ``(n_requests,)``, those over batches ``(n_batches,)``.
    """

    name: str
    """Of the policy or the scheduler, for legends."""
    arrived_at_s: FloatArray = attrs.field(converter=_floats)
    deadline_s: FloatArray = attrs.field(converter=_floats)
    """``inf`` for none."""
    started_at_s: FloatArray = attrs.field(converter=_floats)
    """``nan`` where the request did not run."""
    finished_at_s: FloatArray = attrs.field(converter=_floats)
    """``nan`` where the request was not answered."""
    ending: npt.NDArray[np.int8] = attrs.field(converter=_codes)
    """See `Ending`."""
    batch_rows: FloatArray = attrs.field(converter=_floats)
    batch_s: FloatArray = attrs.field(converter=_floats)
    """Duration of each batch [s]; ``nan`` if it never ended."""
    batch_expected_s: FloatArray = attrs.field(converter=_floats)
    """Predicted duration [s]; ``nan`` where it does not compare."""
    allocation: Allocation
    fastest_s: float = float("nan")
    """What a single request takes on all cores, by the latency model [s]: with less left at arrival it is lost."""
    forgotten: int = 0
    """Earlier requests that are not in it any more."""
    facts: Mapping[str, str] = attrs.field(factory=dict)
    """What else is to be said of the run: its settings, say."""

    def __attrs_post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in ("arrived_at_s", *_REQUEST_COLUMNS)}
        if len(lengths) > 1:
            raise ValueError(f"the columns over requests must be of equal length, got {sorted(lengths)}")
        lengths = {len(self.batch_rows), len(self.batch_s), len(self.batch_expected_s)}
        if len(lengths) > 1:
            raise ValueError(f"the columns over batches must be of equal length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.arrived_at_s)

    @property
    def budget_s(self) -> FloatArray:
        """Time left at arrival [s]."""
        return self.deadline_s - self.arrived_at_s

    @property
    def queue_delay_s(self) -> FloatArray:
        """From arrival to the start of the run that answered [s]; ``nan`` where the request did not run."""
        return self.started_at_s - self.arrived_at_s

    @property
    def response_s(self) -> FloatArray:
        """From arrival to the answer [s]; ``nan`` where there was none."""
        return self.finished_at_s - self.arrived_at_s

    @property
    def missed(self) -> npt.NDArray[np.bool_]:
        """Which requests were not answered by their deadline, though their clients did not give them up."""
        return np.asarray((self.ending != Ending.MET) & (self.ending != Ending.CANCELLED))

    def count(self, *endings: Ending) -> int:
        """Return how many requests ended in one of these ways."""
        return int(np.count_nonzero(np.isin(self.ending, endings)))


_REQUEST_COLUMNS = ("deadline_s", "started_at_s", "finished_at_s", "ending")
