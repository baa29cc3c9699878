"""OpenID Connect: the authorization code flow with PKCE, and what an ID token must be.

Nothing is kept between two sign-ins: the provider's addresses and keys are read each time, so that
a key that was replaced counts no more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import secrets
import ssl
import time
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import httpx
import jwt
from django.conf import settings
from django.utils.crypto import constant_time_compare

from esper.exceptions import EsperError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
LEEWAY_SECONDS = 30
MAX_ANSWER_BYTES = 1 << 20
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# Asymmetric ones only: whoever knows the public key must not be able to sign.
ALGORITHMS = frozenset(
    {
        *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
        *("ES256", "ES384", "ES512", "EdDSA"),
    }
)
_REQUIRED = ["iss", "sub", "aud", "exp", "iat"]


class SignInError(EsperError):
    """Nobody is signed in.

    Attributes:
        status: of the page that says so.
        code: why, for the audit log.
        detail: one sentence for the person.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


@dataclass(frozen=True, slots=True)
class Provider:
    """The addresses that a provider names. ``secret_in_body``: it takes our secret only there."""

    authorization: str
    token: str
    keys: str
    secret_in_body: bool


@dataclass(frozen=True, slots=True)
class Trip:
    """What this browser must bring back from the provider, and where it goes then.

    Attributes:
        again: its person is signed in already, and proves again who they are.
        links: the key of the signed-in person who wants to link their account; 0: nobody does.
    """

    state: str
    nonce: str
    verifier: str
    address: str
    again: bool
    links: int = 0

    @classmethod
    def begin(cls, address: str, *, again: bool, links: int = 0) -> Trip:
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        return cls(state, nonce, verifier, address, again, links)

    @property
    def challenge(self) -> str:
        """Of PKCE, method S256."""
        digest = hashlib.sha256(self.verifier.encode()).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def discover() -> Provider:
    """Raises ``SignInError`` 502 where the provider does not answer as one."""
    issuer = settings.ESPER_OIDC_ISSUER
    found = _json(httpx.Request("GET", f"{issuer.rstrip('/')}/.well-known/openid-configuration"))
    if found.get("issuer") != issuer:
        raise _failed(f"it calls itself {found.get('issuer')!r}")
    methods = found.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
    return Provider(
        authorization=_address(found, "authorization_endpoint"),
        token=_address(found, "token_endpoint"),
        keys=_address(found, "jwks_uri"),
        secret_in_body="client_secret_basic" not in methods,
    )


def authorization_address(provider: Provider, trip: Trip, return_to: str) -> str:
    """Where the browser goes."""
    asked = {
        "response_type": "code",
        "client_id": settings.ESPER_OIDC_CLIENT_ID,
        "redirect_uri": return_to,
        "scope": settings.ESPER_OIDC_SCOPES,
        "state": trip.state,
        "nonce": trip.nonce,
        "code_challenge": trip.challenge,
        "code_challenge_method": "S256",
    }
    if trip.again or trip.links:  # the provider asks who sits there now
        asked |= {"prompt": "login", "max_age": "0"}
    joint = "&" if urlsplit(provider.authorization).query else "?"
    return f"{provider.authorization}{joint}{urlencode(asked)}"


def claims_for(code: str, trip: Trip, return_to: str) -> dict[str, Any]:
    """What the provider says of whoever has brought ``code``.

    Raises:
        SignInError: it does not answer, refuses the code, or its token is not to be trusted.
    """
    provider = discover()
    token = _redeemed(provider, code, trip, return_to)
    keys = _json(httpx.Request("GET", provider.keys)).get("keys")
    try:
        return _verified(token, keys, trip)
    except (jwt.PyJWTError, TypeError, ValueError, AttributeError) as error:
        log.warning("an ID token was refused: %s", error)
        raise SignInError(
            403, "sign-in-refused", f"The answer of {_name()} could not be trusted. Sign in again."
        ) from error


def _redeemed(provider: Provider, code: str, trip: Trip, return_to: str) -> Any:
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": return_to,
        "code_verifier": trip.verifier,
    }
    client, secret = settings.ESPER_OIDC_CLIENT_ID, settings.ESPER_OIDC_CLIENT_SECRET
    headers = {"Accept": "application/json"}
    if provider.secret_in_body:
        form |= {"client_id": client, "client_secret": secret}
    else:
        pair = f"{quote(client, safe='')}:{quote(secret, safe='')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    request = httpx.Request("POST", provider.token, data=form, headers=headers)
    return _json(request).get("id_token")


def _verified(token: Any, keys: Any, trip: Trip) -> dict[str, Any]:
    """Raises ``PyJWTError``, or what malformed keys cause."""
    header = jwt.get_unverified_header(token)
    algorithm = header.get("alg")
    if algorithm not in ALGORITHMS:
        raise jwt.InvalidAlgorithmError(f"the algorithm {algorithm!r}")
    claims: dict[str, Any] = jwt.decode(
        token,
        key=jwt.PyJWK(_key(keys, header.get("kid"), algorithm), algorithm=algorithm),
        algorithms=[algorithm],
        audience=settings.ESPER_OIDC_CLIENT_ID,
        issuer=settings.ESPER_OIDC_ISSUER,
        leeway=LEEWAY_SECONDS,
        options={"require": _REQUIRED},
    )
    if not constant_time_compare(str(claims.get("nonce", "")), trip.nonce):
        raise jwt.InvalidTokenError("the nonce is another")
    several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
    authorized = claims.get("azp", "" if several else settings.ESPER_OIDC_CLIENT_ID)
    if authorized != settings.ESPER_OIDC_CLIENT_ID:
        raise jwt.InvalidAudienceError("it was issued to another client")
    if not claims["sub"] or len(claims["sub"]) > 255:
        raise jwt.InvalidTokenError("the subject is empty or too long")
    return claims


def _key(keys: Any, kid: Any, algorithm: str) -> dict[str, Any]:
    """The provider's key of this name; without a name, its only one."""
    usable = [
        key
        for key in keys
        if key.get("use", "sig") == "sig"
        and key.get("alg", algorithm) == algorithm
        and kid in (None, key.get("kid"))
    ]
    if len(usable) != 1:
        raise jwt.InvalidKeyError(f"{len(usable)} keys of the provider fit {kid!r}")
    found: dict[str, Any] = usable[0]
    return found


def proved_at(claims: dict[str, Any]) -> float:
    """When its person has proved who they are.

    A provider that was asked to ask again and does not say when has asked now.
    """
    now = time.time()
    said = claims.get("auth_time")
    return min(float(said), now) if isinstance(said, int | float) else now


def _address(found: dict[str, Any], name: str) -> str:
    address = str(found.get(name, ""))
    if not is_safe(address):
        raise _failed(f"its {name} is no https address: {address!r}")
    return address


def is_safe(address: str) -> bool:
    """https, or this machine."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    )


@cache
def _trusted() -> ssl.SSLContext:
    """Read once: the certificates of all authorities take 24 ms, at each request of a sign-in."""
    return httpx.create_ssl_context()


def _json(request: httpx.Request) -> dict[str, Any]:
    """A JSON object; redirects are not followed."""
    try:
        with httpx.Client(timeout=TIMEOUT_SECONDS, verify=_trusted()) as client:
            answer = client.send(request, stream=True)
            body = b""
            for part in answer.iter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise _failed("its answer is too long")
        content = json.loads(body)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        raise _failed(f"{request.url}: {error}") from error
    if answer.status_code != 200 or not isinstance(content, dict):
        said = content.get("error") if isinstance(content, dict) else ""
        if answer.status_code == 400 and said == "invalid_grant":
            raise SignInError(
                403, "sign-in-refused", f"{_name()} does not take this sign-in any more. Try again."
            )
        raise _failed(f"{request.url} answered {answer.status_code} {said}")
    return content


def _failed(why: str) -> SignInError:
    log.error("the OpenID provider %s failed: %s", settings.ESPER_OIDC_ISSUER, why)
    return SignInError(
        502,
        "provider-failed",
        f"{_name()} does not work at present. Try again, or tell an administrator: the server's "
        "log says what is wrong.",
    )


def _name() -> str:
    name: str = settings.ESPER_OIDC_NAME
    return name[:1].upper() + name[1:]
