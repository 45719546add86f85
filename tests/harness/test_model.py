"""What lm-eval reports is what sessions say, end to end from its command line, without network."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval brings it; make test-more installs that")

from lm_eval.api.instance import Instance

from sleeptrain.config import GSMInfiniteConfig, Rule110Config, SleepConfig, TextConfig
from sleeptrain.harness.__main__ import main
from sleeptrain.harness.batches import Writing
from sleeptrain.harness.model import SleepingLM, writing
from sleeptrain.schema import ConfigError
from sleeptrain.session import Session

pytestmark = pytest.mark.more  # lm-eval takes seconds to import

QUESTIONS = [
    "What is it?",
    "How many are there, and why so many?",
    "Why?",
    "Where?",
    "What is it not?",
    "Who?",
]
CHOICES = ["one", "seven birds", "because", "a"]
MAX_TOKENS, STOP = 12, "G"

TASK = """\
task: local_{output_type}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}\\nAnswer:"
"""
OF_KIND = {
    "multiple_choice": """\
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
""",
    "generate_until": """\
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["G"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
""",
    "loglikelihood_rolling": """\
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
""",
}


def prompt(question: str) -> str:
    return f"{question}\nAnswer:"


def log_probability(empty: Session, context: str | list[int], text: str) -> float:
    """Of the text after the context, by one call of ``feed``."""
    ids = list(context.encode() if isinstance(context, str) else context)
    logits = empty.fork([0]).feed([*ids, *text.encode()])[0].double().log_softmax(-1)
    return sum(float(logits[len(ids) - 1 + place, i]) for place, i in enumerate(text.encode()))


def scores_of(empty: Session) -> list[list[float]]:
    return [[log_probability(empty, prompt(q), f" {choice}") for choice in CHOICES] for q in QUESTIONS]


def best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def texts_of(empty: Session) -> list[str]:
    """What it writes after each question, alone."""
    texts = []
    for question in QUESTIONS:
        session = empty.fork([0])
        session.read(prompt(question))
        written = bytes(int(i) for i in session.generate(MAX_TOKENS)).decode(errors="replace")
        texts.append(written.split(STOP)[0])
    return texts


@pytest.fixture(scope="module")
def documents(run: Path) -> list[dict[str, Any]]:
    """Half of the answers are those of three passes."""
    empty = Session(run, 3)
    scores, texts = scores_of(empty), texts_of(empty)
    return [
        {
            "question": question,
            "choices": CHOICES,
            "gold": (best(scores[i]) + i % 2) % len(CHOICES),
            "answer": texts[i] if i % 2 else "no such thing",
        }
        for i, question in enumerate(QUESTIONS)
    ]


@pytest.fixture
def tasks(tmp_path: Path, documents: list[dict[str, Any]]) -> Path:
    """A folder with a task of each kind, for ``--include_path``."""
    folder, data = tmp_path / "tasks", tmp_path / "documents.jsonl"
    folder.mkdir()
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for kind, rest in OF_KIND.items():
        (folder / f"{kind}.yaml").write_text(TASK.format(output_type=kind, data=data) + rest)
    return folder


def arguments(checkpoint: Path, tasks: Path, num_passes: int) -> list[str]:
    return [
        *("--model", "sleeptrain", "--model_args", f"checkpoint={checkpoint},num_passes={num_passes}"),
        *("--include_path", str(tasks), "--tasks", ",".join(f"local_{kind}" for kind in OF_KIND)),
    ]


@pytest.mark.parametrize(("num_passes", "batch_size"), [(1, 1), (3, 4)])
def test_its_figures_are_those_of_sessions(
    run: Path, tasks: Path, documents: list[dict[str, Any]], num_passes: int, batch_size: int, tmp_path: Path
) -> None:
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [
        *(sys.executable, "-m", "sleeptrain.harness", *arguments(run, tasks, num_passes)),
        *("--batch_size", str(batch_size), "--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    environment = os.environ | offline | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    report = json.loads(path.read_text())
    found = {name.removeprefix("local_"): values for name, values in report["results"].items()}
    assert report["config"]["num_passes"] == num_passes

    empty = Session(run, num_passes)
    scores, texts = scores_of(empty), texts_of(empty)
    logged = samples(tmp_path / "out", "multiple_choice")
    told = [[float(log) for log, _ in row["filtered_resps"]] for row in logged]
    for row, expected in zip(told, scores, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    hits = [best(row) == document["gold"] for row, document in zip(scores, documents)]
    assert found["multiple_choice"]["acc,none"] == pytest.approx(sum(hits) / len(hits))

    assert [row["filtered_resps"] for row in samples(tmp_path / "out", "generate_until")] == [
        [text] for text in texts
    ]
    hits = [text == document["answer"] for text, document in zip(texts, documents)]
    assert found["generate_until"]["exact_match,none"] == pytest.approx(sum(hits) / len(hits))

    total = sum(log_probability(empty, [256], question) for question in QUESTIONS)
    bits = -total / math.log(2) / sum(map(len, QUESTIONS))
    assert found["loglikelihood_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    if num_passes == 3:  # by the making of the documents
        assert found["multiple_choice"]["acc,none"] == found["generate_until"]["exact_match,none"] == 0.5


def samples(folder: Path, kind: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_local_{kind}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return sorted(rows, key=lambda row: row["doc_id"])


def test_passes_and_stops_make_a_difference(run: Path) -> None:
    """Else the test above would show little."""
    once, thrice = Session(run, 1), Session(run, 3)
    assert all(a != pytest.approx(b, rel=1e-5) for a, b in zip(scores_of(once), scores_of(thrice)))
    assert texts_of(once) != texts_of(thrice)
    assert any(len(text) < MAX_TOKENS for text in texts_of(thrice))


def requests(kind: str, *asked: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(asked)]


def test_a_tokenizer_from_a_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the rain in the main, the rain on the plain"] * 9, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    size = made.get_vocab_size() + 1  # and the end of a document
    run = saved(size, task=TextConfig(tokenizer=str(tmp_path), sequence_tokens=32))
    model, session = SleepingLM(checkpoint=str(run), batch_size="2"), Session(run)
    context, continuation = made.encode("the rain in").ids, made.encode(" the plain").ids
    assert len(context) + len(continuation) < 21  # tokens of several bytes
    logits = session.feed([*context, *continuation])[0].log_softmax(-1)[len(context) - 1 :]
    expected = sum(float(logits[place, i]) for place, i in enumerate(continuation))
    asked = requests("loglikelihood", ("the rain in", " the plain"), ("", "the"))
    ((first, _), (second, _)) = model.loglikelihood(asked, disable_tqdm=True)
    assert first == pytest.approx(expected, rel=1e-5)
    alone = Session(run)
    (the,) = made.encode("the").ids
    assert second == pytest.approx(float(alone.feed([size - 1])[0, 0].log_softmax(-1)[the]), rel=1e-5)


def test_draws_follow_the_seed(run: Path) -> None:
    import torch

    model = SleepingLM(checkpoint=str(run), batch_size=2)
    drawing = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": []}
    asked = requests("generate_until", ("a", drawing), ("a", drawing))

    def drawn(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return model.generate_until(asked, disable_tqdm=True)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 2  # repeats of one request differ


def test_how_a_task_says_to_write() -> None:
    greedy = {"until": ["\n", ""], "do_sample": False, "temperature": 0.7}
    assert writing(greedy) == Writing(256, ("\n",))
    assert writing({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}) == Writing(5, (), 0.7, 0.9)
    assert writing({"do_sample": True}) == Writing(256, (), 1.0)
    with pytest.raises(ConfigError, match="unknown key of generation_kwargs 'num_beams'"):
        writing({"num_beams": 4})


def test_what_it_refuses(run: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    bits = saved(3, task=Rule110Config(width=8, num_strings=2, steps=1))
    lost = saved(task=TextConfig(tokenizer=str(tmp_path / "lost.json")))
    for given, sentence in (
        ({}, "checkpoint is not given; write --model_args checkpoint=runs/NAME"),
        ({"checkpoint": str(tmp_path)}, "holds no checkpoint"),
        ({"checkpoint": str(run), "num_passes": 0}, "num_passes=0 is below 1"),
        ({"checkpoint": str(run), "num_pases": 2}, "unknown setting 'num_pases'; did you mean 'num_passes'?"),
        ({"checkpoint": str(run), "batch_size": "auto"}, "batch_size='auto' is of the wrong type"),
        ({"checkpoint": str(run), "batch_size": "0"}, "batch_size=0 must be at least 1"),
        ({"checkpoint": str(run), "device": "tpu"}, "unknown value of device: 'tpu'"),
        ({"checkpoint": str(bits)}, "task.name=rule110 is no text; give a checkpoint of task.name=text"),
        ({"checkpoint": str(lost)}, "lost.json is no file; give a tokenizer.json"),
    ):
        with pytest.raises(ConfigError) as refused:
            SleepingLM(**given)
        assert sentence in str(refused.value)
    with pytest.raises(ConfigError, match="no chat template; leave out --apply_chat_template"):
        SleepingLM(checkpoint=str(run)).apply_chat_template([])


def test_the_command_says_what_is_wrong(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["harness"])
    assert main(arguments(tmp_path / "nowhere", tasks, 1)) == 2
    assert "nowhere holds no checkpoint; give a run folder" in capsys.readouterr().err


def test_problems_of_numbers_in_words_are_text_too(saved: Callable[..., Path]) -> None:
    run = saved(task=GSMInfiniteConfig(sequence_tokens=512), sleep=SleepConfig(window_tokens=256))
    assert SleepingLM(checkpoint=str(run)).tokenizer_name == "bytes"
