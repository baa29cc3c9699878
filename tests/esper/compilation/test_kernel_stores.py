"""Where kernels lie: a directory, a bucket of a real S3 server, and the one before the other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from esper.compilation.bundle import pack
from esper.compilation.object_store import ObjectStore
from esper.compilation.store import KernelStore, Store
from esper.compilation.store_tiers import TieredStore, open_store
from esper.compilation.verify import open_kernel
from esper.contracts import (
    Certificate,
    CostForecast,
    KernelBundle,
    KernelDraft,
    KernelKey,
    KernelReport,
    KernelSpec,
    signing,
)
from esper.exceptions import (
    ConfigurationError,
    KernelDigestError,
    KernelError,
    StoreUnavailableError,
)

PRIVATE_KEY = signing.generate_private_key()


def bundle(seed: int = 7) -> KernelBundle:
    version, config = "0123456789abcdef", {"rank": 4}
    shape = (8, 16)
    key = KernelKey("proj_lora_64", version, config, "Linear", shape, shape, "float32", "cpu",
                    "x86_64 AVX2", "2.13.0", "3.11.7")  # fmt: skip
    report = KernelReport(
        Certificate(0.0, 0.0, True, True, True, 128, 128), CostForecast(128, 2048, 0.01, 0.1)
    )
    spec = KernelSpec("proj_lora_64", version, config, seed)
    return pack(KernelDraft(key, spec, report), private_key=PRIVATE_KEY)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    before = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path) -> ObjectStore:
    name = f"kernels-{tmp_path.name.replace('_', '-').lower()}"[:60].rstrip("-")
    store = ObjectStore(f"s3://{name}/team/a?endpoint={s3_server}")
    store._client.create_bucket(Bucket=name)
    return store


@pytest.fixture(params=["directory", "bucket", "two levels"])
def store(request: pytest.FixtureRequest, bucket: ObjectStore, tmp_path: Path) -> Store:
    near = KernelStore(tmp_path / "near")
    if request.param == "directory":
        return near
    if request.param == "bucket":
        return bucket
    return TieredStore(near, bucket, near_bytes=1 << 20)


def test_every_place_gives_back_what_was_put_and_forgets_what_was_removed(store: Store) -> None:
    one, other = bundle(1), bundle(2)

    digest = store.put(one)
    store.put(other)

    assert store.put(one) == digest  # twice is harmless
    assert store.has(digest)
    assert store.get(digest) == one.files
    assert open_kernel(store.get(digest), digest, signing.public_key(PRIVATE_KEY))
    assert store.list() == tuple(sorted([digest, other.digest]))
    assert store.remove(digest)
    assert not store.remove(digest)
    assert not store.has(digest)
    assert store.list() == (other.digest,)
    with pytest.raises(KernelError, match="no kernel"):
        store.get(digest)


def test_every_place_can_set_a_kernel_aside(store: Store) -> None:
    digest = store.put(bundle())

    assert store.set_aside(digest)
    assert not store.set_aside(digest)
    assert not store.has(digest)
    assert store.list() == ()
    store.put(bundle())  # and it can be built again
    assert store.has(digest)


@pytest.mark.parametrize("digest", ["", "..", "../" * 30, "A" * 64, "a" * 63])
def test_no_place_takes_a_path_for_a_digest(store: Store, digest: str) -> None:
    for act in (store.has, store.get, store.remove, store.set_aside):
        with pytest.raises(KernelDigestError):
            act(digest)


def test_a_kernel_whose_upload_was_cut_off_is_not_there(bucket: ObjectStore) -> None:
    whole = bundle()
    put, calls = bucket._client.put_object, []

    def put_until_the_line_breaks(**arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == len(whole.files):
            raise ConnectionError("line")
        return put(**arguments)

    bucket._client.put_object = put_until_the_line_breaks
    with pytest.raises(ConnectionError):
        bucket.put(whole)

    assert not bucket.has(whole.digest)
    assert bucket.list() == ()


def test_a_huge_object_is_not_read_to_its_end(bucket: ObjectStore) -> None:
    digest = bucket.put(bundle())
    key = f"team/a/{digest[:2]}/{digest}/report.json"
    bucket._client.put_object(Bucket=bucket._bucket, Key=key, Body=b" " * 100_000)

    with pytest.raises(KernelDigestError, match="too large"):
        bucket.get(digest)


def test_a_bucket_that_does_not_answer_is_unavailable_and_not_empty(s3_server: str) -> None:
    nowhere = ObjectStore(f"s3://there-is-no-such-bucket/x?endpoint={s3_server}")

    with pytest.raises(StoreUnavailableError, match="NoSuchBucket"):
        nowhere.list()
    with pytest.raises(StoreUnavailableError):
        nowhere.put(bundle())


@pytest.mark.parametrize(
    "url", ["s3://", "http://x/y", "s3://key:secret@bucket/x", "s3://bucket?endpont=http://x"]
)
def test_an_invalid_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        open_store(str(tmp_path), url)


def test_the_second_reading_comes_from_this_host(bucket: ObjectStore, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    digest = bucket.put(bundle())
    store = TieredStore(
        KernelStore(tmp_path), bucket, near_bytes=1 << 20, count=lambda name: counts.update([name])
    )

    assert store.get(digest) == store.get(digest) == bundle().files
    assert counts == {"server_hits": 1, "host_hits": 1}


def test_a_copy_that_cannot_be_read_is_fetched_again(bucket: ObjectStore, tmp_path: Path) -> None:
    near = KernelStore(tmp_path)
    store = TieredStore(near, bucket, near_bytes=1 << 20)
    digest = store.put(bundle())
    (near.path(digest) / "recipe.json").unlink()

    assert store.get(digest) == bundle().files
    assert near.get(digest) == bundle().files


def test_this_host_keeps_what_was_used_last(bucket: ObjectStore, tmp_path: Path) -> None:
    near, counts = KernelStore(tmp_path), Counter[str]()
    size = sum(len(data) for data in bundle(1).files.values())
    store = TieredStore(
        near, bucket, near_bytes=int(2.5 * size), count=lambda name: counts.update([name])
    )
    first, second = store.put(bundle(1)), store.put(bundle(2))
    os.utime(near.path(first), (1, 1))
    os.utime(near.path(second), (2, 2))
    store.get(first)  # used: now the second is the oldest

    third = store.put(bundle(3))

    assert set(near.list()) == {first, third}
    assert counts["host_evictions"] == 1
    assert store.has(second)  # the shared place still has it
    assert store.get(second) == bundle(2).files
