"""The learned local rules: ``apply`` advances a fast weight over a stretch of tokens (contract in
``rule.py``)."""

from sleeptrain.memory.chunked import chunked as apply
from sleeptrain.memory.rule import RULES, recurrent, state_dtype

__all__ = ["RULES", "apply", "recurrent", "state_dtype"]
