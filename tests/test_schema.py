"""Settings as dataclasses: conversion, and one clear sentence per mistake."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sleeptrain.schema import ConfigError, describe, flatten, from_dict, setting, to_dict


@dataclass(frozen=True)
class Cat:
    name: Literal["cat"] = setting("cat", "the animal")
    lives: int = setting(9, "how many")


@dataclass(frozen=True)
class Dog:
    name: Literal["dog"] = setting("dog", "the animal")
    tricks: tuple[str, ...] = setting(("sit",), "what it can do")


@dataclass(frozen=True)
class Home:
    rooms: int = setting(2, "number of rooms")
    rent: float = setting(1.5, "per month")
    garden: bool = setting(False, "whether there is one")
    owner: str | None = setting(None, "who")
    floors: tuple[int, ...] = setting((1, 2), "which")
    heating: Literal["gas", "wood"] = setting("gas", "how")
    pet: Cat | Dog = field(default_factory=Cat)


def test_round_trip() -> None:
    home = Home(rooms=3, owner="me", floors=(0,), pet=Dog(tricks=("roll", "sit")))
    plain = to_dict(home)
    assert plain["pet"] == {"name": "dog", "tricks": ["roll", "sit"]}
    assert from_dict(Home, plain) == home
    assert from_dict(Home, {}) == Home()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"rent": 2}, {"rent": 2.0}),
        ({"rent": "1e-3"}, {"rent": 1e-3}),  # YAML reads 1e-3 as text
        ({"rooms": 4.0}, {"rooms": 4}),
        ({"owner": 7}, {"owner": "7"}),
        ({"owner": None}, {"owner": None}),
        ({"floors": 3}, {"floors": [3]}),
        ({"floors": []}, {"floors": []}),
        ({"pet": {"name": "dog"}}, {"pet": {"name": "dog", "tricks": ["sit"]}}),
    ],
)
def test_values_are_converted(data: dict[str, Any], expected: dict[str, Any]) -> None:
    home = to_dict(from_dict(Home, data))
    key = next(iter(expected))
    assert home == to_dict(Home()) | expected
    assert type(home[key]) is type(expected[key])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"romms": 3}, ("romms", "did you mean 'rooms'")),
        ({"pet": {"name": "cat", "livs": 3}}, ("pet.livs", "did you mean 'pet.lives'")),
        ({"pet": {"name": "cow"}}, ("pet", "'cow'", "cat", "dog")),
        ({"pet": {"lives": 3}}, ("pet", "cat", "dog")),
        ({"pet": "dog"}, ("pet='dog'", "section")),
        ({"rooms": "three"}, ("rooms='three'", "int")),
        ({"rooms": 2.5}, ("rooms=2.5", "int")),
        ({"rooms": True}, ("rooms=True", "int")),
        ({"rent": "much"}, ("rent='much'", "float")),
        ({"rent": True}, ("rent=True", "float")),
        ({"garden": 1}, ("garden=1", "bool")),
        ({"garden": "yes"}, ("garden='yes'", "bool")),
        ({"owner": [1]}, ("owner=[1]", "str")),
        ({"rooms": None}, ("rooms=null", "int")),
        ({"floors": "1,2"}, ("floors='1,2'", "list")),
        ({"floors": [1, "x"]}, ("floors", "'x'", "int")),
        ({"heating": "wod"}, ("heating", "'wod'", "did you mean 'wood'", "gas")),
    ],
)
def test_a_mistake_is_one_sentence_with_setting_and_value(data: dict[str, Any], words: tuple[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Home, data)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_a_missing_value_is_named() -> None:
    @dataclass
    class Needy:
        size: int

    with pytest.raises(ConfigError, match=r"box\.size is missing"):
        from_dict(Needy, {}, "box.")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_describe() -> None:
    rows = {name: (default, text) for name, default, text in describe(Home)}
    assert set(rows) == {*flatten(to_dict(Home())), "pet.tricks"}
    assert rows["garden"] == ("false", "whether there is one")
    assert rows["owner"][0] == "null"
    assert rows["floors"][0] == "[1,2]"
    assert rows["heating"] == ("gas", "how [gas | wood]")
