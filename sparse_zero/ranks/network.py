"""Network addresses, interfaces and ports of this host. Does not import torch."""

import socket

import psutil

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A TCP port that no process on this host uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def address_towards(host: str) -> str | None:
    """The address of this host on the route to another host; None without a route. Sends nothing."""
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
    """The network interface on the route to another host; None without a route."""
    address = address_towards(host)
    return next((name for name, own in interfaces().items() if address in own), None)
