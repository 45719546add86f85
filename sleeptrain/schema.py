"""Dataclasses as settings: plain dict -> checked dataclass, one clear sentence per mistake, and the text of
``--help``."""

import difflib
import types
import typing
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is wrong; the message names the setting, its value and the remedy."""


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


def reason_of(error: BaseException) -> str:
    """A few words for an error of a library: what the system says, else its text, else its name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def setting(default: Any, help_text: str) -> Any:
    """A dataclass field with a default and the sentence that ``--help`` prints for it."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


def unknown(kind: str, name: object, known: typing.Iterable[str]) -> str:
    """The sentence for a name that does not exist, with its nearest neighbour first."""
    options = sorted(known)
    close = difflib.get_close_matches(str(name), options, n=1)
    if close and len(options) > 12:
        return f"unknown {kind} {name!r}; did you mean {close[0]!r}? --help lists all"
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(options)}"


def from_dict(cls: type[T], data: dict[str, Any], path: str = "") -> T:
    """Builds the dataclass ``cls`` from nested plain values; raises ConfigError on an unknown key or a wrong
    type."""
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ConfigError(unknown("setting", path + str(key), [path + name for name in hints]))
    values = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name in data:
            values[f.name] = _convert(hints[f.name], data[f.name], path + f.name)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{path}{f.name} is missing; give it a value")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values (lists, no tuples) that ``from_dict`` reads back to an equal object."""
    result: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            value = to_dict(value)
        if isinstance(value, tuple):
            value = [to_dict(item) if is_dataclass(item) else item for item in value]
        result[f.name] = value
    return result


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def with_changes(config: T, changes: dict[str, Any]) -> T:
    """The same with other values for ``{"section.key": value}``, checked again; raises ConfigError."""
    nested = to_dict(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        inside = nested
        for section in sections:
            inside = inside.get(section, {})
            if not isinstance(inside, dict):
                raise ConfigError(unknown("setting", key, flatten(to_dict(config))))
        if name not in inside:
            raise ConfigError(unknown("setting", key, flatten(to_dict(config))))
        inside[name] = value
    return from_dict(type(config), nested)


def describe(cls: type, path: str = "") -> list[tuple[str, str, str]]:
    """Rows (setting, default, help) of a settings dataclass and of the dataclasses inside it."""
    hints = typing.get_type_hints(cls)
    rows: list[tuple[str, str, str]] = []
    for f in fields(cls):
        for choice in _members(hints[f.name]):
            if is_dataclass(choice):
                rows += describe(typing.cast(type, choice), f"{path}{f.name}.")
        if "help" in f.metadata:
            text = f.metadata["help"]
            choices = _literals(hints[f.name])
            rows.append(
                (path + f.name, _show(_default(f)), f"{text} [{' | '.join(choices)}]" if choices else text)
            )
    return rows


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _literals(hint: Any) -> list[str]:
    members = [m for m in _members(hint) if typing.get_origin(m) is Literal]
    return [str(value) for m in members for value in typing.get_args(m)]


def _convert(hint: Any, value: Any, path: str) -> Any:
    members = _members(hint)
    if hint is Any:
        return value
    if value is None:
        if type(None) in members:
            return None
        raise ConfigError(f"{path}=null is not allowed; give it a value of type {_name(hint)}")
    dataclass_members = [m for m in members if is_dataclass(m)]
    if dataclass_members:
        return _convert_dataclass(dataclass_members, value, path)
    member = next(m for m in members if m is not type(None))
    if typing.get_origin(member) is Literal:
        if value in typing.get_args(member):
            return value
        raise ConfigError(unknown(f"value of {path}:", value, map(str, typing.get_args(member))))
    if typing.get_origin(member) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={value!r} has no keys; write them below it, as in {path}.KEY: VALUE")
        of_value = typing.get_args(member)[1]
        return {str(k): _convert(of_value, v, f"{path}.{k}") for k, v in value.items()}
    if typing.get_origin(member) in (tuple, list):
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r} is not a list; write {path}=[1,2]")
        converted = (_convert(typing.get_args(member)[0], item, path) for item in value)
        return typing.get_origin(member)(converted)
    return _convert_scalar(member, value, path)


def _convert_dataclass(members: list[Any], value: Any, path: str) -> Any:
    """A nested section; where several kinds are possible, its key ``name`` chooses."""
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}={value!r} is not a section; set the keys inside it, as in {path}.KEY=VALUE"
        )
    chosen = members[0]
    if len(members) > 1:
        by_name = {m.name: m for m in members}
        if value.get("name") not in by_name:
            raise ConfigError(unknown(path, value.get("name"), by_name))
        chosen = by_name[value["name"]]
    return from_dict(chosen, value, path + ".")


def _convert_scalar(member: Any, value: Any, path: str) -> Any:
    if member is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif member is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif member is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif type(value) is member:
        return value
    raise ConfigError(f"{path}={value!r} is of the wrong type; give it a value of type {_name(member)}")


def _name(hint: Any) -> str:
    return " or ".join(getattr(m, "__name__", str(m)) for m in _members(hint) if m is not type(None))
