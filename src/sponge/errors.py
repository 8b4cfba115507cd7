"""Every exception that a caller of sponge can meet.

Bad arguments are plain ``ValueError``/``TypeError`` that name the argument and its value; everything else derives from
`SpongeError` and carries the facts as fields, so that a service can map it (to a status code, to a metric) without
parsing text.
"""

from __future__ import annotations


class SpongeError(Exception):
    """Base of all errors that sponge raises for reasons other than a bad argument."""


class DeadlineExceeded(SpongeError):
    """A request was turned away because it could no longer meet its deadline.

    Raised from the request's future. It was not run: the refusal comes as soon as it is certain, so that the client
    can do something else with the time that is left.
    """

    def __init__(self, request_id: int, deadline: float, now: float) -> None:
        self.request_id = request_id
        self.deadline = deadline
        self.now = now
        super().__init__(
            f"request {request_id} cannot meet its deadline: {deadline - now:+.4f} s were left when it was turned away"
        )


class QueueFull(SpongeError):
    """A request was turned away because as many requests as allowed were already waiting."""

    def __init__(self, request_id: int, max_queue: int) -> None:
        self.request_id = request_id
        self.max_queue = max_queue
        super().__init__(f"request {request_id} was turned away: {max_queue} requests (max_queue) are already waiting")


class SchedulerClosed(SpongeError):
    """The scheduler was closed before the request could be run, or before it was submitted."""

    def __init__(self, request_id: int | None = None) -> None:
        self.request_id = request_id
        what = "no request is accepted" if request_id is None else f"request {request_id} was not run"
        super().__init__(f"the scheduler is closed: {what}")


class SchedulerForked(SchedulerClosed):
    """The scheduler was made before a fork, and this is the child: none of the threads that serve are here."""

    def __init__(self, owner_pid: int, pid: int, request_id: int | None = None) -> None:
        self.owner_pid = owner_pid
        self.pid = pid
        self.request_id = request_id
        what = "nothing" if request_id is None else f"neither request {request_id} nor any other"
        SpongeError.__init__(
            self,
            f"the scheduler belongs to process {owner_pid}, from which this process {pid} was forked: {what} is served "
            "here. Make the scheduler in each worker, after the fork",
        )


class ControllerFailed(SchedulerClosed):
    """The scheduler has ended because its controller raised; the cause is chained as ``__cause__``.

    Raised from the futures of all requests that waited then, and by those who submit later. The scheduler must be
    closed and made anew.
    """

    def __init__(self, request_id: int | None, reason: str) -> None:
        super().__init__(request_id)
        self.reason = reason
        what = "no request is accepted" if request_id is None else f"request {request_id} was not run"
        self.args = (
            f"the scheduler has ended, since its controller failed ({reason}): {what}. "
            "Close it and make another one; the log has the traceback",
        )


class ModelError(SpongeError):
    """The model raised while running this request; the cause is chained as ``__cause__``."""

    def __init__(self, request_id: int, reason: str) -> None:
        self.request_id = request_id
        self.reason = reason
        super().__init__(f"the model failed on request {request_id}: {reason}")


class UnsupportedModel(SpongeError):
    """The model or session has a property that sponge cannot serve; the message names it and what would help."""


class CgroupUnavailable(SpongeError):
    """No CPU quota can be set here; the message says why and what setting would allow it."""

    def __init__(self, reason: str, advice: str = "") -> None:
        self.reason = reason
        self.advice = advice
        super().__init__(f"{reason}. {advice}" if advice else reason)


class CpuControlError(SpongeError):
    """The kernel refused a value that had been expected to work, or another value was found in force.

    *left_cores* is what limits the threads now [cores], ``inf`` if nothing does, None if that is not known.
    """

    def __init__(self, path: str, value: str, reason: str, *, left_cores: float | None = None) -> None:
        self.path = path
        self.value = value
        self.reason = reason
        self.left_cores = left_cores
        super().__init__(f"could not set {path} to {value!r}: {reason}")


class ProfileMismatch(SpongeError):
    """A saved profile was measured on another model, machine or ONNX Runtime version."""

    def __init__(self, differences: dict[str, tuple[str, str]]) -> None:
        self.differences = differences
        listed = "; ".join(f"{name}: saved {saved!r}, here {here!r}" for name, (saved, here) in differences.items())
        super().__init__(
            f"the profile does not belong to this model on this machine ({listed}). "
            "Profile again, or pass force=True to use it all the same"
        )


class TraceError(SpongeError):
    """A bandwidth log could not be read; the message names the line and what was expected there."""
