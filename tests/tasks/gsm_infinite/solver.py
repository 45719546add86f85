"""Solves problems from their text alone, by the grammar of their sentences; knows nothing of the generator.

Every quantity is a linear form a x + b in the one unknown x, if there is one: a forward problem is solved
with a = 0, a reverse one where a given value meets the form that its relation leads to.
"""

import re
from fractions import Fraction
from typing import NamedTuple

OF_PLACE = re.compile(r"(?P<what>.*) (?:in|at) (?P<place>[A-Z].*)$")
TOTALS = {
    "the total number of adult animals": (r"the number of adult .*", None),
    "the total number of trees": (r"the number of .*", None),
    "the total number of classes": (r"the number of .*", None),
    "the total number of cubs": (r"the number of adult .*", "the average number of cubs per adult {}"),
    "the total number of baskets picked": (
        r"the number of .*",
        "the average number of baskets picked per {}",
    ),
    "the total number of pupils": (r"the number of .*", "the average number of pupils per {}"),
}
SINGULAR = {"wolves": "wolf", "foxes": "fox", "lynxes": "lynx", "deer": "deer"}


class Solved(NamedTuple):
    """``needed`` are the sentences that the answer hangs on, ``used`` the quantities."""

    answer: int
    ops: int
    needed: set[str]
    sentences: list[str]


class Form(NamedTuple):
    slope: Fraction
    constant: Fraction


def parse(text: str) -> tuple[list[str], str]:
    """Sentences of the facts, and the quantity asked for."""
    facts = re.search(r"Facts:(.*?)(?=\nQuestion:|\nAnswer:|\nSolution:|$)", text)
    asked = re.search(r"Question: What is (.*?)\?", text)
    assert facts
    assert asked
    sentences = [s.strip() + "." for s in facts[1].split(".") if s.strip()]
    return [s for s in sentences if not s.startswith("A total counts")], asked[1]


def solve(text: str) -> Solved:
    return Solver(*parse(text)).solve()


class Solver:
    def __init__(self, sentences: list[str], asked: str) -> None:
        self.sentences, self.asked = sentences, asked
        self.relations: dict[str, list[tuple[str, str]]] = {}  # of each quantity: right side, sentence
        for sentence in sentences:
            name, side = re.split(r" equals | is | = ", sentence[:-1], maxsplit=1)
            name = name[0].lower() + name[1:] if name.startswith("The ") else name
            self.relations.setdefault(name, []).append((side, sentence))
        self.forms: dict[str, Form] = {}
        self.needed: set[str] = set()
        self.ops = 0

    def solve(self) -> Solved:
        doubly = [name for name, sides in self.relations.items() if len(sides) == 2]
        is_total_given = [n for n, sides in self.relations.items() if self.kind(n) and len(sides) == 1]
        answer = self.backwards(doubly + is_total_given) if self.is_unknown() else self.forwards()
        assert answer.denominator == 1
        return Solved(int(answer), self.ops, self.needed, self.sentences)

    def is_unknown(self) -> bool:
        return self.asked not in self.relations and not self.kind(self.asked)

    def forwards(self) -> Fraction:
        form = self.form(self.asked)
        assert form.slope == 0
        return form.constant

    def backwards(self, given: list[str]) -> Fraction:
        """The one quantity with both a value and a relation (or a total's rule) gives the equation."""
        [name] = given
        sides = self.relations.pop(name)
        [(value, sentence)] = [(side, s) for side, s in sides if side.isdigit()]
        relations = [pair for pair in sides if not pair[0].isdigit()]
        if relations:
            self.relations[name] = relations
        self.needed.add(sentence)
        self.forms[self.asked] = Form(Fraction(1), Fraction(0))
        form = self.form(name)
        self.ops += 1  # reads the value
        assert form.slope != 0
        return (int(value) - form.constant) / form.slope

    def form(self, name: str) -> Form:
        if name not in self.forms:
            if name in self.relations:
                [(side, sentence)] = self.relations[name]
                self.needed.add(sentence)
                self.forms[name] = self.of_side(side)
            else:
                self.forms[name] = self.of_total(name)
        return self.forms[name]

    def of_side(self, side: str) -> Form:
        if side.startswith("the sum of "):
            return self.add([self.term(t) for t in re.split(r", | and ", side[len("the sum of ") :])])
        for word, sign in ((" times ", "*"), (" * ", "*"), (" minus ", "-"), (" - ", "-")):
            if word in side:
                left, right = map(self.term, side.split(word))
                self.ops += 1
                return multiply(left, right) if sign == "*" else Form(*(a - b for a, b in zip(left, right)))
        terms = re.split(r" plus | \+ ", side)
        if len(terms) == 1:
            self.ops += 1  # reads a constant
            return self.term(side)
        return self.add([self.term(t) for t in terms])

    def term(self, text: str) -> Form:
        return Form(Fraction(0), Fraction(text)) if text.isdigit() else self.form(text)

    def add(self, forms: list[Form]) -> Form:
        assert len(forms) > 1
        self.ops += len(forms) - 1
        return Form(sum(f.slope for f in forms), sum(f.constant for f in forms))

    def kind(self, name: str) -> tuple[str, str, str | None] | None:
        """Place of a total, what it counts, and the average that this is multiplied with, if any."""
        match = OF_PLACE.match(name)
        if not match or match["what"] not in TOTALS:
            return None
        return match["place"], *TOTALS[match["what"]]

    def of_total(self, name: str) -> Form:
        kind = self.kind(name)
        assert kind, f"nothing says what {name} is"
        place, counted, average = kind
        mentioned = self.mentioned(place)
        numbers = sorted(m for m in mentioned if re.fullmatch(counted, m.rsplit(f" {place}", 1)[0]))
        assert numbers
        if average is None:
            return self.add([self.form(number) for number in numbers])
        products = []
        for number in numbers:
            match = OF_PLACE.match(number)
            assert match
            per_one = number.replace(match["what"], average.format(singular(match["what"])))
            products.append(multiply(self.form(number), self.form(per_one)))
            self.ops += 1
        averages = [m for m in mentioned if m.startswith("the average")]
        assert len(averages) == len(numbers)
        return products[0] if len(products) == 1 else self.add(products)

    def mentioned(self, place: str) -> set[str]:
        """Numbers and averages, no totals, that the problem names for a place, also in the question."""
        text = " ".join([*self.sentences, f"What is {self.asked}?"])
        names = re.findall(r"[Tt]he (?:number|average number) of [a-z ]* (?:in|at) [A-Z]\w* [A-Z]\w*", text)
        return {name[0].lower() + name[1:] for name in names if name.endswith(" " + place)}


def multiply(a: Form, b: Form) -> Form:
    assert a.slope == 0 or b.slope == 0, "the unknown stands on two paths"
    return Form(a.slope * b.constant + b.slope * a.constant, a.constant * b.constant)


def singular(what: str) -> str:
    """Of "the number of adult bears": bear."""
    things = re.sub(r"^the number of (adult )?", "", what)
    if things in SINGULAR:
        return SINGULAR[things]
    return things[: -2 if things.endswith("classes") else -1]
