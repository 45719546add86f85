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
from sleeptrain.model.layers import Float32Linear, RMSNorm
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
        # Size and length of a head, for short_convolution.
        self.query_form = (self.key_dim, self.key_dim**-0.5)
        self.key_form, self.value_form = (self.key_dim, 1.0), (self.value_dim, None)
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
        self.o_norm = _GatedNorm(config.memory_value_dim, eps)
        self.o_proj = nn.Linear(values, config.d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, state: BlockState, tokens: Tokens, is_read: bool = True
    ) -> tuple[Tensor | None, BlockState]:
        """Returns the mixed tokens (None where nobody reads them), and the fast weights (and convolution tail
        where it is kept) after them."""
        gates = self._gates(x_BTD, tokens)
        q, k, v, tail = self._queries_keys_values(x_BTD, state.tail, tokens, is_read or tokens.keeps_tail)
        out, written = memory.apply(
            q if is_read else None, k, v, *gates, _fast_weights(state), self.rule, self.backend
        )
        if not is_read:
            return None, BlockState(written, tail)
        gate = self.g_proj(x_BTD).unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.o_norm(out, gate, self.backend).flatten(2)), BlockState(written, tail)

    @property
    def tail_channels(self) -> dict[str, int]:
        """What a kept convolution tail holds, in this order: channels of queries, keys, values."""
        raise NotImplementedError

    def _queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None, tokens: Tokens, with_queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        raise NotImplementedError

    def _gates(self, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Log decay and write strength ``[B, T, H]``."""
        decays = memory.RULES[self.rule].decays
        decay = (self.a_proj(x_BTD), self.A_log, self.dt_bias) if decays else None
        return memory.gates_of_logits(
            self.b_proj(x_BTD), decay, tokens.valid, self.negative_eigenvalues, self.backend
        )


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
        projections = [(self.k_proj, self.k_conv, self.key_form), (self.v_proj, self.v_conv, self.value_form)]
        if with_queries:
            projections.insert(0, (self.q_proj, self.q_conv, self.query_form))
        sizes = [len(taps) for _, taps, _ in projections]
        # A tail holds the channels of queries, keys and values; where no query is asked for, it lacks theirs.
        tails = [None] * len(sizes) if tail is None else tail[..., -sum(sizes) :].split(sizes, dim=-1)
        heads, new_tails = [], []
        for (linear, taps, form), old in zip(projections, tails):
            channels = linear(x_BTD)
            heads.append(
                memory.short_convolution(channels, taps, old, tokens.valid, *form, backend=self.backend)
            )
            if tokens.keeps_tail:
                new_tails.append(memory.convolution_tail(channels, old, tokens.valid, self.conv_width))
        new_tail = torch.cat(new_tails, dim=-1) if new_tails else None
        return heads[0] if with_queries else None, heads[-2], heads[-1], new_tail


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
        channels = self.v_proj(x_BTD)
        taps = self.kernel_out(F.silu(self.kernel_in(x_BTD))).unflatten(-1, (-1, self.conv_width))
        v = memory.short_convolution(
            channels, taps, tail, tokens.valid, *self.value_form, backend=self.backend
        )
        new_tail = None
        if tokens.keeps_tail:
            new_tail = memory.convolution_tail(channels, tail, tokens.valid, self.conv_width)
        q = self._without_convolution(self.q_proj(x_BTD), self.query_form) if with_queries else None
        return q, self._without_convolution(self.k_proj(x_BTD), self.key_form), v, new_tail

    def _without_convolution(self, x_BTC: Tensor, form: tuple[int, float]) -> Tensor:
        """A pad writes nothing and nobody reads what it reads, so it may stay."""
        return memory.short_convolution(x_BTC, None, None, None, *form, backend=self.backend)


class _GatedNorm(RMSNorm):
    """The norm of the reads, times a gate."""

    def forward(self, x: Tensor, gate: Tensor, backend: str) -> Tensor:  # type: ignore[override]
        return memory.gated_rms_norm(x, gate, self.factor, self.eps, backend)


def _fast_weights(state: BlockState) -> Tensor:
    if state.memory is None:
        raise ValueError("a fast-weight block got a state without memory; start from initial_state")
    return state.memory
