"""Acts that may be repeated: a second request with the same key gets the first one's answer.

The answer is stored in the transaction of the act, so an act is never done without its answer
being stored. A second request with the same key waits for the first on the unique row. Only
successes are stored: a refusal changed nothing, so a repeated request is checked again.

With ``?dry_run=true`` an act is done in a transaction that is rolled back: every check is the real
one, the answer is what it would be, and nothing is written, sent or stored. It needs no key.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from cryptography.fernet import Fernet
from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from apps.rest.filters import flag, parse_parameter
from apps.rest.models import IdempotencyRecord
from apps.rest.problems import Problem
from esper.contracts import codec

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
DRY_RUN = "dry_run"
MAX_KEY_LENGTH = 400
KEPT_FOR = timedelta(hours=24)

_V = TypeVar("_V")
_P = ParamSpec("_P")
_Handler = Callable[Concatenate[_V, Request, _P], Response]


def idempotent(handler: _Handler[_V, _P]) -> _Handler[_V, _P]:
    """Decorates a view's handler; ``Idempotency-Key`` becomes required."""

    @wraps(handler)
    def answer(self: _V, request: Request, *args: _P.args, **kwargs: _P.kwargs) -> Response:
        if parse_parameter(request, DRY_RUN, flag, default=False):
            with transaction.atomic():  # what waits for its commit is never sent
                response = handler(self, request, *args, **kwargs)
                transaction.set_rollback(True)
            return _as_dry_run(response)
        key, fingerprint = _key(request), _fingerprint(request)
        _forget_old()  # before the transaction, which would hold the locks of the deleted rows
        with transaction.atomic():
            record = _claim(request, key, fingerprint)
            if record.status:
                return _replay(record)
            try:
                response = handler(self, request, *args, **kwargs)
            except Problem as problem:
                # Raised after the transaction below, so that rows that belong to the refusal
                # (a violation, for example) are kept.
                record.delete()
                refusal = problem
            else:
                _keep(record, response)
                return response
        raise refusal

    answer.is_act = True  # type: ignore[attr-defined]  # its endpoint knows ?dry_run then
    return cast(_Handler[_V, _P], answer)


def _as_dry_run(response: Response) -> Response:
    data = response.data if isinstance(response.data, dict) else {}
    del response.headers["ETag"]  # of a version that does not exist
    return Response({**data, DRY_RUN: True}, headers=dict(response.headers))


def _key(request: Request) -> str:
    key = request.headers.get(HEADER, "").strip()
    if not key:
        raise Problem(
            400,
            "precondition-required",
            f"The header {HEADER} is missing. Send a text that is new for each act, "
            "and the same when you repeat the act.",
        )
    if len(key) > MAX_KEY_LENGTH:
        raise Problem(400, "invalid", f"{HEADER} may have at most {MAX_KEY_LENGTH} characters.")
    return key


def _fingerprint(request: Request) -> str:
    content = f"{request.method} {request.path}\n".encode() + codec.encode(request.data)
    return hashlib.sha256(content).hexdigest()


def _claim(request: Request, key: str, fingerprint: str) -> IdempotencyRecord:
    user = request.user
    assert user.is_authenticated  # permissions have been checked before a handler runs
    try:
        with transaction.atomic():
            return IdempotencyRecord.objects.create(user=user, key=key, fingerprint=fingerprint)
    except IntegrityError:
        record = IdempotencyRecord.objects.get(user=user, key=key)
    if record.fingerprint != fingerprint:
        raise Problem(
            422,
            "idempotency-mismatch",
            f"The {HEADER} {key!r} was used for a different request. Use a new key.",
        )
    if not record.status:
        raise Problem(
            409, "in-progress", "A request with the same key is still in progress.", retry_after=1
        )
    return record


def _keep(record: IdempotencyRecord, response: Response) -> None:
    etag = response.headers.get("ETag", "")
    content = codec.encode({"data": response.data, "etag": etag})
    record.status = response.status_code
    record.body = _cipher(record.key).encrypt(content)
    record.save(update_fields=["status", "body"])


def _replay(record: IdempotencyRecord) -> Response:
    kept: dict[str, Any] = codec.decode(
        _cipher(record.key).decrypt(bytes(record.body)), max_bytes=1 << 24
    )
    headers = {REPLAYED: "true"} | ({"ETag": kept["etag"]} if kept["etag"] else {})
    return Response(kept["data"], status=record.status, headers=headers)


def _cipher(key: str) -> Fernet:
    # Some answers hold a new token's secret, which is stored nowhere else in plain text.
    seed = hashlib.sha256(f"esper-idempotency\n{settings.SECRET_KEY}\n{key}".encode()).digest()
    return Fernet(base64.urlsafe_b64encode(seed))


def _forget_old() -> None:
    IdempotencyRecord.objects.filter(created_at__lt=timezone.now() - KEPT_FOR).delete()
