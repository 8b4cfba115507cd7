"""Our table of the protocol's messages against the descriptors that Triton's client carries."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from sponge.integrations.oip.messages import DATA_TYPES, METHODS, REFUSED, SERVICE, STREAM, message_class, message_names

PARTIAL = {"ModelConfig", "ModelInput", "ModelOutput", "ModelStatistics", "InferStatistics"}
"""Messages of which only what we fill in is there."""


def theirs(name: str) -> Any:
    outer, _, inner = name.partition(".")
    file = model_config_pb2 if outer in {"ModelConfig", "ModelInput", "ModelOutput"} else service_pb2
    descriptor = file.DESCRIPTOR.message_types_by_name[outer]
    return descriptor.nested_types_by_name[inner] if inner else descriptor


def fields(descriptor: Any) -> dict[str, tuple[Any, ...]]:
    """What of a field travels, or decides how its neighbours are read."""
    proto = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(proto)
    maps = {nested.name for nested in proto.nested_type if nested.options.map_entry}
    return {
        field.name: (
            field.number,
            field.type,
            field.label,
            field.type_name,
            field.HasField("oneof_index"),
            field.type_name.rpartition(".")[2] in maps,
        )
        for field in proto.field
    }


@pytest.mark.parametrize("name", message_names())
def test_names_numbers_and_types_are_the_protocols(name: str) -> None:
    """A wrong number would be read as another field, or as none, without an error."""
    own, public = fields(message_class(name).DESCRIPTOR), fields(theirs(name))
    if name in PARTIAL:
        assert own.items() <= public.items()
    else:
        assert own == public


def test_methods_and_enumeration_are_the_protocols() -> None:
    """Method names make the paths of the calls; numbers of the enumeration travel."""
    service = service_pb2.DESCRIPTOR.services_by_name[SERVICE]
    for method in METHODS:
        described = service.methods_by_name[method]
        assert described.input_type.name == f"{method}Request"
        assert described.output_type.name == f"{method}Response"
    stream = service.methods_by_name[STREAM]
    assert (stream.input_type.name, stream.output_type.name) == ("ModelInferRequest", f"{STREAM}Response")
    assert set(REFUSED) <= set(service.methods_by_name)
    enum = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    assert {value.name: value.number for value in enum.values} == {f"TYPE_{n}": i for i, n in enumerate(DATA_TYPES)}
