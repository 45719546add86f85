"""How large the weights of a block are, from the settings alone."""

from collections.abc import Sequence

from sleeptrain.config import BlockSpec, ModelConfig
from sleeptrain.memory import RULES

LOGITS_AT_ONCE = 2**27  # numbers; 512 MiB in float32


def tokens_at_once(num_sequences: int, vocab_size: int) -> int:
    """Tokens of each sequence whose logits are held at once. Where a loss asks for those of more, they are
    computed so many tokens at a time, and again in the backward pass."""
    return max(1, LOGITS_AT_ONCE // (num_sequences * vocab_size))


def fast_blocks(blocks: Sequence[BlockSpec]) -> list[BlockSpec]:
    return [spec for spec in blocks if spec.is_fast_weight]


def state_size(config: ModelConfig) -> int:
    return config.memory_heads * config.memory_key_dim * config.memory_value_dim


def key_channels(config: ModelConfig) -> int:
    return config.qk_heads * config.memory_key_dim


def value_channels(config: ModelConfig) -> int:
    return config.memory_heads * config.memory_value_dim


def mlp_matrices(config: ModelConfig, spec: BlockSpec) -> int:
    return 3 * config.d_model * config.mlp_hidden if config.has_mlp(spec) else 0


def block_norms(config: ModelConfig, spec: BlockSpec) -> int:
    """Weights of the norms around a mixer or an MLP."""
    return config.d_model * sum(config.norms(spec))


def jet_hidden(config: ModelConfig) -> int:
    return max(1, value_channels(config) // config.jet_reduction)


def mixer_matrices(config: ModelConfig, spec: BlockSpec) -> dict[str, int]:
    """Sizes of the weight matrices of a mixer, by the first letter of their name: a token's multiply-adds."""
    width = config.d_model
    if not spec.is_fast_weight:
        query = width * config.num_heads * config.attention_head_dim
        key = width * config.kv_heads * config.attention_head_dim
        return {"q": query, "k": key, "v": key, "o": query} | ({"g": query} if config.attention_gate else {})
    key, value = width * key_channels(config), width * value_channels(config)
    gate = width * config.memory_heads
    matrices = {"q": key, "k": key, "v": value, "b": gate, "g": value, "o": value}
    if RULES[config.rule].decays:
        matrices["a"] = gate
    if spec.kind == "jet":
        matrices["kernel"] = jet_hidden(config) * (width + value_channels(config) * config.conv_width)
    return matrices


def mixer_vectors(config: ModelConfig, spec: BlockSpec) -> int:
    """The weights of a mixer that are no matrices: kernels of convolutions, biases, gates, norm."""
    if not spec.is_fast_weight:
        query, key = (heads * config.attention_head_dim for heads in (config.num_heads, config.kv_heads))
        of_norms = {"none": 0, "head": 2 * config.attention_head_dim, "width": query + key}[config.qk_norm]
        return of_norms + (query + 2 * key if config.attention_bias else 0)
    channels = value_channels(config) + (2 * key_channels(config) if spec.kind == "gdn" else 0)
    gates = 2 * config.memory_heads if RULES[config.rule].decays else 0
    return channels * config.conv_width + gates + config.memory_value_dim
