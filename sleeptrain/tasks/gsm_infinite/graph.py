"""The graph of a problem: its quantities, and how the value of each follows from others.

A quantity is known by its phrase ("the number of adult bears in Amber Valley", "V12"). A graph is a dict from
quantities to their definitions in which each stands before its operands.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Literal, NamedTuple, Protocol

from sleeptrain.tasks.gsm_infinite.draws import Draws

LARGEST_VALUE = 1000

Operation = Literal["is", "plus", "minus", "times", "difference", "sum", "total", "yield"]

# How often what is drawn: tuned so that the commonest answer is as common as is known of the original, .33,
# .24, .15 and .09 at 2, 4, 6 and 8 operations (LOG.md).
_WITH_CONSTANT: tuple[Operation, ...] = ("plus", "minus", "times")
_WEIGHTS: dict[Operation, int] = {"plus": 1, "minus": 3, "times": 7, "difference": 6, "sum": 1}
_MIX = [operation for operation, weight in _WEIGHTS.items() for _ in range(weight)]
_SHARE_OF_TOTALS = 0.12  # of the operands
_SHARE_OF_REUSE = 0.05  # of the operands: those that another quantity depends on, too
_SHARE_OF_LONG_SUMS = 0.3  # of the sums: those of three
_LARGER_CONSTANT = 0.37  # how often a constant is larger than 1, than 2, ...


class Definition(NamedTuple):
    """``is`` a constant; an operand ``plus``, ``minus`` or ``times`` a constant; the ``difference`` of two
    operands, the ``sum`` of two or more. Two follow from the story and have no sentence:
    the ``total`` of a place, and its ``yield``, the sum of the products of operands 0 and 1, 2 and 3, ...
    """

    operation: Operation
    operands: tuple[str, ...] = ()
    constant: int = 0

    @property
    def num_ops(self) -> int:
        """Additions, subtractions and multiplications; reading a constant is one operation, too."""
        return max(1, len(self.operands) - 1)

    @property
    def is_unspoken(self) -> bool:
        return self.operation in ("total", "yield")

    def value(self, values: Mapping[str, int]) -> int:
        given = [values[operand] for operand in self.operands]
        match self.operation:
            case "is":
                return self.constant
            case "plus":
                return given[0] + self.constant
            case "minus":
                return given[0] - self.constant
            case "times":
                return given[0] * self.constant
            case "difference":
                return given[0] - given[1]
            case "yield":
                return sum(map(prod, zip(given[::2], given[1::2])))
        return sum(given)


Graph = dict[str, Definition]


class Names(Protocol):
    """Where the quantities of a problem come from."""

    def fresh(self) -> str:
        """A quantity that no other depends on so far. Raises ConfigError when all are taken."""

    def new_total(self, most_ops: int) -> tuple[str, Definition] | None:
        """A total over fresh quantities, for at most so many operations with one for each of these."""

    def old_total(self) -> tuple[str, Definition] | None:
        """A total over quantities that are all known, if there is one left; it is final from now on."""


class Core(NamedTuple):
    """The solution graph of ``query``: nothing in it that the value of the query does not need."""

    query: str
    graph: Graph
    values: dict[str, int]


Constants = Callable[[], int]


def constants(draws: Draws, number_range: int, are_even: bool) -> Constants:
    """Draws from 1..``number_range``: evenly, or small ones more often."""

    def draw() -> int:
        constant = 1
        while constant < number_range and draws.chance(_LARGER_CONSTANT):
            constant += 1
        return constant

    return partial(draws.between, 1, number_range) if are_even else draw


def draw_relation(draws: Draws, constant: Constants, ops_left: int) -> tuple[Operation, int, int]:
    """An operation, how many operands it takes, of which each needs one of ``ops_left``, and its constant, if
    any."""
    operation = draws.choice(_MIX)
    if operation not in _WITH_CONSTANT and ops_left < 2:
        operation = draws.choice(_WITH_CONSTANT)
    if operation in _WITH_CONSTANT:
        return operation, 1, constant()
    is_long = operation == "sum" and ops_left >= 4 and draws.chance(_SHARE_OF_LONG_SUMS)
    return operation, 3 if is_long else 2, 0


def draw_core(draws: Draws, names: Names, ops: int, constant: Constants) -> Core | None:
    """Grows a graph backwards from the query until it needs exactly ``ops`` operations; what has no
    definition by then is a constant. None where that leads nowhere, or to a value outside 1..LARGEST_VALUE.
    """
    growth = _Growth(draws, names, ops, constant)
    query = growth.operand()
    while growth.ops_left:
        if not growth.undefined:
            return None
        growth.define()
    graph = growth.graph
    for leaf in growth.undefined:
        graph[leaf] = Definition("is", (), constant())
    values: dict[str, int] = {}
    for name, definition in reversed(graph.items()):
        values[name] = definition.value(values)
        if not 1 <= values[name] <= LARGEST_VALUE:
            return None
    return Core(query, graph, values)


class _Growth:
    """A graph in which ``undefined`` quantities have no definition yet; one operation is set aside for each.

    An operand is undefined when it is chosen, and so depends on nothing that was defined before: no circles.
    """

    def __init__(self, draws: Draws, names: Names, ops: int, constant: Constants) -> None:
        self.draws, self.names, self.ops_left, self.constant = draws, names, ops, constant
        self.graph: Graph = {}
        self.undefined: list[str] = []

    def define(self) -> None:
        """Gives one quantity its definition."""
        name = self.draws.pop(self.undefined)
        operation, num_operands, constant = draw_relation(self.draws, self.constant, self.ops_left)
        self.ops_left -= max(1, num_operands - 1) - 1  # one was set aside
        self.graph[name] = Definition("is")  # its place, before its operands
        operands: tuple[str, ...] = ()
        for missing in reversed(range(num_operands)):
            operands = (*operands, self.operand(operands, missing))
        self.graph[name] = Definition(operation, operands, constant)

    def operand(self, beside: tuple[str, ...] = (), missing: int = 0) -> str:
        """One that is not yet ``beside``; as many as are ``missing`` must be affordable after it."""
        if self.draws.chance(_SHARE_OF_TOTALS) and (total := self.names.new_total(self.ops_left - missing)):
            name, definition = total
            self.graph[name] = definition
            self.ops_left -= definition.num_ops + len(definition.operands)
            self.undefined += definition.operands
            return name
        others = [name for name in self.undefined if name not in beside]
        if others and self.draws.chance(_SHARE_OF_REUSE):
            return self.draws.choice(others)
        name = self.names.fresh()
        self.undefined.append(name)
        self.ops_left -= 1
        return name
