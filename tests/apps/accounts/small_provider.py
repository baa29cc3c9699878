"""A small OpenID provider on loopback, over real HTTP, that can be told to lie."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

CLIENT, SECRET = "esper", "a secret: with/characters"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
Claims = dict[str, Any]


def signed(claims: Claims) -> str:
    return jwt.encode(claims, KEY, "RS256", headers={"kid": "k1"})


def public_jwk() -> dict[str, Any]:
    found: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key(), as_dict=True)
    return {**found, "kid": "k1", "use": "sig"}


@dataclass
class SmallProvider:
    """Signs in whoever comes as ``person``.

    Attributes:
        change: changes the claims before they are signed.
        sign: makes the token.
        reuse_codes: it forgets that a code was used.
        broken: what each path answers instead, as status and body.
    """

    person: Claims = field(default_factory=dict)
    change: Callable[[Claims], Claims] = lambda claims: claims
    sign: Callable[[Claims], str] = signed
    reuse_codes: bool = False
    broken: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    issuer: str = ""

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, bytes, str]:
        """Status, body and where to go."""
        path, query = urlsplit(target).path, urlsplit(target).query
        self.asked.append(path)
        if path in self.broken:
            return *self.broken[path], ""
        asked = {name: values[0] for name, values in parse_qs(query or body.decode()).items()}
        match method, path:
            case "GET", "/.well-known/openid-configuration":
                return 200, json.dumps(self._metadata()).encode(), ""
            case "GET", "/keys":
                return 200, json.dumps({"keys": [public_jwk()]}).encode(), ""
            case "GET", "/authorize":
                assert asked["code_challenge_method"] == "S256"
                code = secrets.token_urlsafe(8)
                self.codes[code] = asked
                back = urlencode({"code": code, "state": asked["state"]})
                return 302, b"", f"{asked['redirect_uri']}?{back}"
            case "POST", "/token":
                return *self._token(asked, headers), ""
        return 404, b"", ""

    def _metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            **self.metadata,
        }

    def _token(self, form: dict[str, str], headers: Any) -> tuple[int, bytes]:
        kind, _, pair = headers.get("Authorization", "").partition(" ")
        client, _, secret = base64.b64decode(pair).decode().partition(":")
        if (kind, unquote(client), unquote(secret)) != ("Basic", CLIENT, SECRET):
            return 401, b'{"error": "invalid_client"}'
        code = form.get("code", "")
        asked = self.codes.get(code) if self.reuse_codes else self.codes.pop(code, None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if (
            asked is None
            or asked["code_challenge"] != challenge
            or asked["redirect_uri"] != form.get("redirect_uri")
        ):
            return 400, b'{"error": "invalid_grant"}'
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": CLIENT,
            "iat": now,
            "exp": now + 300,
            "nonce": asked["nonce"],
            **self.person,
        }
        token = self.sign(self.change(claims))
        return 200, json.dumps({"token_type": "Bearer", "id_token": token}).encode()


@contextmanager
def serving() -> Iterator[SmallProvider]:
    provider = SmallProvider()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content, there = provider.answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            if there:
                self.send_header("Location", there)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _serve

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        provider.issuer = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield provider
        finally:
            server.shutdown()
            thread.join()
