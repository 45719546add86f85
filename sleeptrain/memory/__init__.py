"""The learned local rules: ``apply`` advances a fast weight over a stretch of tokens (contract in
``rule.py``), by whichever backend ``choose`` names."""

from sleeptrain.memory.dispatch import Choice, apply, choose
from sleeptrain.memory.rule import RULES, recurrent, state_dtype

__all__ = ["RULES", "Choice", "apply", "choose", "recurrent", "state_dtype"]
