"""What the Open Inference Protocol says of models and requests, apart from how it is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from sponge import __version__
from sponge.deadlines import DeadlineRule
from sponge.integrations.oip.tensors import datatype_name
from sponge.integrations.outcomes import Array, InvalidRequest, NotSupported, UnknownModel, submit

if TYPE_CHECKING:
    from sponge.live.scheduler import Scheduler

SERVER_NAME = "sponge"
VERSION = "1"
"""The version of every model: a scheduler serves one."""
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")

REFUSED = {
    "shared_memory_region": "shared memory is not supported: send the tensor's bytes",
    "classification": "the classification extension is not supported: ask for the scores",
    "sequence_id": "sequences are not supported: every request stands for itself",
}
"""Parameters that change what a request means; others are ignored."""
TIMEOUT_PARAMETER = "timeout"
"""Request parameter: time that the client grants [µs]."""


@attrs.frozen(kw_only=True)
class Call:
    """One inference request, decoded."""

    model: str
    version: str = ""
    id: str = ""
    inputs: dict[str, Array]
    outputs: tuple[str, ...] = ()
    """Names of the outputs that are wanted; empty: all."""
    allowances: dict[str, float] = attrs.field(factory=dict)
    """How long the client grants, by what says so [s]."""


def allowances_of(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Return what a request's parameters grant [s]; refuse those that cannot be honoured.

    Raises
    ------
    InvalidRequest
        If one of `REFUSED` is there.
    """
    refuse(parameters)
    timeout_us = parameters.get(TIMEOUT_PARAMETER)
    if isinstance(timeout_us, (int, float)) and not isinstance(timeout_us, bool) and timeout_us > 0:
        return {TIMEOUT_PARAMETER: float(min(timeout_us, 10**15)) / 1e6}
    return {}


def refuse(parameters: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` if a parameter cannot be honoured."""
    for name in parameters:
        if name in REFUSED:
            raise InvalidRequest(f"parameter {name!r}: {REFUSED[name]}")


class Models:
    """Schedulers by the names that clients know.

    Parameters
    ----------
    models
        Scheduler by name.
    rule
        How deadlines are found; by default from what the client says alone, and then from the scheduler's own SLO.

    Raises
    ------
    ValueError
        If there is no model, or a name cannot be part of a path.
    """

    def __init__(self, models: Mapping[str, Scheduler], rule: DeadlineRule | None = None) -> None:
        if not models:
            raise ValueError("models must name at least one scheduler, got none")
        for name in models:
            if not name or "/" in name:
                raise ValueError(f"a model's name must not be empty nor hold a slash, got {name!r}")
        self._schedulers = dict(models)
        self.rule = rule or DeadlineRule()

    def get(self, name: str, version: str = "") -> Scheduler:
        """Return the scheduler of a model; raise `UnknownModel` if there is none."""
        scheduler = self._schedulers.get(name)
        if scheduler is None or version not in ("", VERSION):
            raise UnknownModel(name, version)
        return scheduler

    @property
    def ready(self) -> bool:
        """Whether every model takes requests."""
        return not any(scheduler.closed for scheduler in self._schedulers.values())

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a model takes requests; one that is not served does not."""
        try:
            return not self.get(name, version).closed
        except UnknownModel:
            return False

    def submit(self, call: Call, deadline: float | None) -> Future[list[Array]]:
        """Queue a request; errors as for `sponge.integrations.outcomes.submit`, and `UnknownModel`."""
        scheduler = self.get(call.model, call.version)
        known = {spec.name for spec in scheduler.session.outputs}
        for name in call.outputs:
            if name not in known:
                raise InvalidRequest(f"output {name!r} is unknown; the model's outputs are {sorted(known)}")
        return submit(scheduler, call.inputs, deadline)

    def select(self, call: Call, outputs: Sequence[Array]) -> list[tuple[str, str, Array]]:
        """Return name, datatype and array of the outputs that were asked for."""
        specs = self.get(call.model, call.version).session.outputs
        by_name = {spec.name: (spec, array) for spec, array in zip(specs, outputs, strict=True)}
        wanted = call.outputs or tuple(by_name)
        return [(name, datatype_name(by_name[name][0].dtype), by_name[name][1]) for name in wanted]

    @staticmethod
    def server_metadata() -> dict[str, Any]:
        """Return who serves, in the protocol's words."""
        return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Return a model's inputs and outputs; sizes that may change are -1."""
        session = self.get(name, version).session
        sides = {"inputs": session.inputs, "outputs": session.outputs}
        return {
            "name": name,
            "versions": [VERSION],
            "platform": PLATFORM,
            **{
                side: [
                    {
                        "name": spec.name,
                        "datatype": datatype_name(spec.dtype),
                        "shape": [-1 if size is None else size for size in spec.shape],
                    }
                    for spec in specs
                ]
                for side, specs in sides.items()
            },
        }

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """Return Triton's model configuration, as far as it has a meaning here; its shapes are without the batch."""
        scheduler = self.get(name, version)
        dynamic = scheduler.session.dynamic_batch
        metadata = self.metadata(name, version)

        def tensors(side: str) -> list[dict[str, Any]]:
            return [
                {
                    "name": tensor["name"],
                    "data_type": "TYPE_" + ("STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]),
                    "dims": tensor["shape"][1:] if dynamic else tensor["shape"],
                }
                for tensor in metadata[side]
            ]

        return {
            "name": name,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "max_batch_size": scheduler.controller.max_batch_size if dynamic else 0,
            "input": tensors("inputs"),
            "output": tensors("outputs"),
        }

    def index(self, repository: str = "", *, ready: bool = False) -> list[dict[str, str]]:
        """Return what is served, and whether it takes requests; *ready*: only what does."""
        if repository:
            raise NotSupported(f"there is one repository, which has no name; asked for was {repository[:60]!r}")
        listed = []
        for name, scheduler in sorted(self._schedulers.items()):
            if not scheduler.closed:
                listed.append({"name": name, "version": VERSION, "state": "READY", "reason": ""})
            elif not ready:
                reason = "the scheduler is closed"
                listed.append({"name": name, "version": VERSION, "state": "UNAVAILABLE", "reason": reason})
        return listed

    @staticmethod
    def refuse_change() -> NoReturn:
        """Raise `NotSupported`: a client wants a model to be loaded or unloaded."""
        raise NotSupported("models are neither loaded nor unloaded by request: the service decides what it serves")

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Return counts of one model, or of all; how long things took is in `Scheduler.statistics`."""
        names = [name] if name else sorted(self._schedulers)
        return {"model_stats": [self._statistics(one, version) for one in names]}

    def _statistics(self, name: str, version: str) -> dict[str, Any]:
        statistics = self.get(name, version).statistics()
        served = statistics.met + statistics.late
        failed = statistics.failed + sum(statistics.rejected.values())
        return {
            "name": name,
            "version": VERSION,
            "inference_count": served,
            "execution_count": statistics.batches,
            "inference_stats": {"success": {"count": served}, "fail": {"count": failed}},
        }
