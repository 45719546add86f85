from itertools import pairwise

import numpy as np
import pytest

from sleeptrain.config import DepoConfig
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.depo import Depo

SPLITS = ("train", "validation", "test")
SMALL = DepoConfig(max_nodes=9, max_hops=5, vocab_words=5, max_queries=4)
PAPER = DepoConfig()


def items(config, ids):
    """The stream as a list of words (tuples of ids), hop counts (k) and markers ("?"), pads left out."""
    found, word = [], ()
    for token in ids:
        if token > 2 * config.vocab_words:
            k = token - 2 * config.vocab_words
            found.append(k if k <= config.max_hops else "?")
        elif token > 0:
            word += (token,)
            if token > config.vocab_words:
                found.append(word)
                word = ()
    assert word == ()
    return found


def parse(config, ids):
    """Edges {node: successor} and queries [(k, start, answer)], read off the tokens alone."""
    context = items(config, ids[: config.context_tokens])
    queries = items(config, ids[config.context_tokens :])
    assert len(context) % 2 == 0
    assert len(queries) % 4 == 0
    assert set(queries[2::4]) == {"?"}
    edges = dict(zip(context[::2], context[1::2]))
    assert len(edges) == len(context) // 2
    return edges, list(zip(queries[::4], queries[1::4], queries[3::4]))


def graph(edges):
    return frozenset(edges.items())


@pytest.mark.parametrize("config", [SMALL, PAPER, DepoConfig(max_nodes=3, vocab_words=2)])
@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_tokens(config, split) -> None:
    for ids in Depo(config).examples(2, np.arange(25), split).ids.tolist():
        edges, queries = parse(config, ids)
        assert 3 <= len(edges) <= config.max_nodes
        assert split == "train" or len(edges) == config.max_nodes
        assert len(queries) == min(config.max_queries, len(edges))
        assert len({start for _, start, _ in queries}) == len(queries)
        for k, node, answer in queries:
            assert 1 <= k <= config.max_hops
            for _ in range(k):
                node = edges[node]
            assert node == answer
        node, walked = next(iter(edges)), set()
        while node not in walked:
            walked.add(node)
            node = edges[node]
        assert walked == set(edges)  # one single cycle


def test_targets_are_the_next_tokens_of_marker_and_answer() -> None:
    task = Depo(SMALL)
    for ids, targets, loss_mask, valid, _ in zip(*task.examples(0, np.arange(60))):
        begin = SMALL.context_tokens
        assert not loss_mask[:begin].any()
        assert np.array_equal(valid, ids != 0)
        assert (np.diff(valid[:begin].astype(int)) >= 0).all()  # pads on the left of the context
        assert (np.diff(valid[begin:].astype(int)) <= 0).all()  # and on the right of the queries
        expected = np.zeros(len(ids), dtype=bool)
        in_answer = False
        for t in range(begin, len(ids)):
            if ids[t] == task.marker:
                in_answer = expected[t - 1] = expected[t] = True
            elif in_answer and ids[t] <= SMALL.vocab_words:
                expected[t] = True  # a first token of two
            else:
                in_answer = False
        assert np.array_equal(loss_mask, expected)
        places = np.flatnonzero(expected)
        assert np.array_equal(targets[places], ids[places + 1])
        assert (targets[~expected] == 0).all()


def test_vocabulary_and_length() -> None:
    task = Depo(PAPER)
    assert (task.vocab_size, task.sequence_tokens) == (118, 360)
    examples = task.examples(0, np.arange(64), "test")
    assert examples.ids.shape == (64, 360)
    assert examples.ids.max() == task.marker == 117
    assert set(np.unique(examples.ids)) == set(range(118))
    assert task.difficulties == (1, 2, 4, 8, 16)
    assert Depo(SMALL).difficulties == (1, 2, 4)


def test_guessing_evenly_among_75_nodes_costs_the_published_plateau() -> None:
    examples = Depo(PAPER).examples(0, np.arange(400), "validation")
    vocab = PAPER.vocab_words
    context = examples.ids[:, : PAPER.context_tokens]
    words = ((context > vocab) & (context <= 2 * vocab)).sum()
    mean_tokens = (context > 0).sum() / words
    assert abs(mean_tokens - 1.60) < 0.01
    assert abs(np.log(75) / (1 + mean_tokens) - 1.66) < 0.01
    assert abs(examples.loss_mask.sum(axis=1).mean() / 10 - (1 + mean_tokens)) < 0.03


def test_training_draws_small_cycles_more_often() -> None:
    task = Depo(DepoConfig(max_nodes=6))
    sizes = [len(parse(task.config, ids)[0]) for ids in task.examples(0, np.arange(4000)).ids.tolist()]
    weights = 1 / (np.arange(3, 7) + np.sqrt(6))
    assert np.allclose(np.bincount(sizes)[3:] / 4000, weights / weights.sum(), atol=0.025)


def test_hops_are_even_and_independent_of_the_graph() -> None:
    task = Depo(SMALL)
    examples = task.examples(0, np.arange(1000), "validation")
    hops = [k for ids in examples.ids.tolist() for k, _, _ in parse(SMALL, ids)[1]]
    assert np.allclose(np.bincount(hops)[1:] / len(hops), 0.2, atol=0.025)
    assert (examples.difficulty == 0).all()
    fixed = task.examples(0, np.arange(50), "validation", difficulty=3)
    assert (fixed.difficulty == 3).all()
    for before, after in zip(examples.ids.tolist(), fixed.ids.tolist()):
        assert parse(SMALL, before)[0] == parse(SMALL, after)[0]
        assert {k for k, _, _ in parse(SMALL, after)[1]} == {3}


def test_neither_edge_order_nor_word_length_hints_at_the_successor() -> None:
    examples = Depo(PAPER).examples(0, np.arange(400), "test")
    edges = [list(parse(PAPER, ids)[0].items()) for ids in examples.ids.tolist()]
    follows = [a[1] == b[0] for row in edges for a, b in pairwise(row)]
    assert abs(np.mean(follows) - 1 / 74) < 0.003
    is_pair = np.array([[[len(word) == 2 for word in edge] for edge in row] for row in edges])
    pairs = is_pair[:, :, 0].sum(axis=1)
    by_chance = pairs * (pairs - 1) / (75 * 74)  # both words of an edge have two tokens
    assert abs((is_pair.all(axis=2).mean(axis=1) - by_chance).mean()) < 0.004


def test_the_hash_of_a_graph_knows_its_edges_alone() -> None:
    task = Depo(DepoConfig(max_nodes=4))
    same, turned, other = [1, 2, 3, 0], [2, 3, 1, 77], [1, 3, 2, 0]  # the fourth place is not in use
    hashes = task._hash(np.array([same, turned, other]), np.array([3, 3, 3]))
    assert hashes[0] == hashes[1] != hashes[2]


def test_no_graph_is_in_two_splits() -> None:
    config = DepoConfig(max_nodes=3, vocab_words=2)  # 40 graphs
    task = Depo(config)
    seen = {
        split: {graph(parse(config, ids)[0]) for ids in task.examples(0, np.arange(800), split).ids.tolist()}
        for split in SPLITS
    }
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    assert len(set.union(*seen.values())) == 40
    assert len(seen["train"]) > 20


@pytest.mark.parametrize("config", [SMALL, DepoConfig(max_nodes=10, vocab_words=4)])
def test_examples_are_pure_and_do_not_depend_on_the_batch(config) -> None:
    # 10 of 20 words: some rows need more draws than others
    task, again = Depo(config), Depo(config)
    for split in SPLITS:
        batch = task.examples(7, np.arange(200), split)
        for i in (0, 57, 199):
            for part, single in zip(batch, again.example(7, i, split)):
                assert np.array_equal(part[i : i + 1], single)
    assert not np.array_equal(task.example(0, 0).ids, task.example(1, 0).ids)
    assert task.fingerprint() == again.fingerprint() != Depo(PAPER).fingerprint()


def test_score_counts_whole_answers_of_each_query() -> None:
    task = Depo(SMALL)
    examples = task.examples(0, np.arange(4), "test")
    predictions = np.where(examples.loss_mask, examples.targets, 99)
    marker_places = np.argwhere(examples.targets == task.marker)
    row1, row2 = (marker_places[marker_places[:, 0] == row][:, 1] for row in (1, 2))
    predictions[1, row1] = 0  # a wrong marker is no wrong answer
    predictions[2, row2[0] + 1] = 0  # the first answer of row 2
    predictions[3] = 0
    in_word = examples.loss_mask & (examples.targets != task.marker)
    nll = np.where(in_word, 2.0, np.where(examples.loss_mask, 7.0, np.nan))  # a marker's loss does not count
    score = task.score(predictions, nll, examples)
    assert score["exact_accuracy"].tolist() == [1, 1, 0.75, 0]
    assert score["answer_nll"].tolist() == [2, 2, 2, 2]


def test_both_tokens_of_an_answer_wrong_count_once() -> None:
    task = Depo(SMALL)
    examples = task.examples(0, np.arange(30), "test")
    predictions = np.where(examples.targets == task.marker, task.marker, 0)
    assert (task.score(predictions, np.zeros(predictions.shape), examples)["exact_accuracy"] == 0).all()


@pytest.mark.parametrize("hops", [0, 6])
def test_an_impossible_difficulty_is_refused(hops) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.difficulties holds {hops}.*hops.*1\.\.5"):
        Depo(SMALL).examples(0, np.arange(2), difficulty=hops)
