"""Texts side by side are answered as each is alone, and as the training forward answers them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sleeptrain.config import TextConfig
from sleeptrain.data.batch import make_batch
from sleeptrain.harness import batches
from sleeptrain.harness.batches import Writing, after_contexts, score, write
from sleeptrain.model import sizes
from sleeptrain.session import Session
from sleeptrain.tasks import make_task

WINDOW = 8
CONTEXTS = ["What is it?", "a", "It was a dark and stormy night", "What is it?", "a"]
CONTINUATIONS = [" a bird", "", "; the rain fell in torrents", " no", "b"]


def answers(run: Path, num_rows: int) -> list[batches.Score]:
    empty, found = Session(run), {}
    contexts = [list(text.encode()) for text in CONTEXTS]
    for session, numbers in after_contexts(empty, contexts, range(len(CONTEXTS)), num_rows):
        assert len(numbers) <= num_rows
        found |= dict(zip(numbers, score(session, [list(CONTINUATIONS[n].encode()) for n in numbers])))
    return [found[n] for n in range(len(CONTEXTS))]


@pytest.mark.parametrize("num_passes", [1, 3])
def test_a_score_is_what_the_training_forward_says(run: Path, num_passes: int) -> None:
    """The log-softmax of the training forward, added over the same tokens."""
    examples = make_task(TextConfig(sequence_tokens=30)).example(seed=0, index=0)
    ids, targets = examples.ids[0].tolist(), examples.targets[0].tolist()
    session = Session(run, num_passes)
    output = session.model(make_batch(examples, WINDOW), num_passes)
    session.read(ids[:13])
    (scored,) = score(session, [targets[12:]])
    assert scored.log_probability == pytest.approx(-float(output.nll[0, 12:].sum()), rel=1e-5)
    assert not scored.is_greedy


@pytest.mark.parametrize("num_rows", [1, 2, 8])
@pytest.mark.parametrize("most_logits", [2**27, 5 * 257])
def test_side_by_side_is_what_each_is_alone(
    run: Path, num_rows: int, most_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", most_logits)
    for answer, context, continuation in zip(answers(run, num_rows), CONTEXTS, CONTINUATIONS):
        alone = Session(run)
        logits = alone.feed(context + continuation)[0].log_softmax(-1)
        begin, ids = len(context) - 1, list(continuation.encode())
        expected = sum(float(logits[begin + place, i]) for place, i in enumerate(ids))
        assert answer.log_probability == pytest.approx(expected, rel=1e-5)


def test_greedy_is_said_of_what_greedy_writing_writes(run: Path) -> None:
    session = Session(run)
    session.read(CONTEXTS[2])
    ids = [int(i) for i in session.fork([0]).generate(5)]
    others = [*ids[:3], ids[3] ^ 1, ids[4]]
    assert [s.is_greedy for s in score(session.fork([0, 0]), [ids, others])] == [True, False]


def test_a_context_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read: list[int] = []
    read = Session.read

    def counted(self: Session, tokens: Sequence[list[int]]) -> None:
        num_read.append(sum(map(len, tokens)))
        read(self, tokens)

    monkeypatch.setattr(Session, "read", counted)
    answers(run, num_rows=2)
    assert sum(num_read) == sum(map(len, set(CONTEXTS)))


def test_writing_side_by_side_ends_for_each_where_it_ends_alone(run: Path) -> None:
    texts = []
    for context in CONTEXTS[:3]:
        alone = Session(run)
        alone.read(context)
        texts.append(bytes(int(i) for i in alone.generate(12)).decode(errors="replace"))
    until = (texts[1][4], texts[2][7])
    empty, generator = Session(run), torch.Generator()
    contexts = [list(text.encode()) for text in CONTEXTS[:3]]
    ((session, numbers),) = after_contexts(empty, contexts, range(3), num_rows=3)
    written = write(session, Writing(12, until), generator)
    assert numbers == [0, 1, 2]
    for text, whole in zip(written, texts):
        first = [whole.index(stop) for stop in until if stop in whole]
        assert text == whole[: min(first, default=len(whole))]
    assert len({len(text) for text in written}) > 1


def test_writing_ends_with_the_document(run: Path) -> None:
    session = Session(run)
    session.read("a")
    with torch.no_grad():
        session.model.head.weight.zero_()  # every id is as likely: the first one is the most likely
    session._next = torch.nn.functional.one_hot(torch.tensor([256]), 257).float()
    assert write(session, Writing(5), torch.Generator()) == [""]
    session._next = torch.nn.functional.one_hot(torch.tensor([97]), 257).float()
    assert write(session, Writing(5), torch.Generator()) == ["a\0\0\0\0"]


SAID = b"the end \xe2\x82\xac of e\xe2n"


@pytest.mark.parametrize(
    ("until", "written", "num_drawn"),
    [
        (("nd",), "the e", 7),
        (("z", "€ o"), "the end ", 13),
        (("e\ufffdn",), "the end € of ", 18),
        (("\ufffd",), "the end ", 9),
        (("\n",), SAID.decode(errors="replace"), 18),
        ((), SAID.decode(errors="replace"), 18),
        (("",), "", 1),
    ],
)
def test_writing_ends_as_soon_as_a_text_has_come(
    run: Path, until: tuple[str, ...], written: str, num_drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(SAID)
    monkeypatch.setattr(batches, "choose", lambda *_: torch.tensor([next(ids)]))
    session = Session(run)
    session.read("a")
    assert write(session, Writing(len(SAID), until), torch.Generator()) == [written]
    assert len(SAID) - len(list(ids)) == num_drawn
