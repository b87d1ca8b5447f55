"""Hosts as Linux network namespaces, joined by virtual cables to a bridge, each cable of limited speed."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

INTERFACE = "eth0"


def _run(*command: str) -> None:
    """Run a command; its error text is what a user needs when a kernel module is missing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)!r} failed: {done.stderr.strip()}")


class Network:
    """``hosts`` namespaces around a bridge that lives in a namespace of its own.

    The machine's own network is not touched. Everything is removed on exit, by the names made here.

    Args:
        hosts: Number of hosts.
        mbit: Speed of each host's cable in Mbit/s, in both directions.

    Raises:
        RuntimeError: Without root or iproute2.
    """

    def __init__(self, hosts: int, mbit: int) -> None:
        if shutil.which("tc") is None or shutil.which("ip") is None:
            raise RuntimeError("netlab needs `ip` and `tc`: apt-get install -y iproute2")
        if os.geteuid() != 0:
            raise RuntimeError("netlab needs root for network namespaces")
        prefix = f"netlab{os.getpid()}"
        self.hub = f"{prefix}-hub"
        self.hosts = [f"{prefix}-{host}" for host in range(hosts)]
        self.mbit = mbit
        self._made: list[str] = []

    @staticmethod
    def address(host: int) -> str:
        """Return a host's IPv4 address."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int) -> list[str]:
        """Return the words before a command that shall run on a host."""
        return ["ip", "netns", "exec", self.hosts[host]]

    def __enter__(self) -> Network:
        """Make the network."""
        try:
            self._add(self.hub)
            self._in(self.hub, "ip", "link", "add", "bridge", "type", "bridge")
            self._in(self.hub, "ip", "link", "set", "bridge", "up")
            for index, host in enumerate(self.hosts):
                self._add(host)
                self._plug(index, host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the network."""
        self._remove()

    def _add(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        self._in(name, "ip", "link", "set", "lo", "up")

    def _in(self, name: str, *command: str) -> None:
        _run("ip", "netns", "exec", name, *command)

    def _plug(self, index: int, host: str) -> None:
        port = f"port{index}"
        self._in(self.hub, "ip", "link", "add", port, "type", "veth", "peer", INTERFACE, "netns", host)
        self._in(self.hub, "ip", "link", "set", port, "master", "bridge", "up")
        self._in(host, "ip", "address", "add", f"{self.address(index)}/24", "dev", INTERFACE)
        self._in(host, "ip", "link", "set", INTERFACE, "up")
        for place, device in ((host, INTERFACE), (self.hub, port)):
            self._in(place, *self._limit(device))

    def _limit(self, device: str) -> list[str]:
        # A bucket of about a millisecond of traffic: enough for the timer, too little to hide the limit.
        # Below 64 kB the kernel cuts offloaded segments to real packets, whose headers are then counted.
        burst = max(32_000, self.mbit * 125)
        shape = ["rate", f"{self.mbit}mbit", "burst", str(burst), "latency", "100ms"]
        return ["tc", "qdisc", "add", "dev", device, "root", "tbf", *shape]

    def _remove(self) -> None:
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)
        self._made.clear()
