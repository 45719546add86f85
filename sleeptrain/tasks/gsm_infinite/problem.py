"""A whole problem as text: its facts in random order, with distractors up to a number of tokens."""

from collections.abc import Callable
from typing import NamedTuple

from sleeptrain.config import GSMInfiniteConfig
from sleeptrain.tasks.gsm_infinite.draws import Draws
from sleeptrain.tasks.gsm_infinite.graph import (
    LARGEST_VALUE,
    Constants,
    Core,
    Definition,
    Names,
    constants,
    draw_core,
    draw_relation,
)
from sleeptrain.tasks.gsm_infinite.stories import Places, Variables
from sleeptrain.tasks.gsm_infinite.wording import sentence

_SHARE_OF_TOTALS = 0.1


class Problem(NamedTuple):
    """``asked`` is the query, or in reverse the constant that is not given; ``facts`` say all that is needed,
    one sentence each, in random order. ``names`` has more quantities,
    ``constant`` draws one."""

    core: Core
    asked: str
    facts: list[str]
    names: Names
    constant: Constants

    @property
    def answer(self) -> int:
        return self.core.values[self.asked]

    @property
    def question(self) -> str:
        return f"What is {self.asked}?"


def draw_problem(draws: Draws, config: GSMInfiniteConfig, ops: int) -> Problem:
    """One without distractors; drawn again until all its values are in range."""
    constant = constants(draws, config.number_range, are_even=config.mode == "reverse")
    while True:
        names = (
            Variables(draws, config.num_variables)
            if config.kind == "symbolic"
            else Places(draws, is_hard=config.kind == "hard")
        )
        core = draw_core(draws, names, ops, constant)
        asked = _asked(draws, core, config.mode == "reverse") if core else None
        if core and asked:
            return Problem(core, asked, draws.shuffled(_facts(core, asked, config)), names, constant)


def _asked(draws: Draws, core: Core, is_reverse: bool) -> str | None:
    """In reverse a constant from which one single path leads to the query, None if there is none."""
    if not is_reverse:
        return core.query
    num_paths = dict.fromkeys(core.graph, 0) | {core.query: 1}
    for name, definition in core.graph.items():
        for operand in definition.operands:
            num_paths[operand] += num_paths[name]
    leaves = [n for n, d in core.graph.items() if d.operation == "is" and num_paths[n] == 1]
    return draws.choice(leaves) if leaves else None


def _facts(core: Core, asked: str, config: GSMInfiniteConfig) -> list[str]:
    is_symbolic, is_reverse = config.kind == "symbolic", config.mode == "reverse"
    told = {
        name: d for name, d in core.graph.items() if not d.is_unspoken and not (is_reverse and name == asked)
    }
    facts = [sentence(name, definition, is_symbolic) for name, definition in told.items()]
    if is_reverse:
        facts.append(sentence(core.query, Definition("is", (), core.values[core.query]), is_symbolic))
    return facts


def add_distractors(
    draws: Draws, problem: Problem, config: GSMInfiniteConfig, room_tokens: int, count: Callable[[str], int]
) -> list[str]:
    """Puts distractors among the facts as long as there is room for the next one; returns them in the order
    in which they were made. Each hangs on quantities that were there before, and none of these hangs on it:
    the last one can be taken away again."""
    values = dict(problem.core.values)
    known = list(values)
    added: list[str] = []
    while True:
        name, definition, value = _distractor(draws, problem, known, values)
        text = sentence(name, definition, config.kind == "symbolic")
        room_tokens -= count(" " + text)
        if room_tokens < 0:
            return added
        values[name] = value
        known.append(name)
        added.append(text)
        problem.facts.insert(draws.between(0, len(problem.facts)), text)


def _distractor(
    draws: Draws, problem: Problem, known: list[str], values: dict[str, int]
) -> tuple[str, Definition, int]:
    """A fresh quantity, what it follows from, and its value; an old total that it uses gets to be known."""
    if draws.chance(_SHARE_OF_TOTALS) and (total := problem.names.old_total()):
        values[total[0]] = total[1].value(values)
        known.append(total[0])
    name = problem.names.fresh()  # after the total, which would count it
    while True:
        operation, num_operands, constant = draw_relation(draws, problem.constant, ops_left=len(known))
        operands = tuple(draws.choice(known) for _ in range(num_operands))
        if len(set(operands)) < num_operands:
            continue
        definition = Definition(operation, operands, constant)
        value = definition.value(values)
        if 1 <= value <= LARGEST_VALUE:
            return name, definition, value
