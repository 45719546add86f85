"""The learned local rules: ``apply`` advances a fast weight over a stretch of tokens (contract in
``rule.py``), by whichever backend ``choose`` names; and what stands around a rule in every block: the short
convolution, the gates and the gated norm, by the same choice."""

from sleeptrain.memory.convolution import convolution_tail, short_convolution
from sleeptrain.memory.dispatch import Choice, apply, choose
from sleeptrain.memory.gated_norm import gated_rms_norm
from sleeptrain.memory.gates import gates_of_logits
from sleeptrain.memory.rule import RULES, recurrent, state_dtype

__all__ = [
    "RULES",
    "Choice",
    "apply",
    "choose",
    "convolution_tail",
    "gated_rms_norm",
    "gates_of_logits",
    "recurrent",
    "short_convolution",
    "state_dtype",
]
