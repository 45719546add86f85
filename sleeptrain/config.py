"""Every setting of a run, what it means, and the checks between settings. Imports no torch.

Each section is a frozen dataclass; Hydra composes the values (``configs/``), ``Config`` checks them, and the
result is frozen as ``config.yaml`` in the run folder. A check raises ConfigError with the setting, its value
and the remedy.

Over 400 lines because a user finds every setting here, each with its sentence.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

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
    memory_backend: Literal["auto", "chunked", "recurrent", "triton"] = setting(
        "auto", "what runs the rule; auto: Triton kernels on CUDA where they can run, else chunked torch"
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
        _require_positive("model", self, (*positive, "conv_width", "jet_reduction", "vocab_multiple"))
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        given = [
            n
            for n in ("num_kv_heads", "head_dim", "memory_qk_heads", "mlp_dim")
            if getattr(self, n) is not None
        ]
        _require_positive("model", self, tuple(given))
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
        _require_in("model", self, ("rotary_fraction",), 0, 1)
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


@dataclass(frozen=True)
class SleepConfig:
    """When and how often the model passes over a window (method: paper section 3)."""

    window_tokens: int = setting(
        24, "L, tokens read before the model sleeps; 0: the whole sequence is one window"
    )
    num_passes: int = setting(
        2, "N, passes over a window in training, reading included; 1 is the plain hybrid"
    )
    passes_schedule: Literal["fixed", "growing", "sampled"] = setting("fixed", "N over training steps")
    min_passes: int = setting(1, "smallest N of a growing or sampled schedule")
    growth_fraction: float = setting(0.5, "part of training after which a growing N has reached num_passes")
    schedule: Literal["consolidate_or_predict", "predict_then_consolidate"] = setting(
        "consolidate_or_predict",
        "a window either sleeps or predicts, or (text) predicts in pass 1 and then sleeps",
    )
    eviction: Literal["hard", "sliding"] = setting(
        "hard", "at a window's end: clear the KV cache, or keep L-1 tokens"
    )
    sliding_kv: Literal["last_pass", "per_pass"] = setting(
        "last_pass", "the passes whose keys and values survive"
    )
    convolution: Literal["auto", "reset", "carried"] = setting(
        "auto", "convolution tail across windows; auto: reset with hard, carried with sliding eviction"
    )
    norm_between_passes: bool = setting(
        False, "apply the model's final norm to h between two passes (as Ouro loops)"
    )
    backprop_passes: int = setting(
        0, "backpropagate through the last k passes of a window only; 0: through all"
    )
    detach_state: bool = setting(False, "stop the gradient of the fast weights at window borders")
    learned_initial_state: bool = setting(False, "learn the fast weights that a sequence starts with")
    halting: Literal["none", "learned"] = setting(
        "none",
        "learned: after each pass of sleep a sequence halts with a chance that it learns, and what it "
        "remembers is the mean over the passes that may be its last",
    )
    halting_cost: float = setting(
        0.01, "learned halting: nats that each expected pass beyond reading adds to the loss of a sequence"
    )
    carry_between_batches: bool = setting(
        False,
        "row r of a batch goes on with the state (detached) that row r of the batch before left, unless a "
        "document starts there",
    )
    activation_checkpointing: Literal["none", "pass", "block", "both"] = setting(
        "none", "recompute activations in the backward pass, per pass, per block, or both nested"
    )

    @property
    def carries_convolution(self) -> bool:
        return self.convolution == "carried" or (self.convolution == "auto" and self.eviction == "sliding")

    def __post_init__(self) -> None:
        if self.num_passes < 1:
            raise ConfigError(
                f"sleep.num_passes={self.num_passes} is below 1; reading a window is already pass 1"
            )
        if not 1 <= self.min_passes <= self.num_passes:
            raise ConfigError(
                f"sleep.min_passes={self.min_passes} must lie in 1..{self.num_passes} (sleep.num_passes)"
            )
        _require_in("sleep", self, ("window_tokens", "backprop_passes", "halting_cost"), 0)
        _require_in("sleep", self, ("growth_fraction",), 0, 1)
        if self.halting == "learned":
            self._check_halting()

    def _check_halting(self) -> None:
        """Passes to leave out, a mixture of fast weights alone, and gradients that reach every pass."""
        refused = (
            (self.num_passes == 1, "num_passes=1", "there is no pass to leave out; raise it"),
            (self.eviction == "sliding", "eviction=sliding", "keys of passes do not mix; use eviction=hard"),
            (self.carries_convolution, "convolution=carried", "tails of passes do not mix; use reset"),
            (self.backprop_passes, f"backprop_passes={self.backprop_passes}", "every pass learns; use 0"),
            (self.detach_state, "detach_state=true", "only later windows can teach when to halt; use false"),
        )
        for is_so, setting_given, reason in refused:
            if is_so:
                raise ConfigError(f"sleep.halting=learned does not go with sleep.{setting_given}: {reason}")


@dataclass(frozen=True)
class Rule110Config:
    """Simulate a one-dimensional automaton on bit strings that were read and evicted (paper section 4.1)."""

    name: Literal["rule110"] = setting("rule110", "the task")
    width: int = setting(12, "bits of a string; one string fills one window")
    num_strings: int = setting(2, "strings of an example, and answers asked for")
    steps: int = setting(4, "t, automaton steps to simulate: the difficulty")
    rule_number: int = setting(110, "Wolfram number of the automaton, 0..255")

    @property
    def context_tokens(self) -> int:
        return self.num_strings * self.width

    @property
    def sequence_tokens(self) -> int:
        return self.context_tokens + self.num_strings

    def __post_init__(self) -> None:
        _require_positive("task", self, ("num_strings", "steps"))
        if not 3 <= self.width <= 64:
            raise ConfigError(f"task.width={self.width} must lie in 3..64")
        if not 0 <= self.rule_number <= 255:
            raise ConfigError(f"task.rule_number={self.rule_number} must lie in 0..255")


@dataclass(frozen=True)
class DepoConfig:
    """k-hop retrieval on a shuffled directed cycle (Allen-Zhu, Physics of Language Models 4.1; paper section
    4.2)."""

    name: Literal["depo"] = setting("depo", "the task")
    max_nodes: int = setting(75, "largest cycle; evaluation always uses it")
    max_hops: int = setting(16, "training asks for k = 1..this, evenly")
    vocab_words: int = setting(50, "size of the mini vocabulary of which node words of 1-2 tokens are made")
    max_queries: int = setting(10, "queries of an example, each from another start node")

    @property
    def context_tokens(self) -> int:
        return 4 * self.max_nodes

    @property
    def sequence_tokens(self) -> int:
        return self.context_tokens + 6 * min(self.max_queries, self.max_nodes)

    def __post_init__(self) -> None:
        _require_positive("task", self, ("max_hops", "max_queries", "vocab_words"))
        if self.max_nodes < 3:
            raise ConfigError(f"task.max_nodes={self.max_nodes} is below 3; a cycle needs three nodes")
        if 2 * self.max_nodes > self.vocab_words * (self.vocab_words + 1):
            raise ConfigError(
                f"task.vocab_words={self.vocab_words} makes too few words for "
                f"task.max_nodes={self.max_nodes}; raise it"
            )


MOST_OPS = 24  # of a GSM-Infinite problem
_LEAST_CONTENTS = 1000  # so that each split, by a hash of the content, all but surely has some


@dataclass(frozen=True)
class RecallConfig:
    """Recall the value of a key that was read and evicted, up to many windows ago."""

    name: Literal["recall"] = setting("recall", "the task")
    num_windows: int = setting(8, "windows of context; an answer lies 1 to this many windows back")
    pairs_per_window: int = setting(2, "pairs of a key and its value in each; set sleep.window_tokens to 2x")
    num_keys: int = setting(32, "different keys; those of an example are distinct")
    num_values: int = setting(16, "different values; chance is 1 in this many")
    num_queries: int = setting(4, "keys asked for in the last window")

    @property
    def num_pairs(self) -> int:
        return self.num_windows * self.pairs_per_window

    @property
    def context_tokens(self) -> int:
        return 2 * self.num_pairs

    @property
    def sequence_tokens(self) -> int:
        return self.context_tokens + self.num_queries

    def __post_init__(self) -> None:
        _require_positive("task", self, ("num_windows", "pairs_per_window", "num_queries"))
        if self.num_values < 2:
            raise ConfigError(f"task.num_values={self.num_values} leaves nothing to recall; use 2 or more")
        if self.num_keys < self.num_pairs:
            raise ConfigError(
                f"task.num_keys={self.num_keys} is too few for the {self.num_pairs} distinct keys of "
                f"task.num_windows={self.num_windows} and task.pairs_per_window={self.pairs_per_window}; "
                f"use task.num_keys={self.num_pairs} or more"
            )
        if self.num_queries > self.num_pairs:
            raise ConfigError(
                f"task.num_queries={self.num_queries} exceeds the {self.num_pairs} pairs of an example, each "
                f"asked for once; use task.num_queries={self.num_pairs} or fewer"
            )
        num_contents = math.comb(self.num_keys, self.num_pairs) * self.num_values**self.num_pairs
        if num_contents < _LEAST_CONTENTS:
            raise ConfigError(
                f"task.num_keys={self.num_keys} and task.num_values={self.num_values} make {num_contents} "
                f"different examples, too few to hold some out; raise one of them to reach {_LEAST_CONTENTS}"
            )


@dataclass(frozen=True)
class TextConfig:
    """Next-token prediction over a folder of text files."""

    name: Literal["text"] = setting("text", "the task")
    folder: str = setting("stdlib", "folder of text files, or 'stdlib': the source of Python's own library")
    suffixes: tuple[str, ...] = setting((".txt", ".md", ".py"), "file name endings that count as text")
    tokenizer: str = setting(
        "bytes", "'bytes', or the path of a Hugging Face tokenizer.json or of its folder"
    )
    end_token: str = setting(
        "", "token of a tokenizer.json that ends a document; empty: an id of its own, after all others"
    )
    sequence_tokens: int = setting(512, "T, tokens of an example")

    def __post_init__(self) -> None:
        if self.sequence_tokens < 2:
            raise ConfigError(
                f"task.sequence_tokens={self.sequence_tokens} is below 2; an example needs 2 tokens"
            )
        if self.end_token and self.tokenizer == "bytes":
            raise ConfigError(
                f"task.end_token={self.end_token!r} is no byte; leave it out, or give a task.tokenizer"
            )


@dataclass(frozen=True)
class GSMInfiniteConfig:
    """Grade-school problems over a graph of quantities, in a context of any length (arXiv 2502.05252; paper
    section 4.3)."""

    name: Literal["gsm_infinite"] = setting("gsm_infinite", "the task")
    kind: Literal["symbolic", "medium", "hard"] = setting(
        "medium", "variables; a story of things in places; one with averages too"
    )
    mode: Literal["forward", "reverse"] = setting(
        "forward",
        "what is asked follows from constants; reverse: a constant is asked, from what follows from it",
    )
    min_ops: int = setting(1, "training draws the operations that a problem needs from this ...")
    max_ops: int = setting(8, "... to this, evenly")
    number_range: int = setting(5, "constants are 1 to this: small ones more often, in reverse all evenly")
    num_variables: int = setting(1000, "symbolic: names that a problem draws its variables from")
    question: Literal["first", "last"] = setting("first", "the question stands before or behind the facts")
    worked_solution: bool = setting(False, "the steps of the solution have to be written before the answer")
    answer_window: Literal["shared", "own"] = setting(
        "shared", "own: the answer, with the question if that is last, has the last window alone"
    )
    answer_tokens: int = setting(128, "most tokens of a row's end: question if last, solution if any, answer")
    tokenizer: str = setting(
        "bytes", "'bytes', 'words', or the path of a Hugging Face tokenizer.json or of its folder"
    )
    end_token: str = setting(
        "", "token of a tokenizer.json that ends an answer; empty: an id of its own, after all others"
    )
    sequence_tokens: int = setting(2048, "T, tokens of an example, left-padded")
    target_tokens: int | None = setting(
        None, "distractors stretch a problem to so many tokens; null: sequence_tokens; 0: no distractors"
    )

    @property
    def context_tokens(self) -> int:
        return self.sequence_tokens - self.answer_tokens

    @property
    def filled_tokens(self) -> int:
        """What distractors stretch a problem to."""
        return self.sequence_tokens if self.target_tokens is None else self.target_tokens

    def __post_init__(self) -> None:
        positive = ("min_ops", "max_ops", "number_range", "num_variables", "answer_tokens")
        _require_positive("task", self, positive)
        if self.min_ops > self.max_ops:
            raise ConfigError(
                f"task.min_ops={self.min_ops} is above task.max_ops={self.max_ops}; lower it, or raise that"
            )
        if self.max_ops > MOST_OPS:
            raise ConfigError(
                f"task.max_ops={self.max_ops} is above {MOST_OPS}, the most that are drawn; lower it"
            )
        if self.answer_tokens >= self.sequence_tokens:
            raise ConfigError(
                f"task.answer_tokens={self.answer_tokens} leaves no room for facts in "
                f"task.sequence_tokens={self.sequence_tokens}; lower it, or raise sequence_tokens"
            )
        if self.target_tokens is not None and not 0 <= self.target_tokens <= self.sequence_tokens:
            raise ConfigError(
                f"task.target_tokens={self.target_tokens} must lie in 0..{self.sequence_tokens} "
                "(task.sequence_tokens)"
            )
        if self.end_token and self.tokenizer in ("bytes", "words"):
            raise ConfigError(
                f"task.end_token={self.end_token!r} is none of the {self.tokenizer}; leave it out, or give a "
                "task.tokenizer"
            )
        if self.kind == "symbolic":
            self._check_variables()

    def _check_variables(self) -> None:
        """No more quantities than operations, and enough different problems of the fewest operations."""
        least = max(self.max_ops, math.ceil(_LEAST_CONTENTS ** (1 / self.min_ops) / self.number_range))
        if self.num_variables < least:
            raise ConfigError(
                f"task.num_variables={self.num_variables} makes too few different problems with "
                f"task.min_ops={self.min_ops} and task.max_ops={self.max_ops}; use {least} or more, or raise "
                "task.min_ops"
            )


TaskConfig = Rule110Config | DepoConfig | RecallConfig | TextConfig | GSMInfiniteConfig


@dataclass(frozen=True)
class DataConfig:
    """Batches. Sizes are global, in sequences."""

    batch_sequences: int = setting(64, "sequences of one optimizer step")
    micro_batch_sequences: int | None = setting(
        None, "sequences of one forward/backward; null: the whole batch"
    )
    shards: tuple[str, ...] = setting(
        (), "folders or URLs of shards to train on (tools/make_shards.py); empty: the task makes its examples"
    )
    weights: tuple[float, ...] = setting((), "shares of data.shards; empty: by their numbers of samples")
    num_streams: int | None = setting(
        None, "logical streams that read the shards; replicas must divide them; null: at most 64"
    )
    num_workers: int = setting(0, "processes of each replica that make batches ahead; 0: none")
    on_bad_shard: Literal["stop", "skip"] = setting(
        "stop", "what a missing or damaged shard does: end the run, or be left out with a warning"
    )
    producer: Literal["none", "ray"] = setting(
        "none", "ray: tasks of the Ray cluster make the examples of data.shards while training reads them"
    )
    num_examples: int | None = setting(
        None, "examples that producers make; null: as many as the run reads; a multiple of data.shard_samples"
    )
    shard_samples: int = setting(256, "examples of each shard that producers make")
    num_producers: int = setting(2, "tasks that make shards at the same time")
    shards_ahead: int = setting(16, "how many shards beyond those in use are made at most")
    cache_dir: str = setting("", "folder for copies of shards from afar; empty: none are kept")
    cache_gib: float = setting(20.0, "size at which the copies unused for longest are removed")

    @property
    def streams(self) -> int:
        """By default the largest number up to 64 that divides the batch."""
        return self.num_streams or next(n for n in range(64, 0, -1) if self.batch_sequences % n == 0)

    @property
    def micro_batch(self) -> int:
        return self.micro_batch_sequences or self.batch_sequences

    def __post_init__(self) -> None:
        _require_positive("data", self, ("batch_sequences",))
        if self.micro_batch_sequences is not None:
            _require_positive("data", self, ("micro_batch_sequences",))
        if self.num_streams is not None:
            _require_positive("data", self, ("num_streams",))
        _require_in("data", self, ("num_workers", "cache_gib"), 0)
        if self.batch_sequences % self.streams:
            raise ConfigError(
                f"data.num_streams={self.streams} does not divide data.batch_sequences="
                f"{self.batch_sequences}; choose a divisor"
            )
        self._check_producer()
        if self.weights and (len(self.weights) != len(self.shards) or min(self.weights) <= 0):
            raise ConfigError(
                f"data.weights={list(self.weights)} must be a positive number for each of the "
                f"{len(self.shards)} data.shards; give as many, or leave it out"
            )
        if self.batch_sequences % self.micro_batch:
            raise ConfigError(
                f"data.micro_batch_sequences={self.micro_batch} does not divide "
                f"data.batch_sequences={self.batch_sequences}; choose a divisor"
            )

    def _check_producer(self) -> None:
        _require_positive("data", self, ("shard_samples", "num_producers", "shards_ahead"))
        if self.producer != "none" and len(self.shards) != 1:
            raise ConfigError(
                f"data.producer={self.producer} makes one set of shards, and data.shards={list(self.shards)} "
                "names another number of folders; name the one folder that they shall be in"
            )
        if self.num_examples is not None and (
            self.num_examples < 1 or self.num_examples % self.shard_samples
        ):
            raise ConfigError(
                f"data.num_examples={self.num_examples} must be a positive multiple of data.shard_samples="
                f"{self.shard_samples}, since shards hold equally many"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over processes. The result does not depend on it, but for the order of sums."""

    backend: Literal["auto", "local", "megatron_deepspeed"] = setting(
        "auto", "local: plain torch in one process; auto: that, if there is one process and nothing to split"
    )
    tensor_size: int = setting(1, "tensor-parallel degree: heads and channels of each block are split")
    pipeline_size: int = setting(1, "pipeline stages; each holds a part of prelude, core and coda")
    data_size: int | None = setting(None, "data-parallel replicas; null: as many as processes allow")
    sequence_parallel: bool = setting(False, "split tokens over the tensor ranks between blocks")
    zero_stage: Literal[0, 1, 2, 3] = setting(
        1, "ZeRO: shard optimizer state (1), and gradients (2), and weights (3) over the replicas"
    )
    offload_optimizer: bool = setting(False, "keep optimizer state in host memory (ZeRO 1 and 2)")
    weights: Literal["float32", "bfloat16"] = setting(
        "float32", "type of the weights; bfloat16 keeps float32 masters, and norms, A_log, dt_bias in float32"
    )

    @property
    def per_replica(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_size * self.pipeline_size

    @property
    def is_local(self) -> bool:
        """Whether one process of plain torch is meant."""
        degrees = (self.tensor_size, self.pipeline_size, self.data_size or 1)
        return self.backend == "local" or (self.backend == "auto" and max(degrees) == 1)

    def __post_init__(self) -> None:
        _require_positive("parallel", self, ("tensor_size", "pipeline_size"))
        if self.data_size is not None:
            _require_positive("parallel", self, ("data_size",))
        degrees = (self.tensor_size, self.pipeline_size, self.data_size or 1)
        if self.backend == "local" and max(degrees) > 1:
            raise ConfigError(
                f"parallel.backend=local is one process, and the degrees are {degrees}; "
                "use parallel.backend=auto"
            )
        if self.sequence_parallel and self.tensor_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true needs parallel.tensor_size above 1; set it, or leave it out"
            )
        if self.zero_stage == 3 and self.pipeline_size > 1:
            raise ConfigError(
                f"parallel.zero_stage=3 does not go with parallel.pipeline_size={self.pipeline_size}: each "
                "visit would gather the weights anew; use zero_stage=1 or 2, or pipeline_size=1"
            )
        for name, asked in (
            ("weights=bfloat16", self.weights == "bfloat16"),
            ("offload_optimizer=true", self.offload_optimizer),
        ):
            if asked and self.zero_stage not in (1, 2):
                raise ConfigError(
                    f"parallel.{name} needs ZeRO stage 1 or 2, and parallel.zero_stage={self.zero_stage}; "
                    "set it to 1 or 2"
                )


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the matrices of the blocks, AdamW for everything else; warm-up, stable, linear decay."""

    num_steps: int = setting(1000, "optimizer steps of the run")
    muon_lr: float = setting(0.01, "peak learning rate of Muon")
    muon_scale: Literal["original", "match_rms"] = setting(
        "match_rms", "update scale: sqrt(max(1, out/in)), or 0.2 sqrt(max(out, in)) to match AdamW's"
    )
    muon_momentum: float = setting(0.95, "Muon's Nesterov momentum")
    muon_steps: int = setting(5, "Newton-Schulz iterations")
    adamw_lr: float = setting(3e-3, "peak learning rate of AdamW")
    adamw_beta1: float = setting(0.9, "AdamW's decay of the first moment")
    adamw_beta2: float = setting(0.95, "AdamW's decay of the second moment")
    weight_decay: float = setting(1e-4, "decoupled decay of both; none on norms, A_log and dt_bias")
    frozen: tuple[str, ...] = setting(
        (),
        "patterns of weights that stay as they are, the last that fits decides; !PATTERN trains: "
        "['*','!stack.blocks.4.*'] trains one block",
    )
    scaled: tuple[str, ...] = setting(
        (), "patterns, as those of frozen, of weights whose learning rates are multiplied by scaled_factor"
    )
    scaled_factor: float = setting(0.1, "what the learning rates of scaled weights are multiplied by")
    warmup_steps: int = setting(50, "steps over which the learning rate rises from 0")
    decay_fraction: float = setting(0.3, "last part of the run over which it falls linearly to 0")
    clip_norm: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    spike_factor: float = setting(
        50.0,
        "skip an update whose gradient norm is above this many times the usual one: the median of the last "
        "100, or clip_norm where that is larger; 0: never",
    )
    max_skipped_steps: int = setting(
        10, "stop after this many skipped updates in a row: their loss or gradient not finite, or a spike"
    )

    def __post_init__(self) -> None:
        _require_positive("optim", self, ("num_steps", "max_skipped_steps"))
        rates = ("muon_lr", "adamw_lr", "weight_decay", "warmup_steps", "clip_norm", "muon_steps")
        _require_in("optim", self, (*rates, "spike_factor", "scaled_factor"), 0)
        _require_in("optim", self, ("muon_momentum", "adamw_beta1", "adamw_beta2", "decay_fraction"), 0, 1)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on the validation split."""

    every_steps: int = setting(100, "evaluate each so many steps, and at the end; 0: at the end only")
    num_examples: int = setting(512, "held-out examples per difficulty")
    batch_sequences: int = setting(256, "sequences evaluated at once")
    num_passes: tuple[int, ...] = setting((), "also evaluate with these N beside the training N")
    difficulties: tuple[int, ...] = setting((), "difficulties to evaluate; empty: the task's own list")

    def __post_init__(self) -> None:
        _require_positive("eval", self, ("num_examples", "batch_sequences"))
        _require_in("eval", self, ("every_steps",), 0)
        if any(n < 1 for n in self.num_passes):
            raise ConfigError(f"eval.num_passes={list(self.num_passes)} holds a value below 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it keeps."""

    every_steps: int = setting(200, "save each so many steps, and at the end; 0: at the end only")
    keep_last: int = setting(2, "newest checkpoints to keep")
    keep_every_steps: int = setting(0, "keep checkpoints at multiples of this for ever; 0: none")
    bucket: str = setting(
        "", "URL for copies of them, in a folder of the run's id: a run whose disk is gone goes on from there"
    )

    def __post_init__(self) -> None:
        _require_positive("checkpoint", self, ("keep_last",))
        _require_in("checkpoint", self, ("every_steps", "keep_every_steps"), 0)


@dataclass(frozen=True)
class LogConfig:
    """Metrics always go to metrics.jsonl; Weights & Biases when asked."""

    every_steps: int = setting(10, "write a row of training metrics each so many steps")
    wandb: Literal["off", "offline", "online"] = setting("off", "Weights & Biases")
    wandb_project: str = setting("sleeptrain", "its project")

    def __post_init__(self) -> None:
        _require_positive("log", self, ("every_steps",))


@dataclass(frozen=True)
class RunConfig:
    """The run's name and place, its seed, and the device."""

    id: str = setting("quickstart", "name of the run; the same id again resumes")
    dir: str = setting("runs/${run.id}", "run folder")
    seed: int = setting(0, "seed of the initial weights, the data order and a sampled N")
    init_from: str = setting(
        "", "run or checkpoint folder whose weights a new run starts with, instead of random ones"
    )
    init_new: tuple[str, ...] = setting(
        (),
        "patterns of weights that init_from lacks and that keep their own: [stack.blocks.4.*] is a new block",
    )
    max_new_fraction: float = setting(1.0, "largest share of the model's weights that init_new may name")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type over float32 weights; auto: float32 on cpu, bfloat16 on cuda"
    )
    num_threads: int = setting(
        0, "CPU threads of torch; 0: torch's choice (resume on another count is not bit-equal)"
    )
    deterministic: bool = setting(True, "deterministic algorithms only")
    check_replicas_every_steps: int = setting(
        10, "compare the bits of all replicas' weights each so many steps and before a save; 0: never"
    )
    hang_timeout_seconds: int = setting(
        600, "without progress for so long, end the run and leave the stacks of all ranks in logs/; 0: never"
    )
    allow_config_change: bool = setting(False, "resume although settings that shape the result differ")

    def __post_init__(self) -> None:
        _require_in("run", self, ("check_replicas_every_steps", "hang_timeout_seconds"), 0)
        _require_in("run", self, ("max_new_fraction",), 0, 1)
        if self.init_new and not self.init_from:
            raise ConfigError(
                f"run.init_new={list(self.init_new)} is for run.init_from, which is not given; without it "
                "all weights are new"
            )


@dataclass(frozen=True)
class ClusterConfig:
    """Who starts the processes of a run, and what is done when some of them die. No result depends on it."""

    kind: Literal["local", "local_procs", "ray", "slurm"] = setting(
        "local",
        "local: this process is the run, or torchrun started it; local_procs: torchrun on this machine; ray: "
        "workers of a Ray cluster; slurm: tasks that srun started",
    )
    num_workers: int | None = setting(
        None, "processes to start (local_procs, ray); null: one replica, or parallel.data_size of them"
    )
    min_workers: int | None = setting(
        None, "ray: go on with as few when nodes are gone, and grow again when they are back; null: never"
    )
    max_restarts: int = setting(3, "how often the processes are started again after a failure")
    resize_check_seconds: float = setting(60.0, "ray: look so often whether there is room to grow")
    resources_wait_seconds: float = setting(
        60.0,
        "ray: how long a run waits at its start for nodes that are still to join or to be made",
    )
    allow_unauthenticated: bool = setting(
        False, "ray: use a cluster that others on the network can reach without a token"
    )

    def workers(self, parallel: ParallelConfig) -> int:
        """Processes to start."""
        return self.num_workers or parallel.per_replica * (parallel.data_size or 1)

    def __post_init__(self) -> None:
        for name in ("num_workers", "min_workers"):
            if getattr(self, name) is not None:
                _require_positive("cluster", self, (name,))
        _require_in("cluster", self, ("max_restarts", "resize_check_seconds", "resources_wait_seconds"), 0)
        if self.num_workers is not None and self.kind not in ("local_procs", "ray"):
            raise ConfigError(
                f"cluster.num_workers={self.num_workers} is not for cluster.kind={self.kind}, whose "
                "processes torchrun or srun counts; leave it out, or use cluster=local_procs or cluster=ray"
            )
        if self.min_workers is not None and self.kind != "ray":
            raise ConfigError(
                f"cluster.min_workers={self.min_workers} is for cluster=ray, and cluster.kind={self.kind}; "
                "leave it out"
            )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    task: TaskConfig = field(default_factory=Rule110Config)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = setting(False, "print the model, the plan of visits and the cost over N, and stop")

    @property
    def window_tokens(self) -> int:
        return self.sleep.window_tokens or self.task.sequence_tokens

    def __post_init__(self) -> None:
        if self.sleep.window_tokens > self.task.sequence_tokens:
            raise ConfigError(
                f"sleep.window_tokens={self.sleep.window_tokens} is longer than the task's sequence of "
                f"{self.task.sequence_tokens} tokens; use at most that, or 0 for one single window"
            )
        self._check_answer_window()
        most_passes = max((self.sleep.num_passes, *self.eval.num_passes))
        if most_passes > 1 and not any(block.is_fast_weight for block in self.model.core_blocks):
            raise ConfigError(
                f"N={most_passes} passes need a fast-weight block among the looped blocks, and model.pattern="
                f"{self.model.pattern!r} has none there; add gdn or jet, or set sleep.num_passes=1 and "
                "eval.num_passes=[]"
            )
        if self.sleep.learned_initial_state and not any(block.is_fast_weight for block in self.model.blocks):
            raise ConfigError("sleep.learned_initial_state=true needs a gdn or jet block in model.pattern")
        if self.sleep.carry_between_batches:
            self._check_carry()
        if self.data.producer == "ray":
            self._check_producer_has_ray()
        self._check_workers()

    def _check_producer_has_ray(self) -> None:
        if self.cluster.kind != "ray":
            raise ConfigError(
                f"data.producer=ray makes shards in tasks of Ray, and cluster.kind={self.cluster.kind} has "
                "none; set cluster=ray, or make them before with tools/make_shards.py"
            )
        if isinstance(self.task, TextConfig):
            raise ConfigError(
                "data.producer=ray makes the examples of a task, and task=text reads documents; make their "
                "shards with tools/make_shards.py, and leave data.producer out"
            )

    def _check_workers(self) -> None:
        """The numbers of processes that a run may have are made of whole replicas."""
        most, per_replica = self.cluster.workers(self.parallel), self.parallel.per_replica
        fewest = self.cluster.min_workers
        if self.cluster.kind in ("local_procs", "ray") and most % per_replica:
            raise ConfigError(
                f"cluster.num_workers={most} is no multiple of the {per_replica} processes of a replica "
                "(parallel.tensor_size x parallel.pipeline_size); choose a multiple"
            )
        if fewest is None:
            return
        if fewest > most or fewest % per_replica:
            raise ConfigError(
                f"cluster.min_workers={fewest} must be a multiple of {per_replica} up to "
                f"cluster.num_workers={most}"
            )
        if self.parallel.data_size is not None:
            raise ConfigError(
                f"cluster.min_workers={fewest} lets the number of replicas change, and parallel.data_size="
                f"{self.parallel.data_size} fixes it; set cluster.num_workers and parallel.data_size=null"
            )

    def _check_carry(self) -> None:
        """Something must be left to carry, and rows must go on where the batch before ended."""
        is_kept = self.sleep.eviction == "sliding" or any(block.is_fast_weight for block in self.model.blocks)
        if not is_kept:
            raise ConfigError(
                "sleep.carry_between_batches=true has nothing to carry: "
                f"model.pattern={self.model.pattern!r} has no gdn or jet block, and sleep.eviction=hard "
                "keeps no keys and values; change one of them"
            )
        if not self.data.shards:
            raise ConfigError(
                "sleep.carry_between_batches=true goes on with long documents in data.shards, and this run "
                "makes its examples, which do not go on; set data.shards, or leave it out"
            )

    def _check_answer_window(self) -> None:
        """The answers of a synthetic task are in the last window, and unless they share it alone there."""
        length, task = self.sleep.window_tokens, self.task
        if not length or isinstance(task, TextConfig):
            return
        context, answers = task.context_tokens, task.sequence_tokens - task.context_tokens
        if isinstance(task, GSMInfiniteConfig) and task.answer_window == "shared":
            last = task.sequence_tokens % length or length
            if last < answers:
                raise ConfigError(
                    f"sleep.window_tokens={length} leaves {last} of the {task.sequence_tokens} tokens of "
                    f"task.sequence_tokens to the last window, which must hold task.answer_tokens={answers}; "
                    "change one of them"
                )
        elif context % length or answers > length:
            fitting = [n for n in range(answers, context + 1) if context % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - length), default=0)
            raise ConfigError(
                f"sleep.window_tokens={length} does not fit task {task.name}: {context} tokens to read, then "
                f"{answers} to answer in a window of their own; use sleep.window_tokens={nearest} or another "
                f"divisor of {context} from {answers} up"
            )


def _require_positive(section: str, config: object, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{section}.{name}={getattr(config, name)} must be at least 1")


def _require_in(
    section: str, config: object, names: tuple[str, ...], low: float, high: float | None = None
) -> None:
    for name in names:
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            allowed = f"lie in {low}..{high}" if high is not None else f"be at least {low}"
            raise ConfigError(f"{section}.{name}={value} must {allowed}")
