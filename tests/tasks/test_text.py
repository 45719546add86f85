import gzip

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sleeptrain.config import TextConfig
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.text import Text
from sleeptrain.tasks.tokenizer import make_tokenizer

SPLITS = ("train", "validation", "test")
END = 256


@pytest.fixture
def folder(tmp_path):
    """60 files of 40-99 bytes, a copy, an empty file, one with a foreign ending, one in a subfolder."""
    rng = np.random.default_rng(0)
    for i in range(60):
        letters = rng.integers(97, 123, 40 + i).astype(np.uint8).tobytes()
        (tmp_path / f"{i:02d}.txt").write_bytes(letters)
    (tmp_path / "copy.txt").write_bytes((tmp_path / "07.txt").read_bytes())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "picture.bin").write_bytes(b"not text" * 20)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.md").write_bytes("déjà vu ☕\n".encode() * 3)
    return tmp_path


def make(folder, **settings):
    return Text(TextConfig(folder=str(folder), **({"sequence_tokens": 16} | settings)))


def documents(tokens, end=END):
    """The documents of a token array, as bytes."""
    cuts = np.flatnonzero(tokens == end)
    return [bytes(piece[piece != end].tolist()) for piece in np.split(tokens, cuts + 1)[:-1]]


def test_each_file_is_in_one_split_once(folder) -> None:
    task = make(folder)
    by_split = [documents(task.tokens(split)) for split in SPLITS]
    together = [text for texts in by_split for text in texts]
    expected = {p.read_bytes() for p in folder.rglob("*") if p.suffix in (".txt", ".md")} - {b""}
    assert len(together) == len(set(together)) == 61
    assert set(together) == expected
    assert len(by_split[0]) > 40
    names = {(folder / f"{i:02d}.txt").read_bytes(): i for i in range(60)}
    order = [names[text] for text in by_split[0] if text in names]
    assert order != sorted(order)


def test_a_new_file_moves_no_other_to_another_split(folder) -> None:
    before = set(documents(make(folder).tokens("test")))
    (folder / "00a.txt").write_bytes(b"one more document, long enough for nothing in particular")
    assert before <= set(documents(make(folder).tokens("test")))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_crops_cover_a_split_exactly_once(folder, split) -> None:
    task = make(folder)
    tokens, count = task.tokens(split), task.num_examples(split)
    examples = task.examples(5, np.arange(count), split)
    assert count == (len(tokens) - 1) // 16
    assert np.array_equal(examples.targets.ravel(), tokens[1 : 16 * count + 1])
    assert np.array_equal(examples.ids.ravel(), tokens[: 16 * count])
    assert examples.loss_mask.all()
    assert examples.valid.all()
    again = task.examples(6, np.arange(count, 2 * count), split)  # wraps, and knows no seed
    assert np.array_equal(again.ids, examples.ids)


def test_training_crops_start_anywhere(folder) -> None:
    task = make(folder)
    tokens = task.tokens("train")
    examples = task.examples(0, np.arange(200))
    text = tokens.astype("<u2").tobytes()
    for ids, targets in zip(examples.ids, examples.targets):
        assert np.append(ids, targets[-1:]).astype("<u2").tobytes() in text
        assert np.array_equal(ids[1:], targets[:-1])
    assert len(np.unique(examples.ids, axis=0)) > 180
    assert task.num_examples("train") is None
    everything = task.examples(0, np.arange(30000))
    assert (everything.ids[:, 0] == tokens[0]).any()
    # the last crop, which ends with the split's last token, is drawn too
    assert (np.c_[everything.ids, everything.targets[:, -1:]] == tokens[-17:]).all(axis=1).any()


def test_examples_are_pure_and_do_not_depend_on_the_batch(folder) -> None:
    task, again = make(folder), make(folder)
    for split in SPLITS:
        batch = task.examples(7, np.arange(40), split)
        for part, single in zip(batch, again.example(7, 33, split)):
            assert np.array_equal(part[33:34], single)
    assert not np.array_equal(task.example(0, 0).ids, task.example(1, 0).ids)


def test_bits_per_byte_charges_document_ends_without_counting_them(folder) -> None:
    task = make(folder)
    examples = task.examples(0, np.arange(task.num_examples("test")), "test")
    nll = np.full(examples.ids.shape, np.log(2))  # one bit for each token
    score = task.score(examples.targets, nll, examples)
    ends = (examples.targets == END).sum(axis=1)
    assert ends.any()
    assert np.allclose(score["bits_per_byte"], 16 / (16 - ends))
    assert np.allclose(score["nll"], np.log(2))


def test_gzip_is_measured_file_by_file(folder) -> None:
    task = make(folder)
    texts = documents(task.tokens("test"))
    expected = 8 * sum(len(gzip.compress(t, 9)) for t in texts) / sum(map(len, texts))
    assert task.marks("test") == {"bits_per_byte of gzip -9": pytest.approx(expected)}


def test_fingerprint_follows_the_content_alone(folder, tmp_path_factory) -> None:
    task = make(folder)
    other = tmp_path_factory.mktemp("moved")
    for path in folder.glob("*.txt"):
        (other / f"renamed-{path.name}").write_bytes(path.read_bytes())
    (other / "deep.md").write_bytes((folder / "sub" / "deep.md").read_bytes())
    assert make(other).fingerprint() == task.fingerprint()
    assert task.fingerprint()["num_files"] == 61
    (other / "renamed-03.txt").write_bytes(b"changed")
    assert make(other).fingerprint() != task.fingerprint()


@pytest.fixture
def byte_level_file(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>"],
        show_progress=False,
    )
    tokenizer.train([str(p) for p in folder.rglob("*.txt")] + [str(folder / "sub" / "deep.md")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_file_accounts_for_every_byte(folder, byte_level_file) -> None:
    task = make(folder, tokenizer=str(byte_level_file), sequence_tokens=8)
    plain = make(folder)
    assert task.vocab_size == 301
    for split in SPLITS:
        tokens = task.tokens(split)
        assert (tokens == 300).sum() == (plain.tokens(split) == END).sum()
        assert len(tokens) < len(plain.tokens(split))
        crops = task.num_examples(split) or 1
        examples = task.examples(0, np.arange(crops), split)
        nll = np.ones(examples.ids.shape)
        bits = task.score(examples.targets, nll, examples)["bits_per_byte"]
        text = Tokenizer.from_file(str(byte_level_file)).decode(
            examples.targets[0][examples.targets[0] != 300].tolist()
        )
        if text.isascii():
            assert bits[0] == pytest.approx(8 / np.log(2) / len(text))
    assert task.fingerprint() != plain.fingerprint()


def test_a_tokenizer_may_have_a_token_that_ends_documents(folder, byte_level_file) -> None:
    named = {"tokenizer": str(byte_level_file), "sequence_tokens": 8}
    plain, task = make(folder, **named), make(folder, end_token="<pad>", **named)
    assert (plain.vocab_size, task.vocab_size, plain.end_id, task.end_id) == (301, 300, 300, 0)
    for split in SPLITS:
        tokens = plain.tokens(split)
        assert np.array_equal(task.tokens(split), np.where(tokens == 300, 0, tokens))
    scores = [t.score(e.targets, np.ones(e.ids.shape), e) for t in (plain, task) for e in [held_out(t)]]
    assert np.array_equal(*(s["bits_per_byte"] for s in scores))
    assert task.fingerprint()["tokenizer"] == f"{plain.fingerprint()['tokenizer']} <pad>"
    assert make_tokenizer(str(byte_level_file), "<pad>").decode([0, *b"", 0]) == b""
    with pytest.raises(
        ConfigError, match=r"task.end_token='<eos>' is no token of .*tokenizer.json; give one"
    ):
        make(folder, end_token="<eos>", **named)
    with pytest.raises(ConfigError, match=r"task.end_token='<pad>' is no byte; leave it out"):
        TextConfig(end_token="<pad>")


def held_out(task):
    return task.examples(0, np.arange(task.num_examples("test")), "test")


def test_a_tokenizer_that_loses_text_is_refused(folder) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "lossy.json"))
    task = make(folder, tokenizer=str(folder / "lossy.json"), sequence_tokens=2)
    with pytest.raises(ConfigError, match=r"task\.tokenizer=.*lossy\.json.*bits per byte would be wrong"):
        task.example(0, 0)


def test_the_standard_library_is_found_without_installed_packages() -> None:
    task = Text(TextConfig())
    assert task.fingerprint()["num_files"] > 500
    example = task.example(0, 0, "test")
    assert example.ids.shape == (1, 512)
    folders = {part for split in SPLITS for d in task._documents[split] for part in d.path.parts}
    assert "json" in folders
    assert not folders & {"site-packages", "dist-packages", "__pycache__"}


def test_wrong_settings_are_named(folder, tmp_path_factory) -> None:
    with pytest.raises(ConfigError, match=r"task\.folder=.*missing is no folder; give one"):
        make(folder / "missing")
    with pytest.raises(ConfigError, match=r"holds no file with text that ends in \.rst; change"):
        make(folder, suffixes=(".rst",))
    with pytest.raises(ConfigError, match=r"task\.tokenizer=.*none\.json is no file; give"):
        make(folder, tokenizer=str(folder / "none.json"))
    lonely = tmp_path_factory.mktemp("lonely")
    (lonely / "a.txt").write_bytes(b"x" * 1000)
    with pytest.raises(
        ConfigError, match=r"0 files with at most 0 tokens in the \w+ split, too few for .*add files"
    ):
        make(lonely)
    with pytest.raises(ConfigError, match=r"task\.sequence_tokens=5000 and one more"):
        make(folder, sequence_tokens=5000)
    with pytest.raises(ConfigError, match=r"eval\.difficulties holds 1"):
        make(folder).example(0, 0, difficulty=1)
