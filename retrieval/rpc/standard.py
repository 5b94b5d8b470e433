"""The standard messages of failed calls and of health checks, for programs that have grpcio and protobuf alone.

googleapis-common-protos and grpcio-health-checking define the same messages, but a client need not have them. On the
wire a message is its fields' numbers and types, so those are all that is said here; they live in a pool of their own,
where they meet no other definition. Sources: google/rpc/status.proto, google/rpc/error_details.proto,
google/protobuf/any.proto, grpc/health/v1/health.proto.
"""

from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import DecodeError

__all__ = ["HEALTH_CHECK", "SERVING", "HealthCheckRequest", "HealthCheckResponse", "details_from", "details_to"]

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
SERVING = 1

_PACKAGE, _TYPES = "standard", "type.googleapis.com/google.rpc."
# Fields in the order of their numbers, which begin at 1; in brackets what is repeated.
_MESSAGES = {
    "Any": {"type_url": "string", "value": "bytes"},
    "Status": {"code": "int32", "message": "string", "details": "[Any]"},
    "ErrorInfo": {"reason": "string", "domain": "string"},
    "FieldViolation": {"field": "string", "description": "string"},
    "BadRequest": {"field_violations": "[FieldViolation]"},
    "HealthCheckRequest": {"service": "string"},
    "HealthCheckResponse": {"status": "int32"},
}


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="retrieval/rpc/standard.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            described = message.field.add(name=field, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
            if kind.startswith("["):
                described.label = FieldDescriptorProto.LABEL_REPEATED
                described.type, described.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind[1:-1]}"
            else:
                described.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _classes()
HealthCheckRequest, HealthCheckResponse = _CLASSES["HealthCheckRequest"], _CLASSES["HealthCheckResponse"]


def details_to(code: int, message: str, domain: str, reason: str, field: str = "", description: str = "") -> bytes:
    """A google.rpc.Status with an ErrorInfo and, where a field is at fault, a BadRequest: `grpc-status-details-bin`."""
    status = _CLASSES["Status"](code=code, message=message)
    info = _CLASSES["ErrorInfo"](reason=reason, domain=domain)
    status.details.add(type_url=f"{_TYPES}ErrorInfo", value=info.SerializeToString())
    if field:
        bad = _CLASSES["BadRequest"](field_violations=[{"field": field, "description": description}])
        status.details.add(type_url=f"{_TYPES}BadRequest", value=bad.SerializeToString())
    content: bytes = status.SerializeToString()
    return content


def details_from(content: bytes, code: int, domain: str) -> tuple[str, str, str]:
    """The reason in the ErrorInfo of our domain, field and description of the first violation; "" where there is none.

    Nothing is made of what is not a Status, or of one that contradicts the call's code: it is not from our server.
    """
    reason = field = description = ""
    try:
        status = _CLASSES["Status"].FromString(content)
        for box in status.details if status.code == code else ():
            if box.type_url == f"{_TYPES}ErrorInfo":
                info = _CLASSES["ErrorInfo"].FromString(box.value)
                reason = info.reason if info.domain == domain else reason
            elif box.type_url == f"{_TYPES}BadRequest":
                for violation in _CLASSES["BadRequest"].FromString(box.value).field_violations[:1]:
                    field, description = violation.field, violation.description
    except DecodeError:
        return "", "", ""
    return reason, field, description
