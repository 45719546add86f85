"""GSM-Infinite: grade-school problems over a graph of quantities, stretched by distractors to any length."""

from sleeptrain.tasks.gsm_infinite.task import GSMInfinite

__all__ = ["GSMInfinite"]
