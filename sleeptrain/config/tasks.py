"""What is trained on: a section for each task."""

import math
from dataclasses import dataclass
from typing import Literal

from sleeptrain.config.checks import require_positive
from sleeptrain.schema import ConfigError, setting

MOST_OPS = 24  # of a GSM-Infinite problem
_LEAST_CONTENTS = 1000  # so that each split, by a hash of the content, all but surely has some


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
        require_positive("task", self, ("num_strings", "steps"))
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
        require_positive("task", self, ("max_hops", "max_queries", "vocab_words"))
        if self.max_nodes < 3:
            raise ConfigError(f"task.max_nodes={self.max_nodes} is below 3; a cycle needs three nodes")
        if 2 * self.max_nodes > self.vocab_words * (self.vocab_words + 1):
            raise ConfigError(
                f"task.vocab_words={self.vocab_words} makes too few words for "
                f"task.max_nodes={self.max_nodes}; raise it"
            )


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
        require_positive("task", self, ("num_windows", "pairs_per_window", "num_queries"))
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
        require_positive("task", self, positive)
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
