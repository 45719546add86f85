"""The model ``sleeptrain`` of lm-eval: its three kinds of requests, answered by sessions.

However long a text is, it is read from its first token: windows that are full are slept on, and none is cut
off.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from sleeptrain.harness.batches import Ids, Score, Writing, after_contexts, score, write
from sleeptrain.harness.settings import HarnessConfig
from sleeptrain.model.flops import count_parameters
from sleeptrain.schema import ConfigError, from_dict, unknown
from sleeptrain.session import Session

Scored = tuple[tuple[str, ...], Ids, Ids]  # what was asked, the ids to read, the ids to score

_GENERATION = ("do_sample", "max_gen_toks", "temperature", "top_p", "until")


@register_model("sleeptrain")
class SleepingLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A checkpoint that reads and writes texts, with N passes in each sleep. ``given``: the values of
    ``HarnessConfig``.

    Raises ConfigError or RunError where there is no usable checkpoint, or it is of a task without text.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.settings = from_dict(HarnessConfig, given | _from_command_line(given))
        self.session = Session(
            self.settings.checkpoint,
            self.settings.num_passes,
            device=self.settings.device,
            tolerance=self.settings.tolerance,
            halt_threshold=self.settings.halt_threshold,
        )
        self._tokenizer = self.session.require_tokenizer()
        self._device = self.session.device

    @property
    def eot_token_id(self) -> int:
        """The end of a document; also what a text without a context is read after."""
        return self._tokenizer.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """Ids, without special tokens."""
        return self._tokenizer.encode(string.encode()).tolist()

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        return self._score("loglikelihood", requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in nats, read after the end of a document."""
        asked = [(r.args, [self.eot_token_id], self.tok_encode(r.args[0])) for r in requests]
        scores = self._score("loglikelihood_rolling", asked, disable_tqdm)
        return [scored.log_probability for scored in scores]

    def _score(self, kind: str, requests: list[Scored], disable_tqdm: bool) -> list[Score]:
        scores = [Score(0.0, True)] * len(requests)
        contexts = [context for _, context, _ in requests]
        order = _longest_first([context + ids for _, context, ids in requests])
        with tqdm(total=len(requests), desc=kind, disable=disable_tqdm) as bar:
            for session, numbers in after_contexts(self.session, contexts, order, self.settings.batch_size):
                for number, scored in zip(numbers, score(session, [requests[n][2] for n in numbers])):
                    scores[number] = scored
                    is_rolling = kind == "loglikelihood_rolling"
                    answer = scored.log_probability if is_rolling else tuple(scored)
                    self.cache_hook.add_partial(kind, requests[number][0], answer)
                bar.update(len(numbers))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What each request's context is continued with. Requests of the same settings go side by side; draws
        follow ``--seed``."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        generator = torch.Generator(self.session.device).manual_seed(torch.initial_seed())
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for chosen in alike.values():
                how = writing(requests[chosen[0]].args[1])
                contexts = [self.tok_encode(requests[n].args[0]) or [self.eot_token_id] for n in chosen]
                order, num_rows = _longest_first(contexts), self.settings.batch_size
                for session, places in after_contexts(self.session, contexts, order, num_rows):
                    for place, text in zip(places, write(session, how, generator)):
                        texts[chosen[place]] = text
                        self.cache_hook.add_partial("generate_until", requests[chosen[place]].args, text)
                    bar.update(len(places))
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Raises ConfigError: a checkpoint has none."""
        raise ConfigError("a checkpoint of sleeptrain has no chat template; leave out --apply_chat_template")

    @property
    def tokenizer_name(self) -> str:
        """Its content, wherever it is."""
        return self._tokenizer.sha256 or "bytes"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        config, vocab_size = self.session.config, self.session.model.vocab_size
        return {
            "model_num_parameters": sum(count_parameters(config.model, config.sleep, vocab_size)),
            "num_passes": self.session.num_passes,
            "window_tokens": config.sleep.window_tokens,
        }


def _from_command_line(given: dict[str, Any]) -> dict[str, Any]:
    """lm-eval hands on the batch size as it was typed, and the device ``cuda:0`` where none was."""
    changes: dict[str, Any] = {}
    if str(given.get("batch_size", "")).isdecimal():
        changes["batch_size"] = int(given["batch_size"])
    if given.get("device") == "cuda:0":
        changes["device"] = "auto"
    return changes


def writing(given: dict[str, Any]) -> Writing:
    """From the ``generation_kwargs`` of a task. Raises ConfigError for one that would not be followed."""
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given))
    for name in kwargs:
        if name not in _GENERATION:
            raise ConfigError(unknown("key of generation_kwargs", name, _GENERATION))
    temperature = kwargs.get("temperature", 1.0) if kwargs["do_sample"] else 0.0
    until = tuple(stop for stop in kwargs["until"] if stop)
    return Writing(kwargs["max_gen_toks"], until, float(temperature), float(kwargs.get("top_p", 1.0)))


def _longest_first(rows: Sequence[Ids]) -> list[int]:
    """Numbers of rows: those side by side are of similar length, and the first batch needs the most
    memory."""
    return sorted(range(len(rows)), key=lambda number: -len(rows[number]))
