"""The messages of the Open Inference Protocol's gRPC service, as classes of protobuf.

Rules, and why they hold:

* The names and numbers below are the protocol's; they are what travels. There is no generated code: code made by one
  version of protoc refuses to run with older versions of protobuf, and a table gives the same descriptors.
* They live in a descriptor pool of their own. Other packages register the same names in the default pool (every client
  of Triton does), which would refuse a second file: a service that serves and is a client of another server has both.
* Of ``ModelConfig`` and the statistics only what is filled in is there; protobuf lets a reader miss the rest.

References
----------
The Open Inference Protocol, "gRPC"; Triton's extensions model configuration, statistics and model
repository; Triton's streams.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = "GRPCInferenceService"

METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
)
"""Each takes a message named ``<method>Request`` and answers with ``<method>Response``."""
STREAM = "ModelStreamInfer"
"""Takes a stream of ``ModelInferRequest`` and answers with one of ``ModelStreamInferResponse``."""
REFUSED = ("RepositoryModelLoad", "RepositoryModelUnload")
"""Methods that are known and refused, whatever their messages say."""

_NAME_AND_VERSION = ("1 name string", "2 version string")
_PARAMETERS = "parameters map InferParameter"
_MESSAGES: dict[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("1 live bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("1 ready bool",),
    "ModelReadyRequest": _NAME_AND_VERSION,
    "ModelReadyResponse": ("1 ready bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": (*_NAME_AND_VERSION, "3 extensions repeated string"),
    "ModelMetadataRequest": _NAME_AND_VERSION,
    "ModelMetadataResponse": (
        "1 name string",
        "2 versions repeated string",
        "3 platform string",
        "4 inputs repeated ModelMetadataResponse.TensorMetadata",
        "5 outputs repeated ModelMetadataResponse.TensorMetadata",
    ),
    "ModelMetadataResponse.TensorMetadata": ("1 name string", "2 datatype string", "3 shape repeated int64"),
    "InferParameter": (
        "1 bool_param oneof bool",
        "2 int64_param oneof int64",
        "3 string_param oneof string",
        "4 double_param oneof double",
        "5 uint64_param oneof uint64",
    ),
    "InferTensorContents": (
        "1 bool_contents repeated bool",
        "2 int_contents repeated int32",
        "3 int64_contents repeated int64",
        "4 uint_contents repeated uint32",
        "5 uint64_contents repeated uint64",
        "6 fp32_contents repeated float",
        "7 fp64_contents repeated double",
        "8 bytes_contents repeated bytes",
    ),
    "ModelInferRequest": (
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        f"4 {_PARAMETERS}",
        "5 inputs repeated ModelInferRequest.InferInputTensor",
        "6 outputs repeated ModelInferRequest.InferRequestedOutputTensor",
        "7 raw_input_contents repeated bytes",
    ),
    "ModelInferRequest.InferInputTensor": (
        "1 name string",
        "2 datatype string",
        "3 shape repeated int64",
        f"4 {_PARAMETERS}",
        "5 contents InferTensorContents",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("1 name string", f"2 {_PARAMETERS}"),
    "ModelInferResponse": (
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        f"4 {_PARAMETERS}",
        "5 outputs repeated ModelInferResponse.InferOutputTensor",
        "6 raw_output_contents repeated bytes",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "1 name string",
        "2 datatype string",
        "3 shape repeated int64",
        f"4 {_PARAMETERS}",
        "5 contents InferTensorContents",
    ),
    "ModelStreamInferResponse": ("1 error_message string", "2 infer_response ModelInferResponse"),
    "ModelConfigRequest": _NAME_AND_VERSION,
    "ModelConfigResponse": ("1 config ModelConfig",),
    "ModelConfig": (
        "1 name string",
        "2 platform string",
        "4 max_batch_size int32",
        "5 input repeated ModelInput",
        "6 output repeated ModelOutput",
        "17 backend string",
    ),
    "ModelInput": ("1 name string", "2 data_type enum DataType", "4 dims repeated int64"),
    "ModelOutput": ("1 name string", "2 data_type enum DataType", "3 dims repeated int64"),
    "ModelStatisticsRequest": _NAME_AND_VERSION,
    "ModelStatisticsResponse": ("1 model_stats repeated ModelStatistics",),
    "ModelStatistics": (
        *_NAME_AND_VERSION,
        "4 inference_count uint64",
        "5 execution_count uint64",
        "6 inference_stats InferStatistics",
    ),
    "InferStatistics": ("1 success StatisticDuration", "2 fail StatisticDuration"),
    "StatisticDuration": ("1 count uint64", "2 ns uint64"),
    "RepositoryIndexRequest": ("1 repository_name string", "2 ready bool"),
    "RepositoryIndexResponse": ("1 models repeated RepositoryIndexResponse.ModelIndex",),
    "RepositoryIndexResponse.ModelIndex": (*_NAME_AND_VERSION, "3 state string", "4 reason string"),
}
"""Fields of each message: number, name, ``repeated``, ``map``, ``oneof`` or ``enum`` where it is one, and the type."""

DATA_TYPES = (
    "INVALID",
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "STRING",
    "BF16",
)
"""Triton's ``DataType`` enumeration in the order of its numbers; its names begin with ``TYPE_``."""

_Field = descriptor_pb2.FieldDescriptorProto
_ONEOF = "parameter_choice"


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="sponge/open_inference.proto", package=PACKAGE, syntax="proto3")
    enum = file.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        enum.value.add(name=f"TYPE_{name}", number=number)
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = made[path] = made[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        for field in fields:
            _add_field(message, path, field.split())
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, path: str, words: list[str]) -> None:
    number, name, *how, kind = words
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if how and how[0] in {"repeated", "map"}:
        field.label = _Field.LABEL_REPEATED
    if how == ["map"]:
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
        value = entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_MESSAGE)
        value.type_name = f".{PACKAGE}.{kind}"
        kind = f"{path}.{entry.name}"
    if how == ["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name=_ONEOF)
        field.oneof_index = 0
    if how == ["enum"]:
        field.type = _Field.TYPE_ENUM
        field.type_name = f".{PACKAGE}.{kind}"
    elif kind[0].isupper():
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")


_POOL = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(_file().SerializeToString())


def message_class(name: str) -> Any:
    """Return the class of a message, such as ``"ModelInferRequest"``."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def message_names() -> tuple[str, ...]:
    """Return the names of all messages."""
    return tuple(_MESSAGES)
