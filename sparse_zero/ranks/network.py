"""Addresses and ports of this host. Imports no torch."""

import socket

import psutil


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def address_towards(host: str) -> str | None:
    """This host's own address on the way to another; None where there is no way. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def interfaces() -> dict[str, list[str]]:
    """The IPv4 addresses of each network interface."""
    return {
        name: [each.address for each in addresses if each.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }


def interface_towards(host: str) -> str | None:
    """The interface that leads to another host; None where there is no way."""
    address = address_towards(host)
    return next((name for name, own in interfaces().items() if address in own), None)
