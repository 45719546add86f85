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
from sleeptrain.model.state import BlockState, KVCache, Ring, Tokens


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
        keys, values = self._keys(x_BTD), self._heads(self.v_proj(x_BTD))
        if state.ring is not None:
            return self._read_ring(x_BTD, keys, values, state.ring, tokens), state
        own, cache = _cache(keys, values, tokens), state.cache
        seen = own if cache is None else cache.followed_by(own)
        survivors = BlockState(caches=(seen.newest(self._band(tokens) - 1),) if tokens.keeps_cache else ())
        if not is_read:
            return None, survivors
        mask = self._mask(own, cache, tokens)
        keys = self.pointwise.rotate(keys, tokens.rotary)
        if cache is not None:
            keys = torch.cat([self._rotated(cache, tokens.rotary[0].dtype).to(keys.dtype), keys], dim=1)
        return self._mixed(x_BTD, keys, seen.values.to(keys.dtype), mask, tokens), survivors

    def ring(self, cache: KVCache, dtype: torch.dtype) -> Ring:
        """What the decoder's tokens look at and write to, which begins as a cache; ``dtype`` is that of
        positions."""
        return Ring(cache.keys, self._rotated(cache, dtype), cache.values)

    def _read_ring(self, x_BTD: Tensor, keys: Tensor, values: Tensor, ring: Ring, tokens: Tokens) -> Tensor:
        assert tokens.rings is not None
        place, mask = tokens.rings[self._band(tokens)]
        ring.write(place, keys, self.pointwise.rotate(keys, tokens.rotary), values)
        kind = keys.dtype  # another one where another device wrote the memory that is gone on with
        return self._mixed(x_BTD, ring.rotated.to(kind), ring.values.to(kind), mask.to(kind), tokens)

    def _mixed(
        self, x_BTD: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, tokens: Tokens
    ) -> Tensor:
        """What the tokens take from rotated keys and their values; ``mask`` None: plain causal attention."""
        q_BTHd = self.pointwise.rotate(self._queries(x_BTD), tokens.rotary)
        out = F.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=keys.shape[2] != q_BTHd.shape[2],
        )
        out_BTC = out.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            out_BTC = out_BTC * torch.sigmoid(self.g_proj(x_BTD))
        return self.o_proj(out_BTC)

    def _rotated(self, cache: KVCache, dtype: torch.dtype) -> Tensor:
        table = rotary_table(cache.positions, self.rotary_dim, self.theta, dtype)
        return self.pointwise.rotate(cache.keys, table)

    def _band(self, tokens: Tokens) -> int:
        return self.width_tokens or tokens.window_tokens

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.head_dim))

    def _queries(self, x_BTD: Tensor) -> Tensor:
        q_BTC = self.q_proj(x_BTD)
        return self.q_norm(self._heads(self.q_width_norm(q_BTC))).to(q_BTC.dtype)

    def _keys(self, x_BTD: Tensor) -> Tensor:
        k_BTC = self.k_proj(x_BTD)
        return self.k_norm(self._heads(self.k_width_norm(k_BTC))).to(k_BTC.dtype)

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


def _cache(keys: Tensor, values: Tensor, tokens: Tokens) -> KVCache:
    positions = tokens.positions.expand(len(keys), -1)
    valid = torch.ones_like(positions, dtype=torch.bool) if tokens.valid is None else tokens.valid
    return KVCache(keys, values, positions, valid)
