"""Kernels in a bucket of any S3-compatible service: ``<prefix>/<two digits>/<digest>/<file>``.

    s3://bucket/prefix?endpoint=https://minio.example:9000&region=eu-central-1

Credentials come from the usual sources of S3 clients (``AWS_ACCESS_KEY_ID`` and the like, a
profile, the machine's role), never from the address, which is logged. Needs ``boto3``:
``esper-control[s3]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from esper.compilation.store import check_file_names
from esper.compilation.verify import check_digest
from esper.contracts import BUNDLE_FILES, KernelBundle
from esper.contracts.kernels import CODE_FILE, COMPILED_FILES, MANIFEST_FILE, size_limit
from esper.exceptions import (
    ConfigurationError,
    KernelDigestError,
    KernelError,
    StoreUnavailableError,
)

CORRUPT = "corrupt"
_KNOWN_PARAMETERS = frozenset({"endpoint", "region"})
_ABSENT = frozenset({"NoSuchKey", "404", "NotFound"})


class ObjectStore:
    """A :class:`~esper.compilation.store.Store` in a bucket.

    The manifest is written last and removed first: a kernel exists if its manifest does.

    Args:
        url: the address, see above.

    Raises:
        ConfigurationError: the address is not valid, or ``boto3`` is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        parameters = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.scheme != "s3" or not parts.netloc or parts.username or parts.password:
            raise ConfigurationError(
                "the address of a bucket is s3://bucket/prefix?endpoint=…, without keys"
            )
        if unknown := sorted(parameters.keys() - _KNOWN_PARAMETERS):
            raise ConfigurationError(f"unknown parameter in a bucket's address: {unknown[0]}")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client = _client(parameters)

    def has(self, digest: str) -> bool:
        with _errors(digest):
            return self._size(self._key(digest, MANIFEST_FILE)) is not None

    def put(self, bundle: KernelBundle) -> str:
        """Stores all files; an interrupted upload leaves no kernel; a second call does nothing."""
        check_file_names(bundle)
        digest = bundle.digest
        with _errors(digest):
            for name in sorted(bundle.files, key=lambda name: name == MANIFEST_FILE):
                self._client.put_object(
                    Bucket=self._bucket, Key=self._key(digest, name), Body=bundle.files[name]
                )
        return digest

    def get(self, digest: str) -> dict[str, bytes]:
        """The kernel's files, unverified. Raises as :class:`Store` says."""
        with _errors(digest):
            if self._size(self._key(digest, MANIFEST_FILE)) is None:
                raise KernelError(f"there is no kernel {digest}", digest=digest)
            compiled = self._size(self._key(digest, CODE_FILE)) is not None
            names = COMPILED_FILES if compiled else BUNDLE_FILES
            return {name: self._read(digest, name) for name in names}

    def remove(self, digest: str) -> bool:
        there = self.has(digest)
        with _errors(digest):
            for name in COMPILED_FILES:  # the manifest is the first of them
                self._client.delete_object(Bucket=self._bucket, Key=self._key(digest, name))
        return there

    def set_aside(self, digest: str) -> bool:
        """Move a kernel below ``corrupt/``; False when there was none."""
        there = self.has(digest)
        with _errors(digest):
            for name in COMPILED_FILES if there else ():
                source = self._key(digest, name)
                if self._size(source) is None:
                    continue
                target = self._join(CORRUPT, digest, name)
                copied = {"Bucket": self._bucket, "Key": source}
                self._client.copy_object(Bucket=self._bucket, Key=target, CopySource=copied)
        self.remove(digest)
        return there

    def list(self) -> tuple[str, ...]:
        """All digests, sorted."""
        found = []
        with _errors(""):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._join("")):
                for entry in page.get("Contents", ()):
                    *_, short, digest, name = f"//{entry['Key']}".split("/")
                    if name == MANIFEST_FILE and digest[:2] == short:
                        found.append(digest)
        return tuple(sorted(found))

    def _key(self, digest: str, name: str) -> str:
        return self._join(check_digest(digest)[:2], digest, name)

    def _join(self, *parts: str) -> str:
        return "/".join([*([self._prefix] if self._prefix else []), *parts])

    def _size(self, key: str) -> int | None:
        from botocore.exceptions import ClientError

        try:
            return int(self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"])
        except ClientError as error:
            if error.response["Error"]["Code"] in _ABSENT:
                return None
            raise

    def _read(self, digest: str, name: str) -> bytes:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(digest, name))
        except ClientError as error:
            if error.response["Error"]["Code"] in _ABSENT:
                raise KernelDigestError(f"{name} is missing", digest=digest) from error
            raise
        with answer["Body"] as body:
            data: bytes = body.read(size_limit(name) + 1)
        if len(data) > size_limit(name):
            raise KernelDigestError(f"{name} is too large", digest=digest)
        return data


def _client(parameters: dict[str, str]) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ConfigurationError("s3:// needs boto3: pip install boto3") from error
    config = Config(
        connect_timeout=5,
        read_timeout=20,
        retries={"max_attempts": 3, "mode": "standard"},
        s3={"addressing_style": "path" if "endpoint" in parameters else "auto"},
    )
    return boto3.client(
        "s3",
        endpoint_url=parameters.get("endpoint"),
        region_name=parameters.get("region", "us-east-1"),
        config=config,
    )


@contextmanager
def _errors(digest: str) -> Iterator[None]:
    """Converts botocore's errors, without the request, which may contain a signature."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        code = getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__)
        raise StoreUnavailableError(f"the bucket answers {code}", digest=digest) from error
