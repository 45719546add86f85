"""The weights that a new run starts with, out of a checkpoint of another one (``run.init_from``).

Weights alone: no optimizer state, no step. Blocks that are new here (``run.init_new``) keep their own initial
values, but for the projections that end their mixer and MLP: these start at zero, so that the new model
computes what the old one did. The other blocks are those of the checkpoint in their order.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.slices import Box
from sleeptrain.config import ModelConfig
from sleeptrain.model.init import ends_branch
from sleeptrain.schema import ConfigError, from_dict

_BLOCK = re.compile(r"(stack\.blocks\.|initial_memory\.)(\d+)")
_MOST_SHOWN = 20
# What gives weights of the same shape another meaning, of all models and of those with blocks of a kind.
_MEANING = ("norm_eps", "norm_placement", "zero_centred_norms", "tie_embeddings")
_OF_ATTENTION = (
    *("num_heads", "kv_heads", "attention_head_dim", "rope_theta", "rotary_dim"),
    *("attention_bias", "attention_gate", "qk_norm"),
)
_OF_MEMORY = (
    *("memory_heads", "qk_heads", "memory_key_dim", "memory_value_dim", "rule", "negative_eigenvalues"),
    *("conv_width", "memory_mlp", "memory_norm_eps"),
)


class InitialWeights:
    """``shapes`` are those of the new model's weights. Raises ConfigError with all that does not fit."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        shapes: Mapping[str, Sequence[int]],
        new: Sequence[str],
    ) -> None:
        self.checkpoint = checkpoint
        for pattern in new:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in shapes):
                raise ConfigError(f"run.init_new={pattern!r} names no weight of this model; correct it")
        inherited = [n for n in shapes if not any(fnmatch.fnmatchcase(n, pattern) for pattern in new)]
        places = _places(inherited)
        self.names = {name: _at(name, places) for name in inherited}
        _require_same_meaning(checkpoint, model)
        self._require_fitting(shapes)

    def holds(self, name: str) -> bool:
        """Whether the weight comes from the checkpoint."""
        return name in self.names

    def is_zero(self, name: str) -> bool:
        """Whether the weight is new and ends a mixer or an MLP, which add nothing at first."""
        return name not in self.names and ends_branch(name)

    def read(self, name: str, box: Box | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """As ``Checkpoint.read``, by the name that the weight has here."""
        return self.checkpoint.read("model", self.names[name], box, start, stop)

    def _require_fitting(self, shapes: Mapping[str, Sequence[int]]) -> None:
        saved = set(self.checkpoint.names("model"))
        missing = sorted(name for name, there in self.names.items() if there not in saved)
        unexpected = sorted(saved - set(self.names.values()))
        misshapen = [
            f"{name}: {list(self.checkpoint.shape('model', there))} there, {list(shapes[name])} here"
            for name, there in self.names.items()
            if there in saved and self.checkpoint.shape("model", there) != tuple(shapes[name])
        ]
        found = (
            (missing, "missing there"),
            (unexpected, "not known here"),
            (misshapen, "of another shape"),
        )
        told = [f"{len(names)} {what} ({_listed(names)})" for names, what in found if names]
        if told:
            raise ConfigError(
                f"run.init_from={self.checkpoint.path} does not fit this model: {'; '.join(told)}; change "
                "model.*, or name what shall keep its own initial values in run.init_new"
            )


def _places(names: Sequence[str]) -> dict[str, str]:
    """Of each block that is inherited, by its number here, its number there: new ones are not counted."""
    numbers = sorted({int(match[2]) for name in names if (match := _BLOCK.match(name))})
    return {str(here): str(there) for there, here in enumerate(numbers)}


def _at(name: str, places: Mapping[str, str]) -> str:
    return _BLOCK.sub(lambda match: match[1] + places[match[2]], name, count=1)


def _require_same_meaning(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """The checkpoint's weights must be computed with as they were."""
    saved = from_dict(ModelConfig, checkpoint.documents["config"]["model"], "model.")
    kinds = {block.is_fast_weight for block in saved.blocks}
    names = _MEANING + (_OF_ATTENTION if False in kinds else ()) + (_OF_MEMORY if True in kinds else ())
    changed = [
        f"{name} was {_value(saved, name)}, is {_value(model, name)}"
        for name in names
        if _value(saved, name) != _value(model, name)
    ]
    if changed:
        raise ConfigError(
            f"run.init_from={checkpoint.path} gives its weights another meaning: {'; '.join(changed)}; set "
            "model.* as it was there"
        )


def _value(model: ModelConfig, name: str) -> Any:
    value = getattr(model, name)
    return model.norm_eps if name == "memory_norm_eps" and value is None else value


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
