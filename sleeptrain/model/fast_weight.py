"""Blocks whose memory is a fast weight: projections, convolutions and gates around a rule of
``sleeptrain.memory``.

GDN block: q, k, v by linear maps, each with a static short convolution. Jet block: no convolution on q and k,
and on v one whose kernels every token computes for itself (Jet-Nemotron, arXiv 2508.15884).

Shape letters: B batch, T tokens, D model width, C channels, H value heads, K key size, V value size, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleeptrain import memory
from sleeptrain.config import ModelConfig
from sleeptrain.model.layers import Float32Linear, RMSNorm, causal_convolution, convolution_tail
from sleeptrain.model.state import BlockState, Tokens


class FastWeight(nn.Module):
    """Reads and writes the fast weights ``[B, H, K, V]``; gate logits, decays and state are at least float32.

    A pad writes nothing: its log decay and write strength are 0, and it enters convolutions as zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rule, self.backend = config.rule, config.memory_backend
        self.negative_eigenvalues = config.negative_eigenvalues
        self.num_heads = config.memory_heads  # those held here: a part of all under tensor parallelism
        self.key_dim, self.value_dim, self.conv_width = (
            config.memory_key_dim,
            config.memory_value_dim,
            config.conv_width,
        )
        keys, values = config.qk_heads * config.memory_key_dim, config.memory_heads * config.memory_value_dim
        self.q_proj = nn.Linear(config.d_model, keys, bias=False)
        self.k_proj = nn.Linear(config.d_model, keys, bias=False)
        self.v_proj = nn.Linear(config.d_model, values, bias=False)
        self.b_proj = Float32Linear(config.d_model, config.memory_heads, bias=False)
        if memory.RULES[config.rule].decays:
            self.a_proj = Float32Linear(config.d_model, config.memory_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(config.memory_heads))
            self.dt_bias = nn.Parameter(torch.empty(config.memory_heads))
        self.g_proj = nn.Linear(config.d_model, values, bias=False)
        eps = config.norm_eps if config.memory_norm_eps is None else config.memory_norm_eps
        self.o_norm = RMSNorm(config.memory_value_dim, eps)
        self.o_proj = nn.Linear(values, config.d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: BlockState, tokens: Tokens, is_read: bool = True
    ) -> tuple[Tensor | None, BlockState]:
        """Returns the mixed tokens (None where nobody reads them), and the fast weights (and convolution tail
        where it is kept) after them."""
        q, k, v, tail = self._queries_keys_values(x_BTD, state.tail, tokens, is_read or tokens.keeps_tail)
        gates = self._gates(x_BTD, tokens)
        out, written = memory.apply(
            q if is_read else None, k, v, *gates, _fast_weights(state), self.rule, self.backend
        )
        if not is_read:
            return None, BlockState(written, tail)
        gate = F.silu(self.g_proj(x_BTD)).unflatten(-1, (-1, self.value_dim))
        return self.o_proj((self.o_norm(out) * gate).flatten(2)), BlockState(written, tail)

    @property
    def tail_channels(self) -> dict[str, int]:
        """What a kept convolution tail holds, in this order: channels of queries, keys, values."""
        raise NotImplementedError

    def _queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None, tokens: Tokens, with_queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        raise NotImplementedError

    def _as_keys(self, x_BTC: Tensor, length: float = 1.0) -> Tensor:
        """Heads of this length, in at least float32."""
        x = x_BTC.unflatten(-1, (-1, self.key_dim)).to(memory.state_dtype(x_BTC.dtype))
        return x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * length)

    def _as_queries(self, x_BTC: Tensor) -> Tensor:
        """As keys, scaled by d_k^-1/2."""
        return self._as_keys(x_BTC, self.key_dim**-0.5)

    def _as_values(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.value_dim))

    def _gates(self, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Log decay and write strength ``[B, T, H]`` (method: a = exp(-exp(A_log) softplus(W_a x +
        dt_bias)))."""
        beta = torch.sigmoid(self.b_proj(x_BTD))
        log_decay = torch.zeros_like(beta)
        if memory.RULES[self.rule].decays:
            rates = F.softplus(self.a_proj(x_BTD) + self.dt_bias.to(beta.dtype))
            log_decay = -self.A_log.to(beta.dtype).exp() * rates
        if self.negative_eigenvalues:
            beta = 2 * beta
        if tokens.valid is not None:
            beta, log_decay = (g.masked_fill(~tokens.valid[..., None], 0.0) for g in (beta, log_decay))
        return log_decay, beta


class GDN(FastWeight):
    """Gated-delta-net block: static short convolutions of q, k and v (arXiv 2412.06464)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q_conv = nn.Parameter(torch.empty(self.q_proj.out_features, config.conv_width))
        self.k_conv = nn.Parameter(torch.empty(self.k_proj.out_features, config.conv_width))
        self.v_conv = nn.Parameter(torch.empty(self.v_proj.out_features, config.conv_width))

    @property
    def tail_channels(self) -> dict[str, int]:
        linears = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
        return {name: linear.out_features for name, linear in linears.items()}

    def _queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None, tokens: Tokens, with_queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        projections = [(self.k_proj, self.k_conv), (self.v_proj, self.v_conv)]
        if with_queries:
            projections.insert(0, (self.q_proj, self.q_conv))
        sizes = [len(kernels) for _, kernels in projections]
        # A tail holds the channels of queries, keys and values; where no query is asked for, it lacks theirs.
        tails = [None] * len(sizes) if tail is None else tail[..., -sum(sizes) :].split(sizes, dim=-1)
        mixed, new_tails = [], []
        for (linear, kernels), old in zip(projections, tails):
            channels = _without_pads(linear(x_BTD), tokens.valid)
            mixed.append(F.silu(causal_convolution(channels, kernels, old)))
            if tokens.keeps_tail:
                new_tails.append(convolution_tail(channels, old, tokens.valid, self.conv_width))
        new_tail = torch.cat(new_tails, dim=-1) if new_tails else None
        q = self._as_queries(mixed[0]) if with_queries else None
        return q, self._as_keys(mixed[-2]), self._as_values(mixed[-1]), new_tail


class Jet(FastWeight):
    """Jet block: kernels of v's convolution = W2 SiLU(W1 x) + bias, per token and channel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        values = self.v_proj.out_features
        self.kernel_in = nn.Linear(config.d_model, max(1, values // config.jet_reduction), bias=False)
        self.kernel_out = nn.Linear(self.kernel_in.out_features, values * config.conv_width)

    @property
    def tail_channels(self) -> dict[str, int]:
        return {"v": self.v_proj.out_features}

    def _queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None, tokens: Tokens, with_queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        channels = _without_pads(self.v_proj(x_BTD), tokens.valid)
        kernels = self.kernel_out(F.silu(self.kernel_in(x_BTD))).unflatten(-1, (-1, self.conv_width))
        v = F.silu(causal_convolution(channels, kernels, tail))
        new_tail = (
            convolution_tail(channels, tail, tokens.valid, self.conv_width) if tokens.keeps_tail else None
        )
        q = self._as_queries(F.silu(self.q_proj(x_BTD))) if with_queries else None
        return q, self._as_keys(F.silu(self.k_proj(x_BTD))), self._as_values(v), new_tail


def _without_pads(x_BTC: Tensor, valid: Tensor | None) -> Tensor:
    return x_BTC if valid is None else x_BTC.masked_fill(~valid[..., None], 0.0)


def _fast_weights(state: BlockState) -> Tensor:
    if state.memory is None:
        raise ValueError("a fast-weight block got a state without memory; start from initial_state")
    return state.memory
