"""Choosing TCP ports on loopback."""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"
# Below the ports that systems lend to the connections of clients (Linux from 32768, others from
# 49152): a server that is restarted must find its port free again.
LASTING_PORTS = range(20_000, 32_768)
TRIES = 100


class PortBusyError(Exception):
    """The requested port is taken; ``port`` names it."""

    def __init__(self, port: int) -> None:
        super().__init__(
            f"Port {port} is taken by another program. Choose another with --port N, "
            "or let Esper choose with --port 0."
        )
        self.port = port


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def any_free_port() -> int:
    """A port that no program uses, and no connection of a client will use."""
    for candidate in random.sample(LASTING_PORTS, TRIES):
        if is_free(candidate):
            return candidate
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def demand_port(port: int) -> int:
    """The port that a person asked for; 0 means any.

    Raises:
        PortBusyError: another program uses it.
    """
    if port == 0:
        return any_free_port()
    if not is_free(port):
        raise PortBusyError(port)
    return port


def prefer_port(port: int, *, neighbours: int = 20) -> int:
    """The port, or the next free one above it, or any."""
    for candidate in range(port, port + neighbours):
        if is_free(candidate):
            return candidate
    return any_free_port()
