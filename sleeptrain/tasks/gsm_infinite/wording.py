"""A graph in words: one sentence per quantity, and the worked solution."""

from collections.abc import Iterator
from itertools import pairwise

from sleeptrain.tasks.gsm_infinite.graph import Core, Definition

_TOLD = {
    "is": "{name} is {constant}.",
    "plus": "{name} equals {constant} plus {0}.",
    "minus": "{name} equals {0} minus {constant}.",
    "times": "{name} equals {constant} times {0}.",
    "difference": "{name} equals {0} minus {1}.",
}
_SUM = "{name} equals the sum of {operands} and {last}."
_SYMBOLIC = {
    "is": "{name} = {constant}.",
    "plus": "{name} = {constant} + {0}.",
    "minus": "{name} = {0} - {constant}.",
    "times": "{name} = {constant} * {0}.",
    "difference": "{name} = {0} - {1}.",
}


def sentence(name: str, definition: Definition, is_symbolic: bool) -> str:
    """What a problem says about a quantity, totals excepted."""
    operands = definition.operands
    if definition.operation == "sum":
        if is_symbolic:
            return f"{name} = {' + '.join(operands)}."
        return _capital(_SUM.format(name=name, operands=", ".join(operands[:-1]), last=operands[-1]))
    template = (_SYMBOLIC if is_symbolic else _TOLD)[definition.operation]
    return _capital(template.format(*operands, name=name, constant=definition.constant))


def templates() -> list[str]:
    """What told problems are made of, without names and numbers."""
    blank = {"name": "", "constant": "", "operands": "", "last": ""}
    return [template.format("", "", **blank) for template in (*_TOLD.values(), _SUM)]


def solution(core: Core, unknown: str) -> str:
    """The steps to the value of ``unknown``: the query itself, or in reverse a constant that it hangs on by
    one single path. Each step has the numbers put in; the order is that in which the query names what it
    needs."""
    steps = [f"{name} = {step}" for name, step in _steps(core, unknown)]
    return "; ".join(steps) + "."


def _steps(core: Core, unknown: str) -> Iterator[tuple[str, str]]:
    path = _path(core, unknown)
    done: set[str] = set()

    def forward(name: str) -> Iterator[tuple[str, str]]:
        if name in done:
            return
        done.add(name)
        for operand in core.graph[name].operands:
            yield from forward(operand)
        if name not in path:
            yield name, _with_value(_forward(core, name), core.values[name])

    if unknown == core.query:
        path = []
        yield from forward(core.query)
        return
    yield from forward(core.query)
    yield core.query, str(core.values[core.query])
    for name, operand in pairwise(path):
        yield operand, _with_value(_backward(core, name, operand), core.values[operand])


def _path(core: Core, unknown: str) -> list[str]:
    """From the query down to the unknown."""
    path = [unknown]
    for name, definition in reversed(core.graph.items()):
        if path[-1] in definition.operands:
            path.append(name)
    return path[::-1]


def _forward(core: Core, name: str) -> str:
    definition = core.graph[name]
    given, constant = [str(core.values[o]) for o in definition.operands], definition.constant
    match definition.operation:
        case "is":
            return str(constant)
        case "plus":
            return f"{constant} + {given[0]}"
        case "minus":
            return f"{given[0]} - {constant}"
        case "times":
            return f"{constant} * {given[0]}"
        case "difference":
            return f"{given[0]} - {given[1]}"
        case "yield":
            return " + ".join(f"{number} * {average}" for number, average in zip(given[::2], given[1::2]))
    return " + ".join(given)


def _backward(core: Core, name: str, operand: str) -> str:
    """What an operand is, from the quantity that depends on it and the other operands."""
    definition, value = core.graph[name], core.values[name]
    constant, place = definition.constant, definition.operands.index(operand)
    given = [core.values[o] for o in definition.operands]
    match definition.operation:
        case "plus":
            return f"{value} - {constant}"
        case "minus":
            return f"{value} + {constant}"
        case "times":
            return f"{value} / {constant}"
        case "difference":
            return f"{value} + {given[1]}" if place == 0 else f"{given[0]} - {value}"
        case "yield":
            factor = given[place ^ 1]
            others = [
                f" - {a} * {b}" for i, (a, b) in enumerate(zip(given[::2], given[1::2])) if i != place // 2
            ]
            return f"({value}{''.join(others)}) / {factor}" if others else f"{value} / {factor}"
    return " - ".join(str(v) for v in [value, *given[:place], *given[place + 1 :]])


def _with_value(expression: str, value: int) -> str:
    return expression if expression.isdigit() else f"{expression} = {value}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
