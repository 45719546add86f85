"""The values of a config.json, under the names of newer and older versions of transformers."""

from typing import Any

from sleeptrain.schema import ConfigError

_MISSING = object()
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Fields:
    """Looks values up. Raises ConfigError where one is missing, or says what this program cannot compute."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """A value, ``default`` where it is absent or null."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConfigError(f"{self.where}/config.json lacks {name}; give a folder with a complete one")
        return default

    def inside(self, name: str) -> "Fields":
        """A section of its own."""
        section = self.get(name)
        if not isinstance(section, dict):
            raise ConfigError(f"{self.where}/config.json: {name} is no section; give a complete config.json")
        return Fields(section, self.where)

    def refuse(self, name: str, value: Any, reason: str) -> None:
        """Raises ConfigError for a setting that has no counterpart here."""
        raise ConfigError(f"{self.where}/config.json: {name}={value!r} cannot be imported: {reason}")

    def require(self, name: str, known: Any, reason: str) -> None:
        """``name`` must have this value, or be absent."""
        if self.get(name, known) != known:
            self.refuse(name, self.get(name), reason)

    def refuse_foreign(self) -> None:
        """What no family here has: experts, quantised weights, other activations."""
        for name in _EXPERTS:
            if self.get(name, 0):
                self.refuse(
                    name, self.get(name), "mixture-of-experts layers are not supported, dense ones are"
                )
        if self.get("quantization_config", None):
            self.refuse("quantization_config", "...", "give weights that are not quantised")
        self.require("hidden_act", "silu", "the MLPs here are SwiGLU")
        self.require("mlp_bias", False, "MLPs have no biases here")

    def rope(self) -> tuple[float, float]:
        """Base of the frequencies, and the share of a head that rotates (0 where nothing does)."""
        new, old = self.get("rope_parameters", None), self.get("rope_scaling", None) or {}
        given = new if new is not None else old
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            self.refuse("rope_type", kind, "scaled rotary positions are not supported")
        if any(isinstance(value, dict) for value in given.values()):
            self.refuse(
                "rope_parameters", "...", "positions that differ from layer to layer are not supported"
            )
        theta = given.get("rope_theta", self.get("rope_theta", None if new is not None else 10000.0))
        share = given.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        return (10000.0, 0.0) if theta is None else (float(theta), float(share))
