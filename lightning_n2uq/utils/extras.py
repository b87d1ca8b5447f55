"""The extras of the package: what they need, what of it is missing here, and a command that installs it.

The command names the packages themselves: this package is on no public index, and its name there is free.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")
DISTRIBUTION = "lightning_n2uq"


@functools.cache
def extras() -> dict[str, tuple[str, ...]]:
    """Returns the requirements of every extra by name; none if the package is not installed."""
    try:
        wanted = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in wanted:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        match = _EXTRA.search(marker)
        if match is not None:
            found.setdefault(match[1], []).append(requirement)
    return {name: tuple(requirements) for name, requirements in found.items()}


def missing(extra: str) -> tuple[str, ...]:
    """Returns the requirements of an extra, and of the extras in it, whose packages are not installed."""
    lacking: list[str] = []
    for requirement in extras().get(extra, ()):
        name = _package(requirement)
        if name == DISTRIBUTION.replace("_", "-"):
            inner = re.findall(r"[\w-]+", requirement.partition("[")[2].partition("]")[0])
            lacking += [part for inside in inner for part in missing(inside)]
        elif not _is_installed(name):
            lacking.append(requirement)
    return tuple(dict.fromkeys(lacking))


def how_to_install(extra: str) -> str:
    """Returns the command that installs what is missing of an extra (all of it if nothing seems to be)."""
    requirements = missing(extra) or extras().get(extra, ())
    if not requirements:  # a copy of the sources that is not installed
        return f"pip install '.[{extra}]' in a checkout of this package"
    return f"pip install {' '.join(repr(requirement) for requirement in requirements)}"


def _package(requirement: str) -> str:
    match = _NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
