"""The network."""

from dataclasses import dataclass
from typing import Literal

from sleeptrain.config.checks import require_in, require_positive
from sleeptrain.schema import ConfigError, setting, unknown

ATTENTION_KINDS = ("attn", "swa")
FAST_WEIGHT_KINDS = ("gdn", "jet")


@dataclass(frozen=True)
class BlockSpec:
    """One block of the stack: its mixer, and the width of its attention band where it has its own."""

    kind: str
    width_tokens: int | None = None

    @property
    def is_fast_weight(self) -> bool:
        return self.kind in FAST_WEIGHT_KINDS


def parse_pattern(pattern: str) -> list[BlockSpec]:
    """``"attn gdn swa:1152 jet"`` -> block specs; raises ConfigError on a word it does not know."""
    blocks = []
    for word in pattern.split():
        kind, _, width = word.partition(":")
        if kind not in ATTENTION_KINDS + FAST_WEIGHT_KINDS:
            raise ConfigError(unknown("block in model.pattern:", word, ("attn", "swa:WIDTH", "gdn", "jet")))
        if (kind == "swa") != bool(width) or (width and not (width.isdigit() and int(width) > 0)):
            raise ConfigError(
                f"model.pattern: {word!r} is not a block; a windowed block is written swa:WIDTH_TOKENS"
            )
        blocks.append(BlockSpec(kind, int(width) if width else None))
    if not blocks:
        raise ConfigError("model.pattern is empty; write for example model.pattern='attn gdn attn gdn'")
    return blocks


@dataclass(frozen=True)
class ModelConfig:
    """The network: blocks of (norm, mixer, norm, gated MLP) around a residual stream of width d_model."""

    d_model: int = setting(64, "width of the residual stream")
    pattern: str = setting("attn gdn attn gdn", "mixers from bottom to top: attn, swa:WIDTH_TOKENS, gdn, jet")
    pattern_repeats: int = setting(1, "how often the pattern is stacked")
    prelude_blocks: int = setting(0, "blocks at the bottom that run once per window and do not loop")
    coda_blocks: int = setting(0, "blocks at the top that run once per window and do not loop")
    num_heads: int = setting(4, "query heads of an attention block")
    num_kv_heads: int | None = setting(None, "key/value heads of an attention block; null: num_heads")
    head_dim: int | None = setting(None, "size of an attention head; null: d_model / num_heads")
    memory_heads: int = setting(4, "value heads (fast-weight matrices) of a gdn or jet block")
    memory_qk_heads: int | None = setting(None, "query/key heads of a gdn or jet block; null: memory_heads")
    memory_key_dim: int = setting(16, "d_k, rows of each fast-weight matrix")
    memory_value_dim: int = setting(16, "d_v, columns of each fast-weight matrix")
    rule: Literal["gated_delta", "delta", "gated_hebbian"] = setting(
        "gated_delta", "how a fast weight is written"
    )
    memory_backend: Literal["auto", "chunked", "recurrent", "triton", "fla", "flash_qla"] = setting(
        "auto",
        "what runs the rule; auto: Triton kernels on CUDA where they can run, else chunked torch; fla and "
        "flash_qla: the kernels of others, with run.deterministic=false (docs/performance.md)",
    )
    negative_eigenvalues: bool = setting(False, "write strength 2 sigmoid instead of sigmoid")
    conv_width: int = setting(4, "taps of the short causal convolution")
    jet_reduction: int = setting(
        8, "the hidden layer that makes a jet block's kernels has d_v*heads/this channels"
    )
    mlp_dim: int | None = setting(None, "hidden width of the gated MLP; null: 8/3 d_model rounded up to 16")
    memory_mlp: bool = setting(True, "gdn and jet blocks have an MLP; false: only attention blocks have one")
    attention_bias: bool = setting(False, "biases of queries, keys and values in attention blocks")
    attention_gate: bool = setting(False, "sigmoid gate on the output of attention, before its projection")
    qk_norm: Literal["none", "head", "width"] = setting(
        "none", "RMSNorm of queries and keys in attention blocks: over each head, or over all heads at once"
    )
    rope_theta: float = setting(10000.0, "base of the rotary position frequencies")
    rotary_fraction: float = setting(1.0, "share of an attention head that rotates, its first part; 0: none")
    norm_placement: Literal["pre", "sandwich", "mixed"] = setting(
        "pre",
        "norms before mixer and MLP; in attention blocks, sandwich: after them, too; mixed: after them alone",
    )
    zero_centred_norms: bool = setting(
        False, "norms multiply by 1 + weight, and weights start at 0; but not those of fast weights"
    )
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm")
    memory_norm_eps: float | None = setting(
        None, "epsilon of the norm of what fast weights give; null: norm_eps"
    )
    dropout: float = setting(0.0, "share of each block's output that is dropped in training")
    vocab_multiple: int = setting(1, "round the vocabulary up to a multiple of this; the rest is unused")
    tie_embeddings: bool = setting(False, "the head reads out with the embedding matrix")
    init_std: float = setting(0.02, "standard deviation of initial linear weights")
    embedding_init_std: float = setting(0.02, "standard deviation of initial embeddings")

    @property
    def blocks(self) -> list[BlockSpec]:
        return parse_pattern(self.pattern) * self.pattern_repeats

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def qk_heads(self) -> int:
        return self.memory_qk_heads or self.memory_heads

    def rounded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding for a task with this vocabulary."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary_dim(self) -> int:
        """How many numbers of an attention head rotate."""
        return int(self.attention_head_dim * self.rotary_fraction)

    def has_mlp(self, spec: BlockSpec) -> bool:
        return self.memory_mlp or not spec.is_fast_weight

    def norms(self, spec: BlockSpec) -> tuple[bool, bool]:
        """Whether a block has norms before, and after, its mixer and its MLP.

        None after fast weights: they are normed by head, and a norm would blow up what a new block, whose
        output starts at zero, gives after its first steps.
        """
        if spec.is_fast_weight:
            return True, False
        return self.norm_placement != "mixed", self.norm_placement != "pre"

    @property
    def mlp_hidden(self) -> int:
        return self.mlp_dim or -(-8 * self.d_model // 3 // 16) * 16

    def __post_init__(self) -> None:
        positive = (
            "d_model",
            "pattern_repeats",
            "num_heads",
            "memory_heads",
            "memory_key_dim",
            "memory_value_dim",
        )
        require_positive("model", self, (*positive, "conv_width", "jet_reduction", "vocab_multiple"))
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        given = [
            n
            for n in ("num_kv_heads", "head_dim", "memory_qk_heads", "mlp_dim")
            if getattr(self, n) is not None
        ]
        require_positive("model", self, tuple(given))
        blocks = self.blocks
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; "
                "change one of them or set model.head_dim"
            )
        if self.attention_head_dim % 2:
            raise ConfigError(
                f"the attention head size {self.attention_head_dim} is odd; set an even model.head_dim"
            )
        require_in("model", self, ("rotary_fraction",), 0, 1)
        if self.rotary_dim % 2:
            raise ConfigError(
                f"model.rotary_fraction={self.rotary_fraction} of the attention head size "
                f"{self.attention_head_dim} is odd, and what rotates are pairs; change one of them"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_kv_heads={self.kv_heads} does not divide model.num_heads={self.num_heads}"
            )
        if self.memory_heads % self.qk_heads:
            raise ConfigError(
                f"model.memory_qk_heads={self.qk_heads} does not divide "
                f"model.memory_heads={self.memory_heads}; change one of them"
            )
        if (
            self.prelude_blocks < 0
            or self.coda_blocks < 0
            or self.prelude_blocks + self.coda_blocks >= len(blocks)
        ):
            raise ConfigError(
                f"model.prelude_blocks={self.prelude_blocks} and model.coda_blocks={self.coda_blocks} leave "
                f"no block of {len(blocks)} to loop; make them smaller"
            )

    @property
    def core_blocks(self) -> list[BlockSpec]:
        blocks = self.blocks
        return blocks[self.prelude_blocks : len(blocks) - self.coda_blocks]
