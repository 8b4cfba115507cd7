"""``sponge.wrap``: from a model to a scheduler in one call.

What it puts together can be put together by hand from the same parts; there is nothing here that decides.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.errors import ProfileMismatch
from sponge.live.cache import open_cache, why_not_trusted
from sponge.live.cgroup import CgroupScaler
from sponge.live.profiler import Profiler, Progress
from sponge.live.scalers import CpuScaler, best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, SessionOrModel, available_cpus
from sponge.profile import Profile, machine_fingerprint, package_versions

_log = logging.getLogger("sponge")


def wrap(
    session_or_path: ElasticSession | SessionOrModel,
    *,
    max_cores: float | None = None,
    max_batch_size: int | None = None,
    max_lanes: int | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    slo_s: float | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    cpu_control: Literal["auto", "quota", "affinity", "threads"] = "auto",
    percentile: float = 99,
    settings: Settings | None = None,
    copy_inputs: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    profile_budget_s: float = 25.0,
    progress: Progress | bool | None = None,
    force: bool = False,
    name: str = "sponge",
) -> Scheduler:
    """Make a scheduler that serves a model by deadlines; profiles the model on first use and keeps the profile.

    Parameters
    ----------
    session_or_path
        An ``onnxruntime.InferenceSession``, a path, a model's bytes, or an `ElasticSession`. What is made of it is
        closed with the scheduler; what was given stays the caller's.
    max_cores
        Most cores of all batches together [cores]; by default what this process may use: its CPUs, or its container's
        quota if that is less. Allocations are whole numbers, or halves or quarters if this is one. What is less than
        half a core above a whole number (the quarter of 1.25) serves as head-room of the quota and is not planned
        with: a thread that gets a quarter of a core only holds up the one that has a whole one.
    max_batch_size
        By default the largest batch that was profiled.
    max_lanes
        Most batches side by side; by default one for each core.
    profile
        A `Profile`, or the path of a saved one. By default one is looked for in the cache, and measured and put there
        if there is none for this model, machine and set-up.
    slo_s
        Budget of requests that bring none [s].
    shapes
        Sizes of the inputs' axes by name, for models that leave others than the batch open.
    inputs
        One request to profile with, instead of random numbers; it tells the shapes too.
    cpu_control
        How the allocation is enforced, see `sponge.live.scalers.best_scaler`.
    percentile
        Of the latency that plans are made with [%].
    settings
        Of the controller.
    copy_inputs
        Copy each request's arrays when it is submitted, see `sponge.Scheduler`.
    cache_dir
        Where the profile and the optimised model are kept: by default ``$SPONGE_CACHE_DIR``,
        ``$XDG_CACHE_HOME/sponge`` or ``~/.cache/sponge``. Several processes may use it at once: one profiles, the
        others wait for its result.
    profile_budget_s
        Time for profiling [s].
    progress
        Shown while profiling: True, False, or a callback ``(done, total, text)``; by default shown if stderr is a
        terminal.
    force
        Use *profile* even if it was measured on another model or machine.
    name
        Tells this scheduler apart in metrics, reports, ``sponge top`` and thread names; one for each model of a
        process.

    Returns
    -------
    Scheduler
        Running; close it, or use it as a context manager.

    Raises
    ------
    ProfileMismatch
        If *profile* was measured on another model, machine or ONNX Runtime.
    CgroupUnavailable
        If ``cpu_control="quota"`` and none can be set.
    ValueError, UnsupportedModel
        If an argument is out of range, or the model cannot be served.
    """
    usable_cores = _usable_cores()
    max_cores = usable_cores if max_cores is None else float(max_cores)
    if not 0 < max_cores < math.inf:
        raise ValueError(f"max_cores must be positive and finite, got {max_cores}")
    if max_cores > math.ceil(usable_cores):
        _log.warning("max_cores=%g, but this process may use %g: more makes nothing faster", max_cores, usable_cores)
    max_threads = max(1, math.ceil(max_cores))
    max_lanes = max_threads if max_lanes is None else max_lanes
    if inputs is not None and shapes is None:
        shapes = {name: array.shape for name, array in inputs.items()}
    with ExitStack() as stack:
        owned: list[Any] = []
        if isinstance(session_or_path, ElasticSession):
            session = session_or_path
        else:
            session = ElasticSession(session_or_path, max_threads=max_threads, max_lanes=max_lanes, cache_dir=cache_dir)
            owned.append(session)
            stack.callback(session.close)
        for note in session.notes:
            _log.info("%s", note)
        scaler = best_scaler(cpu_control)
        owned.append(scaler)
        stack.callback(scaler.close)
        if profile is None:
            profile = _cached_profile(
                session, scaler, max_cores, max_lanes, shapes, inputs, cache_dir, profile_budget_s, progress
            )
        elif not isinstance(profile, Profile):
            profile = Profile.load(profile, force=True)
        profile.check(session.model_hash, machine_fingerprint(), package_versions(), force=force)
        solver = Solver(
            LatencyModel.fit(profile, percentile),
            max_cores=max_cores,
            max_batch_size=_largest_batch(profile, session, max_batch_size),
            min_cores=min(1.0, max_cores),
            core_step=_core_step(max_cores),
            max_lanes=max_lanes,
        )
        session.reserve(max_lanes)
        session.warm_up(_warm_sizes(solver.max_batch_size), shapes=shapes or profile.input_shapes)
        scheduler = Scheduler(
            session, solver, scaler, settings=settings, slo_s=slo_s, copy_inputs=copy_inputs, name=name
        )
        scheduler.own(*reversed(owned))
        stack.pop_all()
        return scheduler


def _usable_cores() -> float:
    """Cores that this process may use: its CPUs, or the quota of the container it runs in."""
    quota = CgroupScaler.probe().container_quota_cores
    return float(max(min(available_cpus(), quota), 0.1))


def _core_step(max_cores: float) -> float:
    """Return the step of allocations that comes near to *max_cores*: 1, 1/2 or 1/4 core."""
    fraction = max_cores - int(max_cores)
    step = 1.0 if fraction == 0 else 0.5 if fraction < 0.75 else 0.25
    lowest = min(1.0, max_cores)
    planned = lowest + int((max_cores - lowest) / step) * step
    if planned < max_cores:
        _log.info("of max_cores=%g, %g cores are planned with; the rest is head-room", max_cores, planned)
    return step


def _largest_batch(profile: Profile, session: ElasticSession, asked: int | None) -> int:
    if not session.dynamic_batch:
        return 1
    return max(profile.batch_sizes) if asked is None else asked


def _warm_sizes(max_batch_size: int) -> list[int]:
    """Powers of two and the largest: ONNX Runtime lays out memory anew for each size, and most of it is shared."""
    return sorted({1 << i for i in range(max_batch_size.bit_length())} | {max_batch_size})


def _cached_profile(
    session: ElasticSession,
    scaler: CpuScaler,
    max_cores: float,
    max_lanes: int,
    shapes: Mapping[str, Sequence[int]] | None,
    inputs: Mapping[str, np.ndarray[Any, Any]] | None,
    cache_dir: str | os.PathLike[str] | None,
    budget_s: float,
    progress: Progress | bool | None,
) -> Profile:
    """Return the kept profile for this set-up, or measure and keep one."""
    cache = open_cache(cache_dir)
    if cache.note:
        _log.warning("the profile is not kept, and will be measured again at the next start: %s", cache.note)
    if progress is None:
        progress = sys.stderr is not None and sys.stderr.isatty()
    set_up = {
        "model": session.model_hash,
        "machine": machine_fingerprint(),
        "onnxruntime": package_versions()["onnxruntime"],
        "cpu_control": scaler.how,
        "max_cores": max_cores,
        "max_lanes": max_lanes,
        "shapes": {name: list(shape) for name, shape in sorted((shapes or {}).items())},
        "inputs": _digest(inputs),
    }
    key = hashlib.sha256(json.dumps(set_up, sort_keys=True).encode()).hexdigest()[:24]
    path = cache.path / f"profile-{key}.json"
    with _locked(path.with_suffix(".lock")):
        try:
            problem = why_not_trusted(path)
            if not problem:
                return Profile.load(path, expect={"model_hash": session.model_hash})
        except FileNotFoundError:
            problem = ""
        except (ValueError, ProfileMismatch) as error:
            problem = str(error)
        if problem:
            _log.warning("the cached profile is measured again: %s", problem)
        profile = Profiler(
            session, scaler=scaler, shapes=shapes, inputs=inputs, budget_s=budget_s, progress=progress
        ).run()
        profile.save(path)
        return profile


def _digest(inputs: Mapping[str, np.ndarray[Any, Any]] | None) -> str:
    """Return a hash of a request: how long a model takes may depend on what it is given, not on its shape alone."""
    if inputs is None:
        return ""
    digest = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        array = np.asarray(array)
        content = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
        digest.update(repr((name, array.dtype.str, array.shape, len(content))).encode() + content)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes respect: two that profile at once would measure each other."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
