"""Which errors can be put into a module (cosmic-ray's operators), and a sample of them."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

Position = tuple[int, int]


@dataclass(frozen=True)
class Mutation:
    """One error at one place.

    Attributes:
        module: Path of the module below the root.
        operator: Name of cosmic-ray's operator.
        occurrence: Which of the operator's places in the module.
        start: Line and column of the place.
    """

    module: str
    operator: str
    occurrence: int
    start: Position

    def apply(self, source: str) -> str:
        """Returns the module's source with the error."""
        mutated = mutate_code(source, plugins.get_operator(self.operator)(), self.occurrence)
        if mutated is None:
            raise ValueError(f"{self.module}: there is no {self.operator} number {self.occurrence}")
        return mutated


def mutations(root: Path, module: str) -> list[Mutation]:
    """Returns all mutations of a module but those of annotations, which nothing executes."""
    source = (root / module).read_text()
    nodes, skipped = list(ast_nodes(get_ast(source))), _annotations(source)
    found = []
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if operator.arguments():  # replaces or inserts variables that have to be named
            continue
        places = [start for node in nodes for start, _ in operator().mutation_positions(node)]
        found += [
            Mutation(module, name, occurrence, tuple(start))
            for occurrence, start in enumerate(places)
            if not any(first <= tuple(start) < last for first, last in skipped)
        ]
    return found


def sample(candidates: Iterable[Mutation], number: int, seed: int) -> list[Mutation]:
    """Draws places first, then one mutation at each, so that operators with many variants do not prevail."""
    places: dict[tuple[str, Position], list[Mutation]] = defaultdict(list)
    for mutation in candidates:
        places[mutation.module, mutation.start].append(mutation)
    draw = random.Random(seed)
    chosen = draw.sample(sorted(places), min(number, len(places)))
    return [draw.choice(places[place]) for place in chosen]


def _annotations(source: str) -> list[tuple[Position, Position]]:
    spans = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if found is not None:
                spans.append(((found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)))
    return spans
