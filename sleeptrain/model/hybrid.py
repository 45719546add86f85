"""The stack of blocks: one pass over one window is a function ``(h, state) -> (h, state)``.

``state`` is a tuple with one BlockState per block: an explicit tree of tensors, each with the batch as first
dimension, that can be saved, moved, split and compared. Shape letters: B batch, T tokens, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sleeptrain.config import BlockSpec, ModelConfig
from sleeptrain.memory import state_dtype
from sleeptrain.model.attention import Attention
from sleeptrain.model.fast_weight import GDN, FastWeight, Jet
from sleeptrain.model.layers import GatedMLP, RMSNorm
from sleeptrain.model.state import BlockState, State, Tokens


class Block(nn.Module):
    """Residual block: h + mixer(norm(h)), then h + mlp(norm(h)), where it has one; the norms stand before
    mixer and MLP, after them, or both (``model.norm_placement``)."""

    def __init__(self, config: ModelConfig, spec: BlockSpec, index: int) -> None:
        super().__init__()
        self.index = index
        before, after = config.norms(spec)

        def norm(is_here: bool, is_cast: bool = False) -> nn.Module:
            if not is_here:
                return nn.Identity()
            return RMSNorm(config.d_model, config.norm_eps, config.zero_centred_norms, is_cast)

        self.mixer_norm = norm(before, is_cast=not spec.is_fast_weight)  # whose gates are of float32
        fast_weights: dict[str, type[FastWeight]] = {"gdn": GDN, "jet": Jet}
        self.mixer = fast_weights[spec.kind](config) if spec.is_fast_weight else Attention(config, spec)
        self.mixer_out_norm = norm(after)
        self.mlp: GatedMLP | None = None
        if config.has_mlp(spec):
            self.mlp_norm = norm(before, is_cast=True)
            self.mlp = GatedMLP(config.d_model, config.mlp_hidden)
            self.mlp_out_norm = norm(after)

    def forward(
        self, h_BTD: Tensor, state: BlockState, tokens: Tokens, is_read: bool = True
    ) -> tuple[Tensor, BlockState]:
        """Where nobody reads the output, h comes back as it came and only the state is computed."""
        mixed, state = self.mixer(self.mixer_norm(h_BTD), state, tokens, is_read)
        if mixed is None:
            return h_BTD, state
        h_BTD = h_BTD + self._dropped(self.mixer_out_norm(mixed), tokens, 2 * self.index)
        if self.mlp is None:
            return h_BTD, state
        out_BTD = self.mlp_out_norm(self.mlp(self.mlp_norm(h_BTD)))
        return h_BTD + self._dropped(out_BTD, tokens, 2 * self.index + 1), state

    def _dropped(self, x_BTD: Tensor, tokens: Tokens, place: int) -> Tensor:
        return x_BTD if tokens.dropout is None else tokens.dropout.apply(x_BTD, place)


class HybridStack(nn.Module):
    """Blocks by the pattern of the config; a stage of a pipeline has None in place of those of others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.specs = config.blocks
        blocks = nn.ModuleList(Block(config, spec, i) for i, spec in enumerate(self.specs))
        self.blocks: Sequence[Block] = blocks  # type: ignore[assignment]

    def fast_weight_mixers(self) -> list[tuple[int, FastWeight]]:
        """(block index, mixer) of each block that has fast weights."""
        here = [(i, block) for i, block in enumerate(self.blocks) if block is not None]
        return [(i, block.mixer) for i, block in here if isinstance(block.mixer, FastWeight)]

    def initial_state(self, num_sequences: int) -> State:
        """Zero fast weights, empty caches: the state before a sequence."""
        states = [BlockState()] * len(self.blocks)
        for i, mixer in self.fast_weight_mixers():
            weight = mixer.b_proj.weight
            shape = (num_sequences, mixer.num_heads, mixer.key_dim, mixer.value_dim)
            memory = torch.zeros(shape, dtype=state_dtype(weight.dtype), device=weight.device)
            states[i] = BlockState(memory=memory)
        return tuple(states)

    def forward(
        self,
        h_BTD: Tensor,
        state: State,
        tokens: Tokens,
        blocks: range,
        is_read: bool = True,
        checkpoint_blocks: bool = False,
    ) -> tuple[Tensor, State]:
        """One pass of ``blocks`` over the tokens; the state of the other blocks is returned as it came.

        Where nobody reads the output, the pass stops inside the last block that remembers anything.
        """
        new_state = list(state)
        writers = [i for i in blocks if self.remembers(i, tokens.keeps_cache)]
        last = blocks.stop if is_read else max(writers, default=blocks.start - 1) + 1
        for i in range(blocks.start, last):
            arguments = (h_BTD, new_state[i], tokens, is_read or i < last - 1)
            if checkpoint_blocks and torch.is_grad_enabled():
                h_BTD, new_state[i] = checkpoint(
                    self.blocks[i], *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                h_BTD, new_state[i] = self.blocks[i](*arguments)
        return h_BTD, tuple(new_state)

    def remembers(self, block: int, keeps_cache: bool) -> bool:
        """Whether the block leaves anything behind: fast weights always, attention where its cache
        survives."""
        return self.specs[block].is_fast_weight or keeps_cache
