"""Problems for ``check.py`` of what stands around the rule: short convolution, gates, gated norm.

The reference is the plain torch form in float64 on the same rounded inputs. A problem draws its inputs by
name, bool ones for pads, and runs one form of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sleeptrain.memory.convolution import short_convolution
from sleeptrain.memory.gated_norm import gated_rms_norm
from sleeptrain.memory.gates import gates_of_logits
from sleeptrain.memory.kernels.bars import BARS, error_of

Tensors = dict[str, Tensor]
EXTREME_LOGITS = (-60.0, -15.0, -1.0, 0.0, 1.0, 15.0, 60.0)


class Convolution(NamedTuple):
    """``num_taps`` 0: no convolution; ``length`` None: heads stay as they are."""

    num_taps: int = 4
    per_token: bool = False
    has_tail: bool = False
    has_pads: bool = False
    length: float | None = None
    num_tokens: int = 130
    num_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def inputs(self, device: str) -> Tensors:
        random = torch.Generator().manual_seed(self.seed)
        shape, channels = (2, self.num_tokens), self.num_heads * self.head_dim
        found = {"x": torch.randn(*shape, channels, generator=random).to(self.dtype)}
        if self.per_token:
            taps = torch.randn(*shape, channels, self.num_taps, generator=random)
            found["taps"] = (0.5 * taps).to(self.dtype)
        elif self.num_taps:
            found["taps"] = 0.5 * torch.randn(channels, self.num_taps, generator=random)
        if self.has_tail:
            found["tail"] = torch.randn(2, self.num_taps - 1, channels, generator=random).to(self.dtype)
        if self.has_pads:
            found["valid"] = torch.rand(*shape, generator=random) < 0.7
        return {name: x.to(device) for name, x in found.items()}

    def run(self, inputs: Tensors, backend: str) -> Tensors:
        taps, tail, valid = (inputs.get(name) for name in ("taps", "tail", "valid"))
        out = short_convolution(inputs["x"], taps, tail, valid, self.head_dim, self.length, backend)
        return {"out": out}


class Gates(NamedTuple):
    """Logits are always float32 here; ``extreme`` ones mix the ends of their range."""

    num_tokens: int = 130
    num_heads: int = 3
    decays: bool = True
    has_pads: bool = False
    extreme: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def inputs(self, device: str) -> Tensors:
        random = torch.Generator().manual_seed(self.seed)
        shape = (2, self.num_tokens, self.num_heads)
        a, b = torch.randn(2, *shape, generator=random)
        if self.extreme:
            picks = torch.randint(len(EXTREME_LOGITS), (2, *shape), generator=random)
            a, b = torch.tensor(EXTREME_LOGITS)[picks]
        found = {"b": b}
        if self.decays:
            A_log, dt_bias = torch.randn(2, self.num_heads, generator=random)
            found |= {"a": a, "A_log": A_log, "dt_bias": dt_bias - 3}
        if self.has_pads:
            found["valid"] = torch.rand(*shape[:2], generator=random) < 0.7
        return {name: x.to(device) for name, x in found.items()}

    def run(self, inputs: Tensors, backend: str) -> Tensors:
        decay = (inputs["a"], inputs["A_log"], inputs["dt_bias"]) if self.decays else None
        doubled = self.seed % 2 == 1
        outputs = gates_of_logits(inputs["b"], decay, inputs.get("valid"), doubled, backend)
        return dict(zip(("log_decay", "beta"), outputs))


class GatedNorm(NamedTuple):
    num_tokens: int = 130
    num_heads: int = 3
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def inputs(self, device: str) -> Tensors:
        random = torch.Generator().manual_seed(self.seed)
        x, gate = torch.randn(2, 2, self.num_tokens, self.num_heads, self.value_dim, generator=random)
        weight = 1 + 0.3 * torch.randn(self.value_dim, generator=random)
        found = {"x": (3 * x).to(self.dtype), "gate": (3 * gate).to(self.dtype), "weight": weight}
        return {name: x.to(device) for name, x in found.items()}

    def run(self, inputs: Tensors, backend: str) -> Tensors:
        return {"out": gated_rms_norm(inputs["x"], inputs["gate"], inputs["weight"], 1e-6, backend)}


Part = Convolution | Gates | GatedNorm


def parts(num_seeds: int) -> Iterator[Part]:
    """Every form, head size and type; odd lengths, fewer tokens than taps; by seed."""
    for seed in range(num_seeds):
        for dim in (64, 96, 128, 256):
            yield Convolution(length=1.0, head_dim=dim, has_tail=True, has_pads=True, seed=seed)
            yield GatedNorm(value_dim=dim, seed=seed)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield Convolution(num_taps=8, num_tokens=257, head_dim=80, dtype=dtype, seed=seed)
            yield Convolution(per_token=True, has_tail=True, head_dim=256, dtype=dtype, seed=seed)
            yield Convolution(num_taps=0, length=0.1, has_pads=True, dtype=dtype, seed=seed)
            yield Convolution(num_tokens=2, has_tail=True, dtype=dtype, seed=seed)
            yield GatedNorm(num_tokens=1, value_dim=384, dtype=dtype, seed=seed)
        for extreme in (False, True):
            yield Gates(num_tokens=1025, num_heads=16, has_pads=True, extreme=extreme, seed=seed)
        yield Gates(num_tokens=1, decays=False, seed=seed)


def parts_of_run(num_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Iterator[Part]:
    """A few of a run's own heads, sizes and type."""
    common = {"num_heads": num_heads, "dtype": dtype, "has_tail": True, "has_pads": True}
    yield Convolution(head_dim=key_dim, length=1.0, **common)  # type: ignore[arg-type]
    yield Convolution(head_dim=value_dim, per_token=True, **common)  # type: ignore[arg-type]
    yield Gates(num_heads=num_heads, has_pads=True, extreme=True)
    yield GatedNorm(num_heads=num_heads, value_dim=value_dim, dtype=dtype)


def errors(part: Part, device: str) -> dict[str, float]:
    """Of outputs and gradients, by name."""
    inputs = part.inputs(device)
    actual = _solve(part, inputs, "triton")
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return {name: error_of(actual[name], x) for name, x in _solve(part, wide, "chunked").items()}


def _solve(part: Part, inputs: Tensors, backend: str) -> Tensors:
    """Outputs, and gradients of all inputs for random gradients of the outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    outputs = part.run(inputs | leaves, backend)
    random = torch.Generator().manual_seed(part.seed + 1000)
    pairs = [
        (x, torch.randn(x.shape, generator=random).to(x.device, part.dtype).to(x.dtype))
        for x in outputs.values()
        if x.requires_grad
    ]
    found = torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [d for _, d in pairs])
    gradients = {f"d_{name}": gradient for name, gradient in zip(leaves, found)}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def above_bar(part: Part, found: dict[str, float], margin: float = 1) -> dict[str, float]:
    """The errors that are too large, or not a number: outputs have the bar of the rule's, gradients that of
    its keys."""
    bars = BARS[part.dtype]
    return {
        name: error
        for name, error in found.items()
        if not error <= margin * bars["d_k" if name.startswith("d_") else "out"]
    }
