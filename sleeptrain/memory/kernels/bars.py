"""How far from the reference a kernel may be, and how the distance is measured: ||x - reference|| /
||reference||."""

import torch
from torch import Tensor

LOW = {"out": 5e-3, "last_state": 5e-3, "d_q": 8e-3, "d_k": 8e-3, "d_v": 8e-3, "d_state": 8e-3}
LOW |= {"d_log_decay": 2e-2, "d_beta": 2e-2}  # the bars of flash-linear-attention's own tests in bfloat16
BARS = {
    torch.bfloat16: LOW,
    torch.float16: {name: bar / 8 for name, bar in LOW.items()},  # it has three more bits
    torch.float32: dict.fromkeys(LOW, 1e-5),
}
LEAST_RMS = (
    1e-3  # outputs and gradients are near 1 here; what decays have all but erased has no relative error
)


def error_of(actual: Tensor | None, reference: Tensor | None) -> float:
    """Relative, in root mean squares; None counts as zero."""
    if actual is None or reference is None:
        given = reference if actual is None else actual
        return 0.0 if given is None else float(given.detach().norm())
    reference = reference.detach()
    difference, size = (actual.detach().double() - reference).norm(), reference.norm()
    return float(difference / size.clamp(min=LEAST_RMS * reference.numel() ** 0.5))
