"""Sessions from Python and from the command line, with small models that have learned nothing."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import sleeptrain
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config import Config, ModelConfig, Rule110Config, RunConfig, SleepConfig, TextConfig
from sleeptrain.data.batch import make_batch
from sleeptrain.generate import main
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import ConfigError, RunError, to_dict
from sleeptrain.session import Session, Sleep, choose
from sleeptrain.tasks import make_task
from sleeptrain.tasks.tokenizer import make_tokenizer

WINDOW, VOCAB = 8, 257
SMALL = ModelConfig(
    d_model=16, num_heads=2, memory_heads=2, memory_key_dim=8, memory_value_dim=8, pattern="attn gdn jet gdn"
)
TEXT = Config(
    model=SMALL,
    run=RunConfig(id="tiny"),
    task=TextConfig(sequence_tokens=4 * WINDOW),
    sleep=SleepConfig(window_tokens=WINDOW, num_passes=3, schedule="predict_then_consolidate"),
)
PROMPT = "It was a dark and stormy night"  # 30 bytes: three sleeps, and six in the open window


def saved(folder: Path, config: Config = TEXT, vocab_size: int = VOCAB, step: int = 3) -> Path:
    backend = LocalBackend(config, vocab_size)
    saver = Saver(folder / "checkpoints", 1, 0)
    saver.save(step, backend.slices(), {"config": to_dict(config), "trainer": {"step": step}})
    assert saver.wait() is None
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("runs") / "tiny")


def test_the_package_offers_it() -> None:
    assert sleeptrain.Session is Session
    with pytest.raises(AttributeError, match="no attribute 'Sessions'"):
        sleeptrain.Sessions  # noqa: B018


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize("pieces", [(30,), (1,) * 30, (3, 7, 11, 9)])
def test_however_it_is_fed_the_logits_are_those_of_training(
    tmp_path: Path, eviction: str, num_passes: int, pieces: tuple[int, ...]
) -> None:
    """In float32: the loss of each token, from the training forward on the same tokens."""
    sleep = replace(TEXT.sleep, eviction=eviction, num_passes=num_passes)
    config = replace(TEXT, sleep=sleep, model=replace(SMALL, pattern="attn gdn gdn"))
    folder = saved(tmp_path / "run", config)
    task = make_task(replace(config.task, sequence_tokens=30))  # type: ignore[type-var]
    examples = task.example(seed=0, index=0)
    ids, targets = torch.from_numpy(examples.ids), torch.from_numpy(examples.targets)
    session = Session(folder, num_passes)
    logits = torch.cat([session.feed(piece) for piece in ids.split(list(pieces), dim=1)], dim=1)
    nll = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    expected = session.model(make_batch(examples, WINDOW), num_passes).nll
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_it_sleeps_by_itself_and_says_so(run: Path) -> None:
    slept: list[Sleep] = []
    session = Session(run, on_sleep=slept.append)
    session.feed(PROMPT, num_passes=2)
    session.feed("ab")
    assert [(s.num_tokens, s.num_passes) for s in slept] == [(8, 2), (16, 2), (24, 2), (32, 3)]
    assert all(s.seconds > 0 for s in slept)
    session.feed("abc")
    session.sleep()
    assert slept[-1].num_tokens == 35
    session.sleep()  # there is nothing to sleep on
    assert len(slept) == 5


def test_it_sleeps_no_longer_than_its_memory_moves(run: Path) -> None:
    slept: list[Sleep] = []
    for tolerance in (0.0, 1e9):
        Session(run, num_passes=5, tolerance=tolerance, on_sleep=slept.append).feed("x" * WINDOW)
    assert [s.num_passes for s in slept] == [5, 2]


def test_it_sleeps_no_longer_than_it_has_learned_to(run: Path, tmp_path: Path) -> None:
    config = replace(TEXT, sleep=replace(TEXT.sleep, halting="learned"))
    learned, slept = saved(tmp_path / "learned", config), []
    for threshold in (1.0, 0.2, 0.1):  # after each pass it halts with a chance of 0.12
        Session(learned, halt_threshold=threshold, on_sleep=slept.append).feed("x" * WINDOW)
    assert [s.num_passes for s in slept] == [3, 2, 1]
    with pytest.raises(ConfigError, match=r"sleep\.halting=none"):
        Session(run, halt_threshold=0.5)


def test_a_saved_memory_goes_on_bit_equal_in_another_process(run: Path, tmp_path: Path) -> None:
    session, memory = Session(run), tmp_path / "memory.safetensors"
    session.feed(PROMPT)
    session.save(memory)
    expected = session.feed("and so on and on")
    script = (
        "import sys, torch, sleeptrain; torch.set_num_threads(1)\n"
        "s = sleeptrain.Session(sys.argv[1]).load(sys.argv[2]); print(s.num_tokens)\n"
        "torch.save(s.feed('and so on and on'), sys.argv[3])"
    )
    command = [sys.executable, "-c", script, str(run), str(memory), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "30"
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_what_it_remembers_does_not_grow(tmp_path: Path, eviction: str) -> None:
    config = replace(TEXT, sleep=replace(TEXT.sleep, eviction=eviction))
    session, sizes = Session(saved(tmp_path / "run", config)), []
    for _ in range(3):
        session.read("x" * (4 * WINDOW))
        session.save(tmp_path / "memory")
        sizes.append((tmp_path / "memory").stat().st_size)
    assert max(sizes) - min(sizes) <= 16  # the count of tokens is part of it


def test_several_sequences_are_read_side_by_side(run: Path) -> None:
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    together = Session(run, num_sequences=3)
    logits = together.feed(ids)
    for row, expected in zip(ids, logits):
        torch.testing.assert_close(Session(run).feed(row)[0], expected, rtol=1e-5, atol=1e-5)
    assert [len(ids) for ids in together.generate(4)] == [3] * 4


def test_sequences_of_different_lengths_are_what_each_is_alone(run: Path, tmp_path: Path) -> None:
    texts, more = [PROMPT, "a", "one, two, three"], ["x", PROMPT, ""]
    together = Session(run, num_sequences=3)
    first = together.feed(texts)
    together.save(tmp_path / "memory")
    together = Session(run, num_sequences=3).load(tmp_path / "memory")
    second = together.feed(more)
    written = [ids.tolist() for ids in together.generate(10)]
    for row in range(3):
        alone = Session(run)
        for logits, text in ((first, texts[row]), (second, more[row])):
            torch.testing.assert_close(logits[row, : len(text)], alone.feed(text)[0], rtol=1e-5, atol=1e-5)
            assert not logits[row, len(text) :].any()
        assert [ids[row] for ids in written] == [int(ids[0]) for ids in alone.generate(10)]
    assert together.num_tokens == len(PROMPT) + 11


def test_a_fork_goes_on_by_itself(run: Path) -> None:
    session = Session(run, num_sequences=2)
    session.read([PROMPT, "a"])
    fork = session.fork([1, 0, 1])
    fork.read(["b", "", "c"])
    logits = fork.feed(["x", "y", "z"])[:, 0]
    for row, text in enumerate(("abx", f"{PROMPT}y", "acz")):
        torch.testing.assert_close(logits[row], Session(run).feed(text)[0, -1], rtol=1e-5, atol=1e-5)
    assert torch.equal(fork.next_logits, logits)
    expected = Session(run).feed(f"{PROMPT}!")[0, -1]
    torch.testing.assert_close(session.feed(["!", ""])[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_greedy_writing_is_reading_what_is_most_likely(run: Path) -> None:
    session, by_hand = Session(run), Session(run)
    session.feed(PROMPT)
    following = by_hand.feed(PROMPT)[0, -1].argmax()
    for ids in session.generate(12):
        assert ids[0] == following
        following = by_hand.feed(following[None])[0, -1].argmax()


def test_what_is_drawn_depends_on_the_seed_alone(run: Path) -> None:
    def drawn(seed: int) -> list[int]:
        session = Session(run)
        session.feed(PROMPT)
        return [int(ids[0]) for ids in session.generate(12, temperature=1.0, seed=seed)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_draws_follow_the_probabilities_within_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.1, 0.3, 0.1]])).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        ids = choose(logits, temperature, top_p, generator)
        return (torch.bincount(ids, minlength=4) / len(ids)).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.02)
    assert shares(1.0, 0.8) == pytest.approx([0.625, 0, 0.375, 0], abs=0.02)
    assert shares(1.0, 0.01) == [1, 0, 0, 0]
    assert shares(0.5, 1.0) == pytest.approx([25 / 36, 1 / 36, 9 / 36, 1 / 36], abs=0.02)
    assert shares(0.0, 1.0) == [1, 0, 0, 0]


def test_a_letter_of_several_bytes_is_written_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(run)
    ids = [torch.tensor([i]) for i in "zß€".encode()]
    monkeypatch.setattr(session, "generate", lambda *_: iter(ids))
    assert [piece for piece in session.stream(6) if piece] == ["z", "ß", "€"]


def test_bytes_that_are_no_letter_are_written_where_others_follow(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(run)
    ids = [torch.tensor([i]) for i in b"a\xe2\x82b\xe2\xe2"]
    monkeypatch.setattr(session, "generate", lambda *_: iter(ids))
    assert [piece for piece in session.stream(6) if piece] == ["a", "\ufffdb"]


def test_bytes_without_a_token_are_written_in_the_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows might make them wrong, and nothing follows."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    made.decoder = decoders.ByteFallback()
    made.save(str(tmp_path / "tokenizer.json"))
    session = Session(run)
    session.tokenizer = make_tokenizer(str(tmp_path))
    ids = [torch.tensor([i]) for i in [256, *"€ß".encode()]]
    monkeypatch.setattr(session, "generate", lambda *_: iter(ids))
    assert [piece for piece in session.stream(6) if piece] == ["a", "€ß"]


def test_it_ends_with_the_end_of_the_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(run)
    session.feed("a")
    session._next = torch.nn.functional.one_hot(torch.tensor([256]), VOCAB).float()
    assert [int(ids[0]) for ids in session.generate(9)] == [256]


def test_a_memory_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    session = Session(saved(tmp_path / "other", step=4))
    session.feed("abc")
    session.save(memory)
    with pytest.raises(RunError, match="another model, or another checkpoint of it, wrote it"):
        Session(run).load(memory)


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "foreign"])
def test_a_damaged_memory_is_refused(run: Path, tmp_path: Path, damage: str) -> None:
    memory = tmp_path / "memory"
    session = Session(run)
    session.feed("abc")
    if damage == "foreign":
        memory.write_bytes(b"no such thing" * 100)
    elif damage != "missing":
        session.save(memory)
        memory.write_bytes(memory.read_bytes()[: -100 if damage == "cut" else 0])
    with pytest.raises(RunError, match="cannot be used"):
        session.load(memory)
    assert session.num_tokens == 3


def test_what_a_session_refuses(run: Path, tmp_path: Path) -> None:
    session = Session(run)
    for wrong, sentence in (([257], "an id is not in 0..256"), ([[1], [2]], "2 sequences were given")):
        with pytest.raises(ConfigError, match=sentence):
            session.feed(wrong)
    with pytest.raises(ConfigError, match="has read nothing yet"):
        next(session.generate(1))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        Session(tmp_path)
    of_numbers = replace(TEXT, task=Rule110Config(width=8, num_strings=2, steps=1))
    bits = Session(saved(tmp_path / "bits", of_numbers, vocab_size=3))
    with pytest.raises(ConfigError, match=r"task\.name=rule110 is no text; give ids"):
        bits.feed("text")
    bits.feed([1, 0])
    with pytest.raises(ConfigError, match="use generate, which gives ids"):
        next(bits.stream(1))


def test_the_command_reads_writes_and_says_when_it_sleeps(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"checkpoint={run}", "max_tokens=10", "temperature=1.0", "num_passes=2"]
    memory = tmp_path / "memory"
    assert main([*asked, f"prompt={PROMPT}", f"save={memory}"]) == 0
    first = capsys.readouterr()
    session = Session(run, num_passes=2)
    session.feed(PROMPT)
    assert first.out == session.text(10, temperature=1.0) + "\n"
    assert first.err.count("[slept after ") == 5
    assert "[slept after 8 tokens: 2 passes, " in first.err
    assert f"[what it remembers of 40 tokens is in {memory}]" in first.err
    assert main([*asked, f"load={memory}", "seed=5"]) == 0
    assert capsys.readouterr().out == session.text(10, temperature=1.0, seed=5) + "\n"


def test_the_command_reads_standard_input_and_ids(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert main([f"checkpoint={run}", "prompt=-", "max_tokens=3"]) == 0
    by_text = capsys.readouterr().out
    ids = ",".join(map(str, PROMPT.encode()))
    assert main([f"checkpoint={run}", f"ids=[{ids}]", "max_tokens=3"]) == 0
    assert capsys.readouterr().out == by_text


@pytest.mark.parametrize("prompt", ["12", "a: b", "[x", "x=y", "null", "  "])
def test_a_prompt_is_what_it_says(run: Path, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={run}", f"prompt={prompt}", "max_tokens=3"]) == 0
    session = Session(run)
    session.feed(prompt)
    assert capsys.readouterr().out == session.text(3) + "\n"


def test_the_example_of_the_docs_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "sessions.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "text").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "Sleep(num_tokens=8, num_passes=2, seconds=" in capsys.readouterr().out
    assert (tmp_path / "memory.safetensors").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "temperature=0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "checkpoint is not given"),
        (["checkpoint=x"], "there is nothing to read"),
        (["checkpoint=x", "prompt=a", "ids=[1]"], "prompt and ids are both given"),
        (["checkpoint=x", "prompt=a", "max_tokens=-1"], "max_tokens=-1 must be at least 0"),
        (["checkpoint=x", "prompt=a"], "holds no checkpoint"),
        (["checkpoint=x", "promt=a"], "promt"),
        (["checkpoint"], "is no setting; write KEY=VALUE"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_wrong_temperature_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={run}", "prompt=a", "temperature=-1"]) == 2
    assert "temperature=-1.0 must be at least 0" in capsys.readouterr().err
