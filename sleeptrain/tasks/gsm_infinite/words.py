"""A token for each word of the problems: the smallest vocabulary, for small models trained from scratch."""

import re
from collections.abc import Sequence

import numpy as np

from sleeptrain.tasks.base import Ints
from sleeptrain.tasks.gsm_infinite.stories import STORIES, TOTALS_COUNT
from sleeptrain.tasks.gsm_infinite.wording import templates

_TOKEN = re.compile(r"V\d+|[A-Za-z]+|\d|[^\sA-Za-z\d]")
_FRAME = "Question: What is the The? Facts: Solution: Answer: 0123456789 + - * / = ( ) . ; ,"


class WordTokenizer:
    """Ids of words, variables, digits and signs; a capital first letter makes another word."""

    sha256 = ""

    def __init__(self, is_symbolic: bool, num_variables: int) -> None:
        texts = [_FRAME]
        if is_symbolic:
            texts += [f"V{i}" for i in range(num_variables)]
        else:
            texts += [TOTALS_COUNT, *templates(), *(text for story in STORIES for text in story.texts())]
        self._words = list(dict.fromkeys(word for text in texts for word in _TOKEN.findall(text)))
        self._id_of = {word: i for i, word in enumerate(self._words)}
        self.end_id = len(self._words)
        self.bytes_per_id = np.array([*map(len, self._words), 0], dtype=np.int64)

    def encode(self, text: bytes) -> Ints:
        ids = self._id_of
        return np.array([ids[word] for word in _TOKEN.findall(text.decode())], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> bytes:
        """With a space between any two; the end marker is no text."""
        return " ".join(self._words[i] for i in ids if i < self.end_id).encode()
