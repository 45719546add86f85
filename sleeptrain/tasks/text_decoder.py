"""Ids to text, a few at a time: what is written is told while it is written."""

from collections.abc import Sequence

from sleeptrain.tasks.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what stands for bytes that are no letter
CONTEXT_IDS = 4  # a letter has at most as many bytes, so all that there is of the last one lies within them


class TextDecoder:
    """Gives the letters of a text as its ids come: all that it gives, and the rest, are what the tokenizer
    makes of all ids at once, however these are split.

    Of what came before, only the last ids are decoded again, so that what follows is no first word, which may
    lose its space, and completes a letter that they begin. The work grows as the text does. (``DecodeStream``
    of the tokenizers library raises, or tells letters that do not stay, where bytes in a row are no letter.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._recent: list[int] = []  # the last ids that are settled
        self._num_told = 0  # letters that they stand for, when decoded alone, and that are dealt with
        self._open: list[int] = []  # the ids after them
        self._num_broken = 0  # held back at the end of what is settled

    def feed(self, ids: Sequence[int]) -> str:
        """The letters that these ids, after those before, make whole. Held back are ids that do not settle,
        bytes of a letter that is not whole and, since it looks the same, every BROKEN at the end."""
        if not self._take(ids):
            return ""
        letters = _settled(self._decode(self._recent))
        new = letters[self._num_told :]
        self._num_told = len(letters)
        self._forget()
        whole = new.rstrip(BROKEN)
        held, num_broken = self._num_broken, len(new) - len(whole)
        self._num_broken = num_broken if whole else held + num_broken
        return BROKEN * held + whole if whole else ""

    def rest(self) -> str:
        """What is held back, as it is if no more ids come."""
        return BROKEN * self._num_broken + self._decode(self._recent + self._open)[self._num_told :]

    def _take(self, ids: Sequence[int]) -> bool:
        """Whether any are settled now that were not."""
        num_before = len(self._recent)
        for i in filter(self._tokenizer.is_text, ids):
            self._open.append(i)
            if self._tokenizer.settles(i):
                self._recent += self._open
                self._open = []
        return len(self._recent) > num_before

    def _forget(self) -> None:
        """Keeps the last ids alone, unless these are no text, as spaces at its beginning may be."""
        last = self._recent[-CONTEXT_IDS:]
        if text := self._decode(last):
            self._recent, self._num_told = last, len(_settled(text))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids).decode(errors="replace")


def _settled(text: str) -> str:
    """Without the letter at its end that more bytes may make whole."""
    return text.removesuffix(BROKEN)
