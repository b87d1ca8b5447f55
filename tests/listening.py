"""Which TCP sockets the processes of a tree listen on, from the system's own tables."""

import ipaddress
import os
import re
import sys
from pathlib import Path

_LISTEN = "0A"


def tree(root):
    """The process and everything below it that still runs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            continue
        parents[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found, todo = set(), {root}
    while todo:
        found |= todo
        todo = {pid for pid, parent in parents.items() if parent in found} - found
    return found


def _inodes(pid):
    found = set()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            if socket := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}")):
                found.add(socket.group(1))
    except OSError:  # it has ended, or the file is closed
        pass
    return found


def _address(text):
    """The kernel writes an address as 32-bit words in the machine's order."""
    data = b"".join(int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8))
    address = ipaddress.ip_address(data)
    return getattr(address, "ipv4_mapped", None) or address


def listeners(root):
    """`(process, address, port)` of all sockets that the tree listens on at the moment."""
    owner = {inode: pid for pid in tree(root) for inode in _inodes(pid)}
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            local, state, inode = fields[1], fields[3], fields[9]
            if state == _LISTEN and inode in owner:
                address, port = local.split(":")
                found.add((owner[inode], _address(address), int(port, 16)))
    return found
