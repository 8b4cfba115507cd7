"""Every public error says what happened, which value it was, and what to do about it, and carries the facts."""

from __future__ import annotations

import pytest

import sponge
from sponge import errors

EXAMPLES: list[tuple[errors.SpongeError, list[str], dict[str, object]]] = [
    (
        errors.DeadlineExceeded(7, 12.5, 12.75),
        ["request 7", "-0.2500 s", "turned away"],
        {"deadline": 12.5, "now": 12.75},
    ),
    (errors.QueueFull(8, 1024), ["request 8", "1024", "max_queue"], {"max_queue": 1024}),
    (errors.SchedulerClosed(), ["closed", "no request is accepted"], {"request_id": None}),
    (errors.SchedulerClosed(9), ["closed", "request 9 was not run"], {"request_id": 9}),
    (
        errors.ControllerFailed(3, "KeyError(1)"),
        ["controller failed (KeyError(1))", "request 3 was not run", "make another one"],
        {"request_id": 3, "reason": "KeyError(1)"},
    ),
    (
        errors.SchedulerForked(100, 101, 4),
        ["process 100", "process 101", "request 4", "after the fork"],
        {"owner_pid": 100, "pid": 101},
    ),
    (errors.ModelError(5, "index out of range"), ["request 5", "index out of range"], {"reason": "index out of range"}),
    (errors.UnsupportedModel("output y has no batch axis"), ["output y has no batch axis"], {}),
    (
        errors.CgroupUnavailable("/sys/fs/cgroup is read-only", "Mount it read-write"),
        ["read-only", "Mount it read-write"],
        {"advice": "Mount it read-write"},
    ),
    (
        errors.CpuControlError("/sys/fs/cgroup/cpu.max", "1000 100", "Invalid argument"),
        ["/sys/fs/cgroup/cpu.max", "'1000 100'", "Invalid argument"],
        {"path": "/sys/fs/cgroup/cpu.max", "value": "1000 100"},
    ),
    (
        errors.ProfileMismatch({"machine": ("a", "b")}),
        ["machine: saved 'a', here 'b'", "Profile again", "force=True"],
        {"differences": {"machine": ("a", "b")}},
    ),
    (errors.TraceError("log.csv, line 3: expected a number, got 'x'"), ["line 3", "'x'"], {}),
]


@pytest.mark.parametrize(("error", "parts", "facts"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_message_and_facts(error: errors.SpongeError, parts: list[str], facts: dict[str, object]) -> None:
    """A person reads the message; a service maps the fields."""
    for part in parts:
        assert part in str(error)
    for name, value in facts.items():
        assert getattr(error, name) == value


def test_every_public_error_has_an_example() -> None:
    """Or one could be added whose message nobody has looked at."""
    public = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert public - {errors.SpongeError} == {type(error) for error, _, _ in EXAMPLES}
    assert all(issubclass(kind, errors.SpongeError) for kind in public)
    assert {kind.__name__ for kind in public if hasattr(sponge, kind.__name__)} >= {"ControllerFailed", "QueueFull"}


def test_controller_failed_is_caught_as_closed() -> None:
    """Services that answer "closed" with 503 need not know of it."""
    with pytest.raises(errors.SchedulerClosed):
        raise errors.ControllerFailed(None, "a bug")
