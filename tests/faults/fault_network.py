"""Four hosts whose cables can be cut and throttled: the network lab's namespaces, with two verbs more."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).parents[2] / "benchmarks" / "netlab" / "network.py"


def reason_to_skip():
    """Return why there can be no network here, or an empty string."""
    if not _SOURCE.exists():
        return "the network lab in benchmarks/ is not there"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need ip and tc (iproute2)"
    tried = subprocess.run(["unshare", "-n", "true"], capture_output=True, timeout=30, check=False)
    return "network namespaces are not allowed here" if tried.returncode else ""


def network(mbit=1000):
    """Return the network lab's hosts, loaded from its file: the repository's root is not importable."""
    spec = importlib.util.spec_from_file_location("netlab_network", _SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Network(4, mbit)


def _hub(net, *command):
    subprocess.run(["ip", "netns", "exec", net.hub, *command], check=True, capture_output=True, timeout=30)


def cut(net, host):
    """Cut a host's cable in both directions."""
    _hub(net, "ip", "link", "set", f"port{host}", "down")


def mend(net, host):
    """Undo ``cut``."""
    _hub(net, "ip", "link", "set", f"port{host}", "up")


def throttle(net, host, mbit):
    """Give a host's cable another speed in both directions."""
    shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "32000", "latency", "400ms"]
    _hub(net, "tc", "qdisc", "replace", "dev", f"port{host}", *shape)
    inside = ["ip", "netns", "exec", net.hosts[host], "tc", "qdisc", "replace", "dev", "eth0", *shape]
    subprocess.run(inside, check=True, capture_output=True, timeout=30)


def namespaces():
    """Return the names of all network namespaces."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=30)
    return {line.split()[0] for line in listed.stdout.splitlines() if line.strip()}
