"""Every message survives the way over the wire, and what does not fit is refused with its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC
from typing import Any, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from esper.contracts import (
    EARLIER_COLUMNS,
    SIGNALS,
    Command,
    SafetyPolicy,
    codec,
    protocol,
    unpack_bytes,
    wire,
)
from esper.exceptions import CodecError, MessageError

MESSAGES = [kind for _, kinds in protocol.MESSAGES for kind in kinds]
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\x00")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(CHARACTERS, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(CHARACTERS), inner, max_size=2)
    ),
    max_leaves=4,
)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def values_of(info: Any) -> st.SearchStrategy[Any]:
    """Any value that a type allows, by msgspec's own description of the type."""
    match info:
        case inspect.Metadata():
            return values_of(info.type)
        case inspect.AnyType():
            return JSON
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            most = 10**17  # the codec takes 19 characters
            return st.integers(
                max(-most, -most if info.ge is None else info.ge),
                min(most, most if info.le is None else info.le),
            )
        case inspect.FloatType():
            return st.floats(info.ge, info.le, allow_nan=False, allow_infinity=False)
        case inspect.CustomType():
            return st.floats()
        case inspect.StrType():
            most = min(info.max_length or 12, 12)
            return st.text(CHARACTERS, min_size=info.min_length or 0, max_size=most)
        case inspect.BytesType():
            return st.binary(max_size=20)
        case inspect.DateTimeType():
            return st.datetimes(timezones=st.just(UTC))
        case inspect.EnumType():
            return st.sampled_from(list(info.cls))
        case inspect.LiteralType():
            return st.sampled_from(info.values)
        case inspect.VarTupleType():
            least = info.min_length or 0
            items = st.lists(values_of(info.item_type), min_size=least, max_size=max(2, least))
            return items.map(tuple)
        case inspect.DictType():
            keys = values_of(info.key_type)
            return st.dictionaries(keys, values_of(info.value_type), max_size=2)
        case inspect.UnionType():
            return st.one_of(*(values_of(part) for part in info.types))
        case inspect.StructType() | inspect.DataclassType():
            return messages_of(info)
    raise NotImplementedError(info)


@st.composite
def messages_of(draw: Draw, info: Any) -> Any:
    if info.cls is SafetyPolicy:
        return SafetyPolicy(version=draw(st.integers(1, 9)))
    members = {field.name: draw(values_of(field.type)) for field in info.fields}
    if info.cls is protocol.Registration:
        members["layers"] = tuple(replace(one, name=one.name or "fc") for one in members["layers"])
    if info.cls is protocol.Telemetry:
        members["seq_from"] = draw(st.integers(1, 10**6))
        items = sum(len(members[name]) for name in ("frames", "metrics", "findings"))
        members["seq_to"] = members["seq_from"] + items - 1
    if info.cls is protocol.PlanProposal:
        when = {name: members[name] for name in ("epoch", "step")}
        members["members"] = tuple(
            msgspec.structs.replace(one, **when) for one in members["members"]
        )
    if info.cls is protocol.RemedyProposal:
        members["finding"] = replace(members["finding"], slug="dying_relu")
    if info.cls is protocol.Answer:
        members["state"] = "accepted"
    return info.cls(**members)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_message_comes_back_as_it_was_sent(kind: type, data: st.DataObject) -> None:
    message = data.draw(values_of(inspect.type_info(kind)))
    raw = codec.encode(wire.to_wire(message))
    again = wire.from_wire(kind, codec.decode(raw))
    assert type(again) is kind
    assert codec.encode(wire.to_wire(again)) == raw


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_member_of_every_message_has_its_meaning_written_down(kind: type) -> None:
    members = {field.name for field in inspect.type_info(kind).fields}  # type: ignore[attr-defined]
    assert set(wire.meanings(kind)) >= members


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_that_is_no_object_or_lacks_a_member_is_refused(kind: type) -> None:
    for data in (None, [], 1, "text"):
        with pytest.raises(MessageError) as refused:
            wire.from_wire(kind, data)
        assert refused.value.pointer == ""
    fields = inspect.type_info(kind).fields  # type: ignore[attr-defined]
    needed = [field.name for field in fields if field.required]
    if needed:
        with pytest.raises(MessageError) as refused:
            wire.from_wire(kind, {})
        assert refused.value.pointer.removeprefix("/") in needed


def frame(**changes: Any) -> dict[str, Any]:
    return {"step": 1, "wall_time": 1.5, "values": "AAAA", **changes}


def batch(**changes: Any) -> dict[str, Any]:
    return {"epoch": 1, "seq_from": 1, "seq_to": 1, "frames": [frame()], **changes}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"epoch": True}, "/epoch"),
        ({"epoch": 1.0}, "/epoch"),
        ({"epoch": "1"}, "/epoch"),
        ({"epoch": None}, "/epoch"),
        ({"epoch": 2**31}, "/epoch"),
        ({"seq_from": 0}, "/seq_from"),
        ({"seq_to": 2}, "/seq_to"),
        ({"dropped": -1}, "/dropped"),
        ({"frames": [frame(step=True)]}, "/frames/0/step"),
        ({"frames": [frame(), frame(step=2**53 + 1)]}, "/frames/1/step"),
        ({"frames": [frame(wall_time=True)]}, "/frames/0/wall_time"),
        ({"frames": [frame(wall_time="nan")]}, "/frames/0/wall_time"),
        ({"frames": [frame(wall_time=-1)]}, "/frames/0/wall_time"),
        ({"frames": [frame(values="not base64")]}, "/frames/0/values"),
        ({"frames": [frame(loss=True)]}, "/frames/0/loss"),
        ({"frames": [frame(loss="-nan")]}, "/frames/0/loss"),
        ({"frames": [{"step": 1}]}, "/frames/0/wall_time"),
        ({"metrics": [{"step": 1, "wall_time": 1, "values": {"": 1}}]}, "/metrics/0/values"),
        ({"metrics": [{"step": 1, "wall_time": 1, "values": []}]}, "/metrics/0/values"),
    ],
)
def test_a_fault_in_a_batch_is_named_by_its_place(changes: dict[str, Any], pointer: str) -> None:
    with pytest.raises(MessageError) as refused:
        wire.from_wire(protocol.Telemetry, batch(**changes))
    assert refused.value.pointer == pointer
    assert str(refused.value).startswith(f"{pointer}: ")


@pytest.mark.parametrize("wrong", range(64))
def test_the_one_wrong_value_among_many_is_found(wrong: int) -> None:
    values: dict[str, Any] = {f"m/{number}~": "nan" for number in range(64)}
    values[f"m/{wrong}~"] = "not a number"
    entry = {"step": 1, "wall_time": 1, "values": values}
    with pytest.raises(MessageError) as refused:
        wire.from_wire(protocol.Telemetry, batch(frames=[], metrics=[entry]))
    assert refused.value.pointer == f"/metrics/0/values/m~1{wrong}~0"


@pytest.mark.parametrize(
    ("kind", "member", "count"),
    [
        (protocol.Telemetry, "frames", protocol.MAX_FRAMES),
        (protocol.Telemetry, "metrics", protocol.MAX_METRICS),
        (protocol.Telemetry, "findings", protocol.MAX_FINDINGS),
        (protocol.Proposal, "checks", protocol.MAX_LINES),
    ],
)
def test_a_list_that_is_too_long_is_refused_before_its_items(
    kind: type, member: str, count: int
) -> None:
    # The member alone: a whole message would be refused for what it lacks.
    hints = get_type_hints(kind, include_extras=True)
    alone = msgspec.defstruct("Alone", [(member, hints[member])])
    with pytest.raises(MessageError) as refused:
        wire.from_wire(alone, {member: [17] * (count + 1)})
    assert refused.value.pointer == f"/{member}"


def test_members_that_nobody_knows_are_left_out_but_not_of_a_command() -> None:
    frames = [frame(of_a_newer_sdk=1)]
    assert wire.from_wire(protocol.Telemetry, batch(frames=frames, more=2)).items == 1
    command = {
        "run": "run_1",
        "epoch": 1,
        "seq": 1,
        "kind": "stop_run",
        "issued_at": 5,
        "expires_at": 6.5,
    }
    assert Command.from_wire(command).to_wire()["issued_at"] == 5
    with pytest.raises(CodecError):
        Command.from_wire({**command, "sudo": True})


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_never_reaches_a_message(text: str) -> None:
    raw = f'{{"step":1,"wall_time":1,"values":"","loss":{text}}}'
    with pytest.raises(CodecError):
        wire.from_wire(protocol.Frame, codec.decode(raw))


@pytest.mark.parametrize(
    ("text", "loss"), [("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)]
)
def test_a_diverged_loss_travels_in_its_frame(text: str, loss: float) -> None:
    message = protocol.Frame(step=1, wall_time=1.0, values=b"", loss=loss)
    assert wire.to_wire(message)["loss"] == text
    again = wire.from_wire(protocol.Frame, frame(loss=text))
    assert np.array_equal(again.loss, loss, equal_nan=True)


def test_what_has_no_json_form_is_refused_and_numpy_numbers_have_one() -> None:
    assert wire.to_wire({"a": np.float32(0.5), "b": np.int64(3), "c": np.float64("nan")}) == {
        "a": 0.5,
        "b": 3,
        "c": "nan",
    }
    with pytest.raises(CodecError):
        wire.to_wire({"a": object()})


def test_an_error_quotes_a_long_value_in_part_only() -> None:
    with pytest.raises(MessageError) as refused:
        wire.from_wire(protocol.Finish, {"epoch": 1, "state": "x" * 10_000, "step": 1})
    assert len(str(refused.value)) < 300


def test_a_frame_of_an_older_version_lacks_the_last_signals() -> None:
    older = np.arange(2 * EARLIER_COLUMNS[0], dtype="<f4").reshape(2, -1)
    values = unpack_bytes(older.tobytes(), 2)

    assert values.shape == (2, len(SIGNALS))
    assert (values[:, : EARLIER_COLUMNS[0]] == older).all()
    assert np.isnan(values[:, EARLIER_COLUMNS[0] :]).all()


@pytest.mark.parametrize("size", [0, 4, 2 * 4 * (len(SIGNALS) + 1), 2 * 4 * 10])
def test_bytes_that_are_no_frame_of_these_layers_are_refused(size: int) -> None:
    with pytest.raises(CodecError, match="a frame of 2 layers"):
        unpack_bytes(bytes(size), 2)
