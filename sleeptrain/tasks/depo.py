"""Depo: k-hop retrieval on a shuffled cycle (Allen-Zhu, Physics of Language Models 4.1; paper sect. 4.2)."""

import numpy as np

from sleeptrain.config import DepoConfig
from sleeptrain.tasks.base import Bits, Bools, Examples, Floats, Ints, Split, Task
from sleeptrain.tasks.counter import (
    content_hash,
    in_split,
    random_below,
    random_bits,
    random_order,
    random_uniform,
)

PAD = 0
_HOPS_TO_EVALUATE = (1, 2, 4, 8, 16)


class Depo(Task):
    """The edges of a cycle of n nodes in random order, left-padded, then queries: which node is k steps on?

    A node is a word of one or two tokens of a mini vocabulary of V; the last token of a word has its own id.
    Ids: 0 pad; 1+v token v inside a word; 1+V+v token v at a word's end; 1+2V .. 2V+max_hops the hop counts
    1..max_hops; one more, the answer marker. A query is hop count, start word, marker, answer word. The loss
    is on the marker and the answer, each predicted from the token before it.

    Training draws n from 3..max_nodes with weight 1/(n + sqrt(max_nodes)); validation and test use max_nodes.
    Difficulty: hops k; by default each query has its own, even in 1..max_hops, and the difficulty reads 0.
    Splits: the graph, whatever the order of its edges.

    With V = 5, the edges (5 6) -> (2 9), (2 9) -> (3 9), (3 9) -> (5 6), then the query "2 hops (id 12) on
    from (2 9)", the marker (id 13) and the answer (5 6):

    >>> task = Depo(DepoConfig(max_nodes=3, vocab_words=5, max_queries=1, max_hops=2))
    >>> example = task.example(seed=0, index=1)
    >>> example.ids.tolist()
    [[5, 6, 2, 9, 2, 9, 3, 9, 3, 9, 5, 6, 12, 2, 9, 13, 5, 6]]
    >>> example.targets.tolist()
    [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 13, 5, 6, 0]]
    """

    config: DepoConfig
    difficulty_name = "hops"

    def __init__(self, config: DepoConfig) -> None:
        super().__init__(config)
        self.marker = 1 + 2 * config.vocab_words + config.max_hops
        self.vocab_size = self.marker + 1
        self.difficulties = tuple(k for k in _HOPS_TO_EVALUATE if k <= config.max_hops)

    def examples(
        self, seed: int, indices: Ints, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        self.check_difficulty(difficulty, 1, self.config.max_hops)
        num_nodes = self._num_nodes(seed, indices, split)
        cycle = self._cycles(seed, indices, split, num_nodes)
        context = self._context(seed, indices, split, num_nodes, cycle)
        query_ids, query_targets = self._queries(seed, indices, split, num_nodes, cycle, difficulty)
        ids = np.concatenate([context, query_ids], axis=1)
        targets = np.concatenate([np.zeros_like(context), query_targets], axis=1)
        # no token but the pad has id 0, and no target is a pad
        return Examples(ids, targets, targets != PAD, ids != PAD, np.full(len(indices), difficulty or 0))

    def score(self, predictions: Ints, nll: Floats, examples: Examples) -> dict[str, Floats]:
        """``exact_accuracy``: fraction of the queries whose whole answer word is right, given the right
        tokens before; ``answer_nll``: nats per token of the answer words. The loss, as the paper's, also
        counts the markers, which cost next to nothing.
        """
        ids, targets = examples.ids, examples.targets
        in_answer = examples.loss_mask & (targets != self.marker)
        is_query_start = (ids > 2 * self.config.vocab_words) & (ids < self.marker)
        query = np.cumsum(is_query_start, axis=1)
        wrong = in_answer & (predictions != targets)
        failed = np.zeros((len(ids), self.sequence_tokens + 1), dtype=bool)
        rows, _ = np.nonzero(wrong)
        failed[rows, query[wrong]] = True
        return {
            "exact_accuracy": 1.0 - failed.sum(axis=1) / query[:, -1],
            "answer_nll": np.where(in_answer, nll, 0.0).sum(axis=1, dtype=np.float64) / in_answer.sum(axis=1),
        }

    def _num_nodes(self, seed: int, indices: Ints, split: Split) -> Ints:
        """n, [B]."""
        most = self.config.max_nodes
        if split != "train":
            return np.full(len(indices), most)
        weights = 1.0 / (np.arange(3, most + 1) + np.sqrt(most))
        ends = np.cumsum(weights) / weights.sum()
        draws = random_uniform(seed, f"depo/{split}/nodes", indices, 1)[:, 0]
        return 3 + np.searchsorted(ends[:-1], draws, side="right").astype(np.int64)

    def _cycles(self, seed: int, indices: Ints, split: Split, num_nodes: Ints) -> Ints:
        """Words [B, max_nodes] in the order of the cycle, the first n of each row in use.

        Graphs are drawn until one belongs to the split.
        """
        cycles = np.zeros((len(indices), self.config.max_nodes), dtype=np.int64)
        rows = np.arange(len(indices))
        attempt = 0
        while len(rows):
            stream = f"depo/{split}/graph/{attempt}"
            words = self._distinct_words(seed, f"{stream}/words", indices[rows], num_nodes[rows])
            # short words tend to be drawn early: without a shuffle, a word's length would hint at its place
            order = random_order(num_nodes[rows], seed, f"{stream}/order", indices[rows], words.shape[1])
            cycles[rows] = np.take_along_axis(words, order, axis=1)
            rows = rows[~in_split(self._hash(cycles[rows], num_nodes[rows]), split)]
            attempt += 1
        return cycles

    def _hash(self, cycles: Ints, num_nodes: Ints) -> Bits:
        """A hash of the set of edges, [B]: a sum does not depend on where the cycle starts."""
        most = self.config.max_nodes
        successors = np.take_along_axis(cycles, (np.arange(most) + 1) % num_nodes[:, None], axis=1)
        edges = content_hash(self.config.vocab_words, cycles.view(np.uint64), successors.view(np.uint64))
        edges[~_in_use(num_nodes, most)] = 0
        return content_hash(edges.sum(axis=1, dtype=np.uint64))

    def _distinct_words(self, seed: int, stream: str, indices: Ints, num_nodes: Ints) -> Ints:
        """Words [B, max_nodes], the first n of a row distinct: a word already taken is rejected.

        Word v < V is the single token v; word V + V*a + b is the tokens a, b.
        """
        vocab, most = self.config.vocab_words, self.config.max_nodes
        num_draws = 2 * most
        while True:
            draws = random_bits(seed, stream, indices, num_draws)
            last, rest = draws % vocab, draws // vocab
            words = np.where(draws >> 63, vocab * (1 + rest % vocab) + last, last).astype(np.int64)
            is_new = _is_first_occurrence(words)
            if (is_new.sum(axis=1) >= num_nodes).all():
                kept = np.argsort(~is_new, axis=1, kind="stable")[:, :most]
                return np.take_along_axis(words, kept, axis=1)
            num_draws *= 2  # the same draws and more: what was enough for a row stays as it was

    def _tokens(self, words: Ints) -> Ints:
        """Token ids of words, [..., 2]; PAD stands for the second token of a word that has one."""
        vocab = self.config.vocab_words
        is_pair = words >= vocab
        last = 1 + vocab + words % vocab
        first = np.where(is_pair, words // vocab, last)  # 1 + a, since a pair is V * (1 + a) + b
        return np.stack([first, np.where(is_pair, last, PAD)], axis=-1)

    def _context(self, seed: int, indices: Ints, split: Split, num_nodes: Ints, cycle: Ints) -> Ints:
        """Ids of the edges, [B, context_tokens], left-padded."""
        most = self.config.max_nodes
        place = random_order(num_nodes, seed, f"depo/{split}/edges", indices, most)
        edges = np.stack([place, (place + 1) % num_nodes[:, None]], axis=2).reshape(len(cycle), 2 * most)
        words = np.take_along_axis(cycle, edges, axis=1)
        tokens = self._tokens(words)
        tokens[np.repeat(~_in_use(num_nodes, most), 2, axis=1)] = PAD
        grid = tokens.reshape(len(cycle), -1)
        # a stable sort by "is a token" moves the pads to the front and keeps the tokens in order
        return np.take_along_axis(grid, np.argsort(grid != PAD, axis=1, kind="stable"), axis=1)

    def _queries(
        self, seed: int, indices: Ints, split: Split, num_nodes: Ints, cycle: Ints, hops: int | None
    ) -> tuple[Ints, Ints]:
        """Ids and next-token targets of the queries, both [B, 6 * queries], right-padded."""
        count = min(self.config.max_queries, self.config.max_nodes)
        shape = (len(indices), count)
        drawn = 1 + random_below(self.config.max_hops, seed, f"depo/{split}/hops", indices, count)
        k = drawn if hops is None else np.full(shape, hops)
        place = random_order(num_nodes, seed, f"depo/{split}/starts", indices, self.config.max_nodes)[
            :, :count
        ]
        start = self._tokens(np.take_along_axis(cycle, place, axis=1))
        answer = self._tokens(np.take_along_axis(cycle, (place + k) % num_nodes[:, None], axis=1))

        hop_ids = 2 * self.config.vocab_words + k
        marker, pad = np.full(shape, self.marker), np.full(shape, PAD)
        first_target = np.where(start[..., 1] == PAD, marker, pad)
        ids = np.stack([hop_ids, *_parts(start), marker, *_parts(answer)], axis=2)
        targets = np.stack([pad, first_target, marker, *_parts(answer), pad], axis=2)
        ids[~_in_use(num_nodes, count)] = PAD
        targets[ids == PAD] = PAD
        ids, targets = ids.reshape(len(ids), 6 * count), targets.reshape(len(ids), 6 * count)
        order = np.argsort(ids == PAD, axis=1, kind="stable")  # tokens first, in order, then pads
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(targets, order, axis=1)


def _parts(tokens: Ints) -> tuple[Ints, Ints]:
    """First and second tokens of words."""
    return tokens[..., 0], tokens[..., 1]


def _in_use(num_nodes: Ints, count: int) -> Bools:
    """[B, count]: the first n places of each row."""
    return np.arange(count) < num_nodes[:, None]


def _is_first_occurrence(values: Ints) -> Bools:
    """[B, M]: whether no earlier place of the row holds the same value."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    is_first = np.ones(values.shape, dtype=bool)
    np.put_along_axis(is_first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return is_first
