"""Causal attention over a window, and over the keys and values that survived from before it.

Keys are stored unrotated, with positions relative to the current window (negative for older tokens), so that
sessions of any length stay exact. Shape letters: B batch, T tokens of this call, S stored tokens, H query
heads, G key/value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleeptrain.config import BlockSpec, ModelConfig
from sleeptrain.model.layers import RMSNorm, rotary_table
from sleeptrain.model.pointwise import UsesPointwise
from sleeptrain.model.state import BlockState, KVCache, Tokens


class Attention(UsesPointwise):
    """Grouped-query attention inside a band of ``width`` tokens: its own width (``swa``), else the window's
    L."""

    def __init__(self, config: ModelConfig, spec: BlockSpec) -> None:
        super().__init__()
        self.width_tokens, self.theta = spec.width_tokens, config.rope_theta
        self.head_dim, self.rotary_dim = config.attention_head_dim, config.rotary_dim
        query, key_value = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.d_model, key_value, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.d_model, key_value, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.d_model, bias=False)
        self.g_proj = nn.Linear(config.d_model, query, bias=False) if config.attention_gate else None

        def norm(kind: str, size: int) -> nn.Module:
            if config.qk_norm != kind:
                return nn.Identity()
            return RMSNorm(size, config.norm_eps, config.zero_centred_norms)

        self.q_width_norm, self.k_width_norm = norm("width", query), norm("width", key_value)
        self.q_norm, self.k_norm = norm("head", self.head_dim), norm("head", self.head_dim)

    def forward(
        self, x_BTD: Tensor, state: BlockState, tokens: Tokens, is_read: bool = True
    ) -> tuple[Tensor | None, BlockState]:
        """Returns the mixed tokens (None where nobody reads them) and, where it is kept, the cache as the
        next tokens will see it."""
        own, cache = self._keys_and_values(x_BTD, tokens), state.cache
        seen = own if cache is None else cache.followed_by(own)
        survivors = BlockState(caches=(self._survivors(seen, tokens),) if tokens.keeps_cache else ())
        if not is_read:
            return None, survivors
        q_BTHd = self.pointwise.rotate(self._queries(x_BTD), tokens.rotary)
        mask = self._mask(own, cache, tokens)
        keys = self.pointwise.rotate(own.keys, tokens.rotary)
        if cache is not None:
            table = rotary_table(cache.positions, self.rotary_dim, self.theta, tokens.rotary[0].dtype)
            keys = torch.cat([self.pointwise.rotate(cache.keys, table).to(keys.dtype), keys], dim=1)
        out = F.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2),
            keys.transpose(1, 2),
            seen.values.to(keys.dtype).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=own.keys.shape[2] != q_BTHd.shape[2],
        )
        out_BTC = out.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            out_BTC = out_BTC * torch.sigmoid(self.g_proj(x_BTD))
        return self.o_proj(out_BTC), survivors

    def _band(self, tokens: Tokens) -> int:
        return self.width_tokens or tokens.window_tokens

    def _survivors(self, seen: KVCache, tokens: Tokens) -> KVCache:
        """What the next token will look at."""
        return seen.without_oldest() if tokens.is_compact else seen.newest(self._band(tokens) - 1)

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.head_dim))

    def _queries(self, x_BTD: Tensor) -> Tensor:
        q_BTC = self.q_proj(x_BTD)
        return self.q_norm(self._heads(self.q_width_norm(q_BTC))).to(q_BTC.dtype)

    def _keys(self, x_BTD: Tensor) -> Tensor:
        k_BTC = self.k_proj(x_BTD)
        return self.k_norm(self._heads(self.k_width_norm(k_BTC))).to(k_BTC.dtype)

    def _keys_and_values(self, x_BTD: Tensor, tokens: Tokens) -> KVCache:
        positions = tokens.positions.expand(len(x_BTD), -1)
        valid = torch.ones_like(positions, dtype=torch.bool) if tokens.valid is None else tokens.valid
        return KVCache(self._keys(x_BTD), self._heads(self.v_proj(x_BTD)), positions, valid)

    def _mask(self, own: KVCache, cache: KVCache | None, tokens: Tokens) -> Tensor | None:
        """``[B, 1, T, S + T]``, True where a query may look; None: plain causal attention is exactly that."""
        num_tokens = own.positions.shape[1]
        if cache is None and tokens.valid is None and num_tokens <= self._band(tokens):
            return None
        positions, valid = own.positions, own.valid
        if cache is not None:
            positions = torch.cat([cache.positions, positions], dim=1)
            valid = torch.cat([cache.valid, valid], dim=1)
        distance = own.positions[:, :, None] - positions[:, None, :]
        mask = (distance >= 0) & (distance < self._band(tokens)) & valid[:, None, :]
        # A pad looks at itself, so that no row of the softmax is empty; nothing reads what it computes.
        own_part = mask[..., mask.shape[-1] - num_tokens :]
        own_part |= torch.eye(num_tokens, dtype=torch.bool, device=mask.device)
        return mask[:, None]
