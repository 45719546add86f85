"""A folder held against its own config.json: which tensor is which weight, and every name accounted for."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from sleeptrain.checkpoint.huggingface.families import Family, family_of, model_config, pairs_of
from sleeptrain.checkpoint.huggingface.fields import Fields
from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.pairs import Pair, Shape
from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.model.sleep import SleepModel
from sleeptrain.schema import ConfigError

HEAD = "lm_head.weight"
_MOST_SHOWN = 20


class Described(NamedTuple):
    """What a config.json says: ``sleep`` are the settings of the sleep loop that it has, or implies."""

    family: Family
    model: ModelConfig
    sleep: dict[str, Any]


class Mapped(NamedTuple):
    """``names``: what a tensor is called in the folder. ``kept`` and ``left_out``: tensors that are no weight
    here, by the names that they have there. ``shapes``: of our weights."""

    described: "Described"
    pairs: list[Pair]
    names: dict[str, str]
    kept: list[str]
    left_out: list[str]
    shapes: dict[str, Shape]

    @property
    def num_parameters(self) -> int:
        """Of ours alone."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def read_config(config: dict[str, Any], where: str, has_head: bool) -> Described:
    """What a config.json describes; ``has_head``: whether a head of its own lies beside it. Raises
    ConfigError where it describes nothing that is known here."""
    fields = Fields(config, where)
    try:
        family, section = family_of(fields)
        is_tied = bool(fields.get("tie_word_embeddings", not has_head))
        return Described(family, model_config(family, section, is_tied), family.sleep(section))
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{where}/config.json is malformed ({error}); give a complete one") from error


def map_folder(folder: Folder) -> Mapped:
    """Raises ConfigError with all that is missing, unexpected or of another shape."""
    described = read_config(folder.config, str(folder.path), HEAD in folder.tensors)
    family, model, sleep = described
    renamed = {_renamed(family, name): name for name in folder.tensors}
    shapes = weight_shapes(model, bool(sleep.get("learned_initial_state")))
    pairs = pairs_of(family, model, shapes)
    names = {name: renamed.pop(name, name) for pair in pairs for name in pair.theirs}
    kept = _taken(renamed, family.kept)
    may_repeat = model.tie_embeddings and family.mixer is not None
    left_out = _taken(renamed, family.left_out + ((HEAD,) if may_repeat else ()))
    if model.tie_embeddings and HEAD in left_out:
        _require_tied(folder, names["model.embed_tokens.weight"])
    problems = [("missing", sorted(name for name in names.values() if name not in folder.tensors))]
    problems.append(("unexpected", sorted(renamed.values())))
    problems.append(("of another shape", list(_misshapen(folder, pairs, names, shapes))))
    if any(found for _, found in problems):
        told = "; ".join(f"{len(found)} {what} ({_listed(found)})" for what, found in problems if found)
        raise ConfigError(f"the tensors in {folder.path} do not fit its config.json: {told}; fetch it again")
    return Mapped(described, pairs, names, kept, left_out, shapes)


def weight_shapes(model: ModelConfig, learned_initial_state: bool = False) -> dict[str, Shape]:
    """Of every weight of ours, in a vocabulary of ``model.vocab_multiple``."""
    sleep = SleepConfig(window_tokens=0, num_passes=1, learned_initial_state=learned_initial_state)
    with torch.device("meta"):
        whole = SleepModel(model, sleep, model.vocab_multiple)
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def _renamed(family: Family, name: str) -> str:
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _taken(names: dict[str, str], patterns: Iterable[str]) -> list[str]:
    """Those that one of the patterns knows, taken out of ``names``."""
    known = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return sorted(names.pop(name) for name in known)


def _misshapen(
    folder: Folder, pairs: list[Pair], names: dict[str, str], shapes: dict[str, Shape]
) -> Iterable[str]:
    for pair in pairs:
        there = [names[name] for name in pair.theirs]
        found = [folder.tensors[name].shape if name in folder.tensors else None for name in there]
        for name, shape, expected in zip(there, found, pair.their_shapes(shapes, found)):
            if shape is not None and shape != expected:
                yield f"{name}: {list(shape)}, not {list(expected)}"


def _require_tied(folder: Folder, embedding: str) -> None:
    if not torch.equal(folder.read(HEAD), folder.read(embedding)):
        raise ConfigError(
            f"{folder.path}/config.json says tie_word_embeddings=true, and {HEAD} differs from the "
            "embedding; correct one of them"
        )


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
