"""Ids told a few at a time make the text that all of them make at once."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sleeptrain.tasks.text_decoder import BROKEN, TextDecoder
from sleeptrain.tasks.tokenizer import ByteTokenizer, FileTokenizer, make_tokenizer

TEXT = "  It was a dark and stormy night; don't say 'naïve', say € 12 . Überall: 日本語 🙂🙂, is n't it ?  "
END = "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def of_byte_letters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END])
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def of_spaces(scheme: str) -> Tokenizer:
    """Words begin with ▁, the first one, too, or not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=100, special_tokens=[END]))
    return tokenizer


def with_bytes(*more: decoders.Decoder) -> Tokenizer:
    """What has no token of its own is written as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=20, special_tokens=[END, *BYTES])
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def of_word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=["[UNK]", END])
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def of_word_ends() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=120, end_of_word_suffix="</w>", special_tokens=[END])
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def of_words(decoder: decoders.Decoder | None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "<pad>", "|", END]
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=special))
    if decoder:
        tokenizer.decoder = decoder
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "letters of bytes": of_byte_letters,
    "spaces": lambda: of_spaces("always"),
    "spaces, but none first": lambda: of_spaces("never"),
    "bytes": lambda: with_bytes(),
    "bytes, without a first space": lambda: with_bytes(decoders.Strip(" ", 1, 0)),
    "bytes, without some spaces": lambda: with_bytes(decoders.Strip(" ", 12, 0)),
    "bytes, and what is no part of a word": lambda: with_bytes(decoders.Replace("a d", "!")),
    "word pieces": of_word_pieces,
    "word ends": of_word_ends,
    "words": lambda: of_words(None),
    "words that do not repeat": lambda: of_words(decoders.CTC()),
}


class Counting(FileTokenizer):
    """Counts the ids that it decodes."""

    num_decoded = 0

    def decode(self, ids: Sequence[int]) -> bytes:
        self.num_decoded += len(ids)
        return super().decode(ids)


@pytest.fixture(params=["", END], ids=["", "an end"])
def end_token(request: pytest.FixtureRequest) -> str:
    return request.param


def at_once(tokenizer: ByteTokenizer | FileTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids).decode(errors="replace")


def split(ids: Sequence[int], draws: random.Random) -> list[Sequence[int]]:
    """In parts of 0 to 4, often 1."""
    parts = []
    while ids:
        num = draws.choice((0, 1, 1, 1, 2, 4))
        parts.append(ids[:num])
        ids = ids[num:]
    return parts


def some_ids(tokenizer: ByteTokenizer | FileTokenizer, draws: random.Random) -> list[int]:
    """Any, also such as only the model knows; few, spaces among them, again and again; letters of one and of
    more bytes; or those of a text, some of which are left out."""
    known = range(len(tokenizer.bytes_per_id) + 3)
    kind = draws.choice(("any", "few", "letters", "text"))
    if kind == "text":
        return [i for i in tokenizer.encode(TEXT.encode()).tolist() if draws.random() < 0.9]
    spaces, letters = (tokenizer.encode(text.encode()).tolist() for text in (" ", "a é € 🙂"))
    among = {"any": known, "few": draws.choices(known, k=2) + 3 * spaces, "letters": letters or known}[kind]
    return draws.choices(among, k=draws.randrange(40))


def check(tokenizer: ByteTokenizer | FileTokenizer, seed: int) -> None:
    draws = random.Random(seed)
    decoder, told, fed = TextDecoder(tokenizer), "", []
    for part in split(some_ids(tokenizer, draws), draws):
        told += decoder.feed(part)
        fed += part
        assert told + decoder.rest() == at_once(tokenizer, fed)
        assert not told.endswith(BROKEN)


def test_bytes_are_told_as_all_at_once() -> None:
    for seed in range(500):
        check(ByteTokenizer(), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_told_as_all_at_once(kind: str, end_token: str, tmp_path: Path) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(str(tmp_path), end_token)
    for seed in range(200):
        check(tokenizer, seed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("bytes")])
def test_a_letter_is_told_as_soon_as_it_is_whole(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(str(tmp_path))
    ids = tokenizer.encode(TEXT.encode()).tolist()
    decoder, told = TextDecoder(tokenizer), ""
    for num, i in enumerate(ids, start=1):
        told += decoder.feed([i])
        assert told == at_once(tokenizer, ids[:num]).rstrip(BROKEN)


def test_bytes_without_a_token_wait_for_what_comes_after_them(tmp_path: Path) -> None:
    """One wrong byte makes all beside it wrong, so that none can be told before."""
    with_bytes().save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(str(tmp_path))
    right, wrong = (
        [1 + BYTES.index(f"<0x{byte:02X}>") for byte in text] for text in ("a€".encode(), b"\xe2")
    )
    decoder = TextDecoder(tokenizer)
    assert (decoder.feed(right), decoder.rest()) == ("", "a€")
    assert (decoder.feed(wrong), decoder.rest()) == ("", BROKEN * 5)
    spaces = tokenizer.encode(b" ").tolist()
    assert (decoder.feed(spaces).strip(" "), decoder.rest()) == (BROKEN * 5, "")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "no part of a word" not in kind])
def test_the_work_grows_as_the_text_does(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Counting(tmp_path / "tokenizer.json")
    ids = tokenizer.encode(TEXT.encode() * 40).tolist()
    decoder = TextDecoder(tokenizer)
    for i in ids:
        decoder.feed([i])
    assert tokenizer.num_decoded < 20 * len(ids)


def test_nor_does_it_grow_faster_where_nothing_is_whole(tmp_path: Path) -> None:
    of_byte_letters().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Counting(tmp_path / "tokenizer.json")
    first = tokenizer.encode("€".encode()).tolist()[1:2]
    decoder = TextDecoder(tokenizer)
    assert "".join(decoder.feed(first) for _ in range(1000)) == ""
    assert decoder.rest() == BROKEN * 1000
    assert tokenizer.num_decoded < 20 * 1000
