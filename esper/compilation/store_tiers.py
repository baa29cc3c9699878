"""Two tiers of one store: this host's directory in front of the store that all hosts share."""

from __future__ import annotations

import logging
from collections.abc import Callable

from esper.compilation.store import KernelStore, Store
from esper.contracts import KernelBundle
from esper.exceptions import KernelError

log = logging.getLogger("esper")

Count = Callable[[str], None]


class TieredStore:
    """Reads from the near store if possible; writes to both.

    Args:
        near: this host's copy, kept below ``near_bytes`` by removing the least recently used.
        far: the shared store; it decides which kernels exist.
        count: called with ``host_hits``, ``server_hits`` or ``host_evictions`` for each event.
    """

    def __init__(
        self, near: KernelStore, far: Store, *, near_bytes: int, count: Count = lambda name: None
    ) -> None:
        self.near = near
        self.far = far
        self._near_bytes = near_bytes
        self._count = count

    def has(self, digest: str) -> bool:
        return self.far.has(digest)

    def put(self, bundle: KernelBundle) -> str:
        """Raises ``StoreUnavailableError`` if the far store does not accept it."""
        digest = self.far.put(bundle)
        self._copy(bundle)
        return digest

    def get(self, digest: str) -> dict[str, bytes]:
        """Unverified, as from any store. A copy that cannot be read is fetched again."""
        try:
            files = self.near.get(digest)
        except KernelError:
            return self._fetch(digest)
        self.near.touch(digest)
        self._count("host_hits")
        return files

    def remove(self, digest: str) -> bool:
        self.near.remove(digest)
        return self.far.remove(digest)

    def set_aside(self, digest: str) -> bool:
        """Removes the near copy too, in case only that one was corrupt."""
        self.near.remove(digest)
        return self.far.set_aside(digest)

    def list(self) -> tuple[str, ...]:
        return self.far.list()

    def _fetch(self, digest: str) -> dict[str, bytes]:
        files = self.far.get(digest)
        self._count("server_hits")
        self.near.remove(digest)  # the unreadable copy
        bundle = KernelBundle(files)
        if bundle.digest == digest:
            self._copy(bundle)
        return files

    def _copy(self, bundle: KernelBundle) -> None:
        try:
            digest = self.near.put(bundle)
            for _ in self.near.trim(self._near_bytes, keep={digest}):
                self._count("host_evictions")
        except OSError as error:  # a full disk makes it slower, but loses no kernel
            log.warning("kernel %s was not copied to this host: %s", bundle.digest, error)


def open_store(
    directory: str, url: str = "", *, near_bytes: int = 1 << 30, count: Count = lambda name: None
) -> Store:
    """The installation's store.

    Args:
        directory: this host's directory; the whole store if there is no ``url``.
        url: ``s3://…``; see :class:`esper.compilation.object_store.ObjectStore`.

    Raises:
        ConfigurationError: the address is not valid.
    """
    near = KernelStore(directory)
    if not url:
        return near
    from esper.compilation.object_store import ObjectStore

    return TieredStore(near, ObjectStore(url), near_bytes=near_bytes, count=count)
