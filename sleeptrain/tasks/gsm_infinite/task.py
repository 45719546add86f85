"""GSM-Infinite: grade-school problems of any number of operations in a context of any length (arXiv
2502.05252; paper section 4.3). Our own generator, from the published description."""

import hashlib
from typing import NamedTuple

import numpy as np

from sleeptrain.config import MOST_OPS, GSMInfiniteConfig
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.base import Bits, Examples, Floats, Ints, Split, Task
from sleeptrain.tasks.counter import content_hash, in_split, random_bits
from sleeptrain.tasks.gsm_infinite.draws import Draws
from sleeptrain.tasks.gsm_infinite.problem import Problem, add_distractors, draw_problem
from sleeptrain.tasks.gsm_infinite.stories import TOTALS_COUNT
from sleeptrain.tasks.gsm_infinite.wording import solution
from sleeptrain.tasks.gsm_infinite.words import WordTokenizer
from sleeptrain.tasks.tokenizer import Tokenizer, make_tokenizer

_MOST_ATTEMPTS = 100


class Row(NamedTuple):
    """The tokens of an example: what comes before the answer's window if that is its own, the rest of the
    prompt, and what is to be written, without the end marker."""

    context: Ints
    prompt: Ints
    answer: Ints
    ops: int


class GSMInfinite(Task):
    """Facts in random order, one sentence for each quantity, then the answer to one question about them.

    Operations: the additions, subtractions, multiplications and (in reverse) divisions that the answer needs,
    and the values that it reads: a quantity that is needed counts at least one, so that "A is 3" is a problem
    of one operation. Distractors are further quantities that follow from those of the solution or from each
    other; nothing needed follows from them.

    Kinds: symbolic (variables), medium (numbers of kinds of things in places, and totals that no sentence
    defines: all kinds mentioned for the place), hard (averages per thing, and totals of their products, too).
    Forward: the query follows from constants. Reverse: the value of what was the query is given, one constant
    that it hangs on by a single path is not, and is asked for; the same operations, inverted along the path.

    Loss: on what is to be written after "Answer:" (with ``worked_solution`` after "Solution:") and on the end
    marker (``end_token``, else an id after all others); each predicted from the token before. Difficulty:
    operations. Splits: the facts of the solution with the question, whatever the distractors and the order.

    A problem of 4 operations (two constants, a sum and a product) without distractors, and what is to be
    written, as bytes; 256 is the end marker:

    >>> task = GSMInfinite(GSMInfiniteConfig(max_ops=6, sequence_tokens=900, target_tokens=0))
    >>> example = task.example(seed=0, index=2, difficulty=4)
    >>> print(task.text(example.ids[example.valid]))  # doctest: +NORMALIZE_WHITESPACE
    Question: What is the number of adult lynxes in Eagle Ridge?
    Facts: A total counts all kinds that are mentioned for its place. The number of adult lynxes in Eagle
    Ridge equals 2 times the total number of adult animals in Birch Coast. The number of adult lynxes in Birch
    Coast is 1. The number of adult otters in Birch Coast is 2.
    Answer: 6
    >>> example.targets[example.loss_mask].tolist()
    [32, 54, 256]
    """

    config: GSMInfiniteConfig
    difficulty_name = "ops"

    def __init__(self, config: GSMInfiniteConfig) -> None:
        """Raises ConfigError where the settings leave no room for problems of ``max_ops``, as far as a few of
        them tell."""
        super().__init__(config)
        is_symbolic = config.kind == "symbolic"
        self._tokenizer: Tokenizer | WordTokenizer = (
            WordTokenizer(is_symbolic, config.num_variables)
            if config.tokenizer == "words"
            else make_tokenizer(config.tokenizer, config.end_token)
        )
        self.vocab_size = len(self._tokenizer.bytes_per_id)
        in_range = (ops for ops in (1, 2, 4, 6, 8) if config.min_ops <= ops <= config.max_ops)
        self.difficulties = tuple(in_range) or (config.max_ops,)
        self._most_ops = min(MOST_OPS, config.num_variables) if is_symbolic else MOST_OPS
        self.examples(0, np.arange(8), difficulty=config.max_ops)

    def examples(
        self, seed: int, indices: Ints, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        self.check_difficulty(difficulty, self.config.min_ops, self._most_ops)
        bits = random_bits(seed, f"gsm_infinite/{split}", indices, 1)[:, 0].tolist()
        rows = [self._row(Draws(b), split, difficulty) for b in bits]
        shape = (len(rows), self.sequence_tokens)
        ids, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        loss_mask, valid = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        end = self._tokenizer.end_id
        for b, row in enumerate(rows):
            tail = np.concatenate([row.prompt, row.answer])
            begin = self.sequence_tokens - len(tail)
            stop = self.config.context_tokens if self.config.answer_window == "own" else begin
            for place, part in ((begin, tail), (stop - len(row.context), row.context)):
                ids[b, place : place + len(part)] = part
                valid[b, place : place + len(part)] = True
            labels = slice(self.sequence_tokens - len(row.answer) - 1, self.sequence_tokens)
            targets[b, labels] = np.append(row.answer, end)
            loss_mask[b, labels] = True
        return Examples(ids, targets, loss_mask, valid, np.array([row.ops for row in rows], dtype=np.int64))

    def score(self, predictions: Ints, nll: Floats, examples: Examples) -> dict[str, Floats]:
        """``exact_accuracy``: whether all tokens to be written are the most likely ones, each given those
        before: greedy decoding then writes exactly them."""
        right = (predictions == examples.targets) | ~examples.loss_mask
        return {"exact_accuracy": right.all(axis=1).astype(np.float64)}

    def fingerprint(self) -> dict[str, str | int]:
        """A tokenizer counts by its content, wherever it is."""
        return super().fingerprint() | {
            "tokenizer": self._tokenizer.sha256 or self.config.tokenizer,
            "target_tokens": self.config.filled_tokens,
        }

    def text(self, ids: Ints) -> str:
        """What ids ``[n]`` stand for."""
        return self._tokenizer.decode(ids.tolist()).decode(errors="replace")

    def _row(self, draws: Draws, split: Split, difficulty: int | None) -> Row:
        """Problems are drawn until one has room. Raises ConfigError if none has."""
        config, most = self.config, self.sequence_tokens
        ops = difficulty or draws.between(config.min_ops, config.max_ops)
        for _ in range(_MOST_ATTEMPTS):
            problem = self._problem_of(draws, split, ops)
            context = self._encode(self._opening(problem))
            prompt, answer = map(self._encode, self._closing(problem))
            used = len(prompt) + len(answer)
            tail = config.answer_tokens if config.answer_window == "own" else used
            if used <= config.answer_tokens and len(context) + tail <= most:
                room = config.filled_tokens - tail
                return Row(self._stretched(draws, problem, context, room), prompt, answer, ops)
        raise ConfigError(
            f"task.sequence_tokens={most} and task.answer_tokens={config.answer_tokens} leave no room for "
            f"a problem of {ops} operations ({len(context)} tokens of facts, then {used}); raise them, or "
            "lower task.max_ops"
        )

    def _problem_of(self, draws: Draws, split: Split, ops: int) -> Problem:
        while True:
            problem = draw_problem(draws, self.config, ops)
            if in_split(_hash(problem), split)[0]:
                return problem

    def _stretched(self, draws: Draws, problem: Problem, context: Ints, room: int) -> Ints:
        """The context with distractors up to ``room`` tokens; a few are taken away again where a tokenizer
        needs more for all sentences together than for each."""
        added = add_distractors(draws, problem, self.config, room - len(context), self._count)
        if not added:
            return context
        while True:
            context = self._encode(self._opening(problem))
            if len(context) <= room or not added:
                return context
            problem.facts.remove(added.pop())

    def _opening(self, problem: Problem) -> str:
        question = f"Question: {problem.question}\n" if self.config.question == "first" else ""
        rule = "" if self.config.kind == "symbolic" else f" {TOTALS_COUNT}"
        return f"{question}Facts:{rule} {' '.join(problem.facts)}"

    def _closing(self, problem: Problem) -> tuple[str, str]:
        """The end of the prompt, and what is to be written."""
        question = f"\nQuestion: {problem.question}" if self.config.question == "last" else ""
        if self.config.worked_solution:
            steps = solution(problem.core, problem.asked)
            return f"{question}\nSolution:", f" {steps} Answer: {problem.answer}"
        return f"{question}\nAnswer:", f" {problem.answer}"

    def _encode(self, text: str) -> Ints:
        return self._tokenizer.encode(text.encode())

    def _count(self, text: str) -> int:
        return len(self._encode(text))


def _hash(problem: Problem) -> Bits:
    """Of the facts and the question, [1]."""
    content = "\n".join([problem.question, *sorted(problem.facts)]).encode()
    return content_hash(np.frombuffer(hashlib.sha256(content).digest()[:8], dtype=np.uint64))
