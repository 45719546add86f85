"""Initial weights, all in one place; each depends on the seed and its own name only, not on order, device or
degree.

Linear weights N(0, init_std), embeddings N(0, embedding_init_std), norms 1 (zero-centred ones 0), biases of
attention 0; depthwise convolutions uniform within 1/sqrt(taps); A uniform in (0, 16), dt log-uniform in
[1e-3, 0.1] (method: paper section 2.2 and Mamba-2). A Jet block starts with static kernels: the output weight
of its kernel network is 0 and only its bias is drawn. Learned halting starts rare, and the same everywhere:
sigmoid(-2) = 0.12 after each pass.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from sleeptrain.config import ModelConfig

HALTING_BIAS = -2.0
_ENDS_OF_BRANCHES = ("mixer.o_proj.weight", "mlp.down_proj.weight")


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draws every parameter of ``model`` in place; those on the meta device stay empty."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(draw(name, parameter.shape, config, seed))


def ends_branch(name: str) -> bool:
    """Whether the weight gives what a mixer or an MLP adds to the residual stream: at zero, they add
    nothing."""
    return name.endswith(_ENDS_OF_BRANCHES)


def draw(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial values of one parameter, on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    kind = name.rsplit(".", 1)[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if "norm" in name:
        is_zero = config.zero_centred_norms and not name.endswith("o_norm.weight")
        return torch.zeros(shape) if is_zero else torch.ones(shape)
    if name.endswith("_proj.bias"):
        return torch.zeros(shape)
    if kind == "A_log":
        return uniform(1e-4, 16).log()
    if kind == "dt_bias":
        dt = uniform(math.log(1e-3), math.log(0.1)).exp()
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if kind.endswith("_conv"):
        bound = shape[-1] ** -0.5
        return uniform(-bound, bound)
    if name == "halting_head.bias":
        return torch.full(shape, HALTING_BIAS)
    if name.startswith(("initial_memory", "halting_head")) or name.endswith("kernel_out.weight"):
        return torch.zeros(shape)
    std = config.embedding_init_std if name == "embed.weight" else config.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
