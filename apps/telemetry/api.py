from __future__ import annotations

from typing import ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.endpoint import READERS, TRAINERS, Endpoint, run_of_token
from apps.rest.etag import cacheable_response
from apps.rest.filters import described, one_of, parse_parameter, text, whole_number
from apps.rest.problems import Problem
from apps.rest.schema import count, documented, query
from apps.runs.selectors import visible_run
from apps.telemetry.selectors import (
    MAX_COLUMNS,
    MAX_FRAMES,
    MAX_POINTS,
    frame_message,
    frames_after,
    heatmap,
    metric_series,
)
from apps.telemetry.serializers import HeatmapOutput, SeriesOutput
from esper.contracts import Signal, protocol, wire

POINTS, COLUMNS = 600, 120  # where the caller names no number
SIGNAL = one_of(Signal)


@described(type="integer", minimum=1, maximum=10**18 - 1)
def step_width(value: str) -> int:
    number: int = whole_number(value)
    if number < 1:
        raise ValueError("a whole number of at least 1")
    return number


class Frames(Endpoint):
    parameters = frozenset({"after_step", "limit"})

    @documented(
        "list_frames",
        answer=protocol.Frames,
        parameters=[
            query("after_step", whole_number),
            count("limit", most=MAX_FRAMES, default=MAX_FRAMES),
        ],
        summary="Health frames of the present epoch after a step, oldest first",
    )
    def get(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, only=run_of_token(request))
        after_step = parse_parameter(request, "after_step", whole_number, default=-1)
        limit = _count(request, "limit", most=MAX_FRAMES, default=MAX_FRAMES)
        frames = frames_after(run, after_step=after_step, limit=limit)
        answer = protocol.Frames(
            epoch=run.epoch,
            layers=tuple(layer["name"] for layer in run.layers),
            results=tuple(frame_message(frame) for frame in frames),
        )
        return Response(wire.to_wire(answer))


class Series(Endpoint):
    readers: ClassVar = READERS | TRAINERS
    parameters = frozenset({"name", "points", "after_step", "width"})

    @documented(
        "read_metric",
        answer=SeriesOutput,
        parameters=[
            query("name", required=True),
            count("points", most=MAX_POINTS, default=POINTS),
            query("after_step", whole_number),
            query("width", step_width, "Steps of each bucket, which then begin at its multiples."),
        ],
        summary="One metric, in min/mean/max buckets",
    )
    def get(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, only=run_of_token(request))
        name = parse_parameter(request, "name", text)
        if name is None:
            raise Problem(400, "invalid", "name is required, such as name=loss.")
        points = _count(request, "points", most=MAX_POINTS, default=POINTS)
        after_step = parse_parameter(request, "after_step", whole_number, default=-1)
        width = parse_parameter(request, "width", step_width)
        series = metric_series(run, name, points=points, after_step=after_step, width=width)
        return cacheable_response(request, series)


class Heatmap(Endpoint):
    parameters = frozenset({"signal", "columns"})

    @documented(
        "read_heatmap",
        answer=HeatmapOutput,
        parameters=[query("signal", SIGNAL), count("columns", most=MAX_COLUMNS, default=COLUMNS)],
        summary="One signal over layers and time",
    )
    def get(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, only=run_of_token(request))
        signal = parse_parameter(request, "signal", SIGNAL, default=Signal.HEALTH)
        columns = _count(request, "columns", most=MAX_COLUMNS, default=COLUMNS)
        return cacheable_response(request, heatmap(run, Signal(signal), columns=columns))


def _count(request: Request, name: str, *, most: int, default: int) -> int:
    count: int = parse_parameter(request, name, whole_number, default=default)
    if not 1 <= count <= most:
        raise Problem(400, "invalid", f"{name} must lie in 1…{most}.")
    return count
