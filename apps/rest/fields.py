"""Input fields that accept exactly their JSON type, and convert nothing silently."""

from __future__ import annotations

from typing import Any, TypeVar

from django.core.validators import RegexValidator
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers
from rest_framework.request import Request

from esper.contracts import codec, wire
from esper.exceptions import CodecError

_T = TypeVar("_T")
MAX_WHOLE_NUMBER = 2**63 - 1
MAX_UNKNOWN_NAMED = 20
_NUMBER_SCHEMA = {"oneOf": [{"type": "number"}, {"type": "string", "enum": ["nan", "inf", "-inf"]}]}


class Text(serializers.CharField):
    """A JSON string; a number is refused."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"trim_whitespace": False, "max_length": 4000, **kwargs})

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class Digest(Text):
    """A hex SHA-256."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_length=64, **kwargs)
        self.validators.append(RegexValidator(r"^[0-9a-f]{64}$", "A hex SHA-256 is required."))


class WholeNumber(serializers.IntegerField):
    """A JSON integer; a boolean or a text is refused."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"min_value": 0, "max_value": MAX_WHOLE_NUMBER, **kwargs})

    def to_internal_value(self, data: Any) -> int:
        if type(data) is not int:
            self.fail("invalid")
        return data


@extend_schema_field(_NUMBER_SCHEMA)
class WireNumber(serializers.Field[float, Any, Any, float]):
    """A number that may be "nan", "inf" or "-inf"."""

    default_error_messages = {"invalid": 'A number, "nan", "inf" or "-inf" is required.'}

    def to_internal_value(self, data: Any) -> float:
        try:
            return codec.number_from_wire(data)
        except CodecError:
            self.fail("invalid")

    def to_representation(self, value: float) -> Any:
        return codec.number_to_wire(float(value))


class Flag(serializers.BooleanField):
    """JSON's true or false; "yes" and 1 are refused."""

    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


class BoundedList(serializers.ListField):
    """A JSON list whose length is checked before its items, because each wrong item is an error."""

    def __init__(self, *, max_length: int, allow_empty: bool = True, **kwargs: Any) -> None:
        least = None if allow_empty else 1  # which the document names, too
        bounds: dict[str, Any] = {"min_length": least, "max_length": max_length}
        super().__init__(allow_empty=allow_empty, **bounds, **kwargs)
        self._most = max_length

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, list) and len(data) > self._most:
            self.fail("max_length", max_length=self._most)
        return super().to_internal_value(data)


class BoundedDict(serializers.DictField):
    """A JSON object with any names, but a limited number of them."""

    default_error_messages = {"max_length": "At most {max_length} members are allowed."}

    def __init__(self, *, max_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._most = max_length

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > self._most:
            self.fail("max_length", max_length=self._most)
        return super().to_internal_value(data)


@extend_schema_field({"type": "object", "additionalProperties": True})
class Members(serializers.Field[dict[str, Any], Any, Any, dict[str, Any]]):
    """A JSON object whose members differ by kind."""

    default_error_messages = {"invalid": "A JSON object is required."}

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        if not isinstance(data, dict):
            self.fail("invalid")
        return data

    def to_representation(self, value: dict[str, Any]) -> dict[str, Any]:
        return value


class PersonsInput(serializers.Serializer[Any]):
    """What a person or their script sends: an unknown member is a mistake, so it is refused.

    Trainers and services send plain serializers: a newer one may know more than this server.
    """

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = sorted(set(data) - set(self.fields))[:MAX_UNKNOWN_NAMED]
            if unknown:
                raise serializers.ValidationError(
                    {name: ["This member is unknown."] for name in unknown}
                )
        return super().to_internal_value(data)


class ReasonInput(PersonsInput):
    reason = Text(allow_blank=True, default="")


def body(request: Request) -> dict[str, Any]:
    """The request's JSON object; the parser refuses anything else."""
    assert isinstance(request.data, dict)
    return request.data


def message(request: Request, kind: type[_T]) -> _T:
    """The request's body as a message of the protocol; raises ``MessageError``."""
    return wire.from_wire(kind, body(request))


def parse(serializer: type[serializers.Serializer[Any]], data: Any) -> dict[str, Any]:
    """The validated members; raises DRF's ``ValidationError``."""
    form = serializer(data=data)
    form.is_valid(raise_exception=True)
    values: dict[str, Any] = form.validated_data
    return values
