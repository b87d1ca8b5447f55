"""Which tests execute which line: a mutant is only shown to those."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import pytest


class Recorder:
    """A plugin of pytest that tells coverage whose lines run; a shared fixture's belong to the file."""

    def __init__(self, package: Path) -> None:
        import coverage  # here: trials without a record run where the extra `mutants` is not installed

        self._coverage = coverage.Coverage(data_file=None, source=[str(package)], config_file=False)
        self._seconds: dict[str, float] = {}
        self._coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Records one test."""
        begin = perf_counter()
        self._coverage.switch_context(item.nodeid)
        yield
        self._coverage.switch_context("")
        self._seconds[item.nodeid] = perf_counter() - begin

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest
    ) -> Iterator[None]:
        """Records a fixture that several tests share."""
        if fixturedef.scope != "function":
            self._coverage.switch_context(request.node.nodeid.partition("::")[0])
        yield
        if fixturedef.scope != "function":
            self._coverage.switch_context(request._pyfuncitem.nodeid)

    def write(self, path: Path, folder: Path) -> None:
        """Writes a `CoverageMap`, its modules relative to `folder`."""
        self._coverage.stop()
        data = self._coverage.get_data()
        lines = {
            str(Path(file).relative_to(folder)): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        path.write_text(json.dumps({"seconds": self._seconds, "lines": lines}))


@dataclass
class CoverageMap:
    """What `Recorder` wrote: seconds by test, tests (or files of tests) by module and line."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> CoverageMap:
        """Returns what a recorder wrote to `path`."""
        return cls(**json.loads(path.read_text()))

    def tests_of(self, module: str, source: str, line: int) -> list[str]:
        """Returns the tests that execute the statement at a line, quickest first; all outside functions."""
        seen, chosen = self.lines.get(module, {}), list(self.seconds)
        if numbers := _statement(source, line):
            found = {name for number in numbers for name in seen.get(str(number), ())}
            chosen = [test for test in chosen if test in found or _file(test) in found]
        return sorted(chosen, key=self.seconds.__getitem__)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _statement(source: str, line: int) -> Sequence[int]:
    """Lines of the innermost statement of a function, of a compound one down to `line`; none outside."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [node for node in nodes if node.lineno <= line <= node.end_lineno]
    if not any(isinstance(node, ast.FunctionDef) and line >= node.body[0].lineno for node in around):
        return []
    inner = max(around, key=lambda node: node.lineno)
    return range(inner.lineno, (line if hasattr(inner, "body") else inner.end_lineno) + 1)
