"""Where the quantities of a problem come from: kinds of things in places, or variables."""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

from sleeptrain.schema import ConfigError
from sleeptrain.tasks.gsm_infinite.draws import Draws
from sleeptrain.tasks.gsm_infinite.graph import Definition

_KINDS_OF_A_PROBLEM = 6
_LARGEST_NEW_TOTAL = 4  # kinds
_SHARE_OF_NEW_PLACES = 0.25
_SHARE_OF_YIELDS = 0.5  # of the totals of hard problems


class Story(NamedTuple):
    """Phrases with {kind} (singular), {kinds} and {place}; a place is a first and a second word."""

    kinds: tuple[tuple[str, str], ...]  # singular, plural
    places: tuple[tuple[str, ...], tuple[str, ...]]
    number: str
    average: str
    total: str
    total_yield: str

    def texts(self) -> Iterator[str]:
        """Everything that it can say, piece by piece."""
        yield from (*self.places[0], *self.places[1], *(name for kind in self.kinds for name in kind))
        for template in (self.number, self.average, self.total, self.total_yield):
            yield template.format(kind="", kinds="", place="")


STORIES = (
    Story(
        kinds=(
            ("bear", "bears"),
            ("deer", "deer"),
            ("fox", "foxes"),
            ("hare", "hares"),
            ("lynx", "lynxes"),
            ("otter", "otters"),
            ("owl", "owls"),
            ("wolf", "wolves"),
        ),
        places=(
            ("Amber", "Birch", "Cedar", "Dusty", "Eagle", "Frost", "Granite", "Hazel", "Iron", "Juniper"),
            ("Valley", "Ridge", "Forest", "Marsh", "Lake", "Canyon", "Meadow", "Coast", "Hills", "Creek"),
        ),
        number="the number of adult {kinds} in {place}",
        average="the average number of cubs per adult {kind} in {place}",
        total="the total number of adult animals in {place}",
        total_yield="the total number of cubs in {place}",
    ),
    Story(
        kinds=(
            ("apple tree", "apple trees"),
            ("cherry tree", "cherry trees"),
            ("fig tree", "fig trees"),
            ("lemon tree", "lemon trees"),
            ("olive tree", "olive trees"),
            ("peach tree", "peach trees"),
            ("pear tree", "pear trees"),
            ("plum tree", "plum trees"),
        ),
        places=(
            ("North", "South", "East", "West", "Upper", "Lower", "Old", "New", "Sunny", "Windy"),
            ("Farm", "Orchard", "Grove", "Garden", "Estate", "Terrace", "Field", "Slope", "Park", "Yard"),
        ),
        number="the number of {kinds} in {place}",
        average="the average number of baskets picked per {kind} in {place}",
        total="the total number of trees in {place}",
        total_yield="the total number of baskets picked in {place}",
    ),
    Story(
        kinds=(
            ("art class", "art classes"),
            ("biology class", "biology classes"),
            ("chess class", "chess classes"),
            ("dance class", "dance classes"),
            ("history class", "history classes"),
            ("music class", "music classes"),
            ("physics class", "physics classes"),
            ("poetry class", "poetry classes"),
        ),
        places=(
            (
                "Ashton",
                "Brook",
                "Clifton",
                "Dover",
                "Elm",
                "Fairfield",
                "Grange",
                "Harbour",
                "Kings",
                "Linden",
            ),
            (
                "School",
                "College",
                "Academy",
                "Institute",
                "Hall",
                "House",
                "Centre",
                "Campus",
                "Tower",
                "Court",
            ),
        ),
        number="the number of {kinds} at {place}",
        average="the average number of pupils per {kind} at {place}",
        total="the total number of classes at {place}",
        total_yield="the total number of pupils at {place}",
    ),
)
TOTALS_COUNT = "A total counts all kinds that are mentioned for its place."


@cache
def _names_of_places(story: Story) -> tuple[str, ...]:
    return tuple(f"{first} {second}" for first, second in product(*story.places))


class Places:
    """The quantities of a problem that tells a story: numbers of a kind in a place, in hard problems averages
    per one of a kind, too, and their totals.

    A total counts every kind that is mentioned for its place, so nothing more is once a total was used.
    """

    def __init__(self, draws: Draws, is_hard: bool) -> None:
        self._draws, self._is_hard = draws, is_hard
        self._story = draws.choice(STORIES)
        kinds = list(self._story.kinds)
        self._kinds = [draws.pop(kinds) for _ in range(_KINDS_OF_A_PROBLEM)]
        self._unused = list(_names_of_places(self._story))
        self._num_places = len(self._unused)
        self._open: list[_Place] = []  # may be mentioned further
        self._with_room: list[_Place] = []  # those of them that lack some kinds

    def fresh(self) -> str:
        """Raises ConfigError when all are taken."""
        if not self._with_room or (self._unused and self._draws.chance(_SHARE_OF_NEW_PLACES)):
            place = self._new_place()
            self._open.append(place)
            self._with_room.append(place)
        place = self._draws.choice(self._with_room)
        name = place.mention(self._draws)
        if not place.left:
            self._with_room.remove(place)
        return name

    def new_total(self, most_ops: int) -> tuple[str, Definition] | None:
        if self._is_hard and most_ops >= 3 and self._draws.chance(_SHARE_OF_YIELDS):
            place = self._new_place()
            kinds = self._some_kinds(1, min((most_ops + 1) // 4, _LARGEST_NEW_TOTAL))
            return place.total_yield(kinds)
        if most_ops < 3:
            return None
        place = self._new_place()
        return place.total(self._some_kinds(2, min((most_ops + 1) // 2, _LARGEST_NEW_TOTAL)))

    def old_total(self) -> tuple[str, Definition] | None:
        place = self._draws.choice(self._open) if self._open else None
        if place is None or not place.numbers or not place.averages <= place.numbers:
            return None
        has_yield = place.averages == place.numbers
        if not has_yield and len(place.numbers) < 2:
            return None
        self._open.remove(place)
        if place.left:
            self._with_room.remove(place)
        kinds = sorted(place.numbers)
        return place.total_yield(kinds) if has_yield else place.total(kinds)

    def _new_place(self) -> "_Place":
        if not self._unused:
            raise ConfigError(
                f"task.target_tokens wants more quantities than {self._num_places} places have; lower it, or "
                "task.sequence_tokens where it is null"
            )
        return _Place(self._draws.pop(self._unused), self._story, self._kinds, self._is_hard)

    def _some_kinds(self, least: int, most: int) -> list[tuple[str, str]]:
        kinds = list(self._kinds)
        return sorted(self._draws.pop(kinds) for _ in range(self._draws.between(least, most)))


Kind = tuple[str, str]


class _Place:
    """What is mentioned for a place so far, and what is ``left``: kinds, and whether their average."""

    def __init__(self, name: str, story: Story, kinds: list[Kind], is_hard: bool) -> None:
        self.name, self.story = name, story
        self.left = [
            (kind, is_average) for kind in kinds for is_average in ((False, True) if is_hard else (False,))
        ]
        self.numbers: set[Kind] = set()
        self.averages: set[Kind] = set()

    def mention(self, draws: Draws) -> str:
        kind, is_average = draws.pop(self.left)
        (self.averages if is_average else self.numbers).add(kind)
        return self._phrase(self.story.average if is_average else self.story.number, kind)

    def total(self, kinds: list[Kind]) -> tuple[str, Definition]:
        operands = tuple(self._phrase(self.story.number, kind) for kind in kinds)
        return self.story.total.format(place=self.name), Definition("total", operands)

    def total_yield(self, kinds: list[Kind]) -> tuple[str, Definition]:
        parts = (self.story.number, self.story.average)
        operands = tuple(self._phrase(part, kind) for kind in kinds for part in parts)
        return self.story.total_yield.format(place=self.name), Definition("yield", operands)

    def _phrase(self, template: str, kind: Kind) -> str:
        return template.format(kind=kind[0], kinds=kind[1], place=self.name)


class Variables:
    """The quantities of a symbolic problem, V0 and on; there are no totals."""

    def __init__(self, draws: Draws, num_variables: int) -> None:
        self._draws, self._num_variables = draws, num_variables
        self._used: set[int] = set()

    def fresh(self) -> str:
        """Raises ConfigError when all are taken."""
        if len(self._used) == self._num_variables:
            raise ConfigError(
                f"task.num_variables={self._num_variables} are too few for the tokens to fill; raise it, or "
                "lower task.target_tokens, or task.sequence_tokens where that is null"
            )
        number = self._draws.between(0, self._num_variables - 1)
        while number in self._used:
            number = self._draws.between(0, self._num_variables - 1)
        self._used.add(number)
        return f"V{number}"

    def new_total(self, most_ops: int) -> None:
        return None

    def old_total(self) -> None:
        return None
