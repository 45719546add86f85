"""Entry point: a session with a model that sleeps.

``python -m sleeptrain.generate checkpoint=runs/text prompt="Once upon a time" num_passes=4``
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sleeptrain.evaluate import parse
from sleeptrain.schema import ConfigError, RunError, describe, from_dict, setting

if TYPE_CHECKING:
    from sleeptrain.session import Session, Sleep

USAGE = """\
usage: python -m sleeptrain.generate checkpoint=FOLDER [KEY=VALUE ...]

Reads a prompt (or what comes by standard input), sleeps whenever its window is full, and writes on. Of every
sleep it says how many tokens it had read, N, and how long it slept. What it remembers can be saved, and a
later call goes on from there.

  python -m sleeptrain.generate checkpoint=runs/text prompt="Once upon a time" num_passes=4
  python -m sleeptrain.generate checkpoint=runs/text prompt=- save=book.safetensors max_tokens=0 < book.txt
  python -m sleeptrain.generate checkpoint=runs/text load=book.safetensors prompt="He said" temperature=0.8
  python -m sleeptrain.generate checkpoint=runs/quickstart ids=[1,0,1,1,0,1]
"""


@dataclass(frozen=True)
class GenerateConfig:
    """A session from the command line."""

    checkpoint: str = setting("", "run folder (its newest valid checkpoint) or one checkpoint folder")
    prompt: str = setting("", "text to read first; -: standard input")
    ids: tuple[int, ...] = setting((), "token ids to read first, for models that are not of text")
    num_passes: int | None = setting(None, "N of each sleep; null: as trained")
    tolerance: float = setting(
        0.0, "a sleep ends once a pass changes the fast weights by less than this share of their norm"
    )
    halt_threshold: float | None = setting(
        None,
        "where sleep.halting=learned: it ends once the chance of having halted reaches this; null: 0.5",
    )
    max_tokens: int = setting(200, "tokens to write")
    temperature: float = setting(0.0, "0: always the most likely token")
    top_p: float = setting(1.0, "draw among the fewest tokens whose probabilities add up to this")
    seed: int = setting(0, "of what is drawn")
    load: str = setting("", "file with the memory of an earlier session")
    save: str = setting("", "file for the memory that this session ends with")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint is not given; write checkpoint=runs/NAME")
        if self.prompt and self.ids:
            raise ConfigError("prompt and ids are both given; a session reads one of them first")
        if not (self.prompt or self.ids or self.load):
            raise ConfigError("there is nothing to read; give prompt=TEXT, ids=[...] or load=FILE")
        if self.max_tokens < 0 or (self.num_passes is not None and self.num_passes < 1):
            raise ConfigError(
                f"max_tokens={self.max_tokens} must be at least 0 and num_passes={self.num_passes} at least 1"
            )


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a setting, the checkpoint or the memory is wrong."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        for name, default, text in describe(GenerateConfig):
            first = f"  {name + '=' + default:<28} "
            print(textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * 31))
        return 0
    try:
        for argument in arguments:
            if "=" not in argument:
                raise ConfigError(f"{argument!r} is no setting; write KEY=VALUE, and see --help for the keys")
        run(from_dict(GenerateConfig, _parse(arguments)))
        return 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


def _parse(arguments: list[str]) -> dict[str, Any]:
    """A prompt is a text, whatever it would mean as a value of YAML."""
    prompts = [a.removeprefix("prompt=") for a in arguments if a.startswith("prompt=")]
    others = parse([a for a in arguments if not a.startswith("prompt=")])
    return others | ({"prompt": prompts[-1]} if prompts else {})


def run(settings: GenerateConfig) -> None:
    """Reads, writes, and says when it sleeps."""
    from sleeptrain.session import Session

    session = Session(
        settings.checkpoint,
        settings.num_passes,
        device=settings.device,
        tolerance=settings.tolerance,
        halt_threshold=settings.halt_threshold,
        on_sleep=tell,
    )
    if settings.load:
        session.load(settings.load)
    prompt = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    if prompt:
        session.read(prompt)
    if settings.ids:
        session.read(settings.ids)
    for piece in _written(session, settings):
        print(piece, end="", flush=True)
    if settings.max_tokens:
        print()
    if settings.save:
        session.save(settings.save)
        print(f"[what it remembers of {session.num_tokens} tokens is in {settings.save}]", file=sys.stderr)


def _written(session: "Session", settings: GenerateConfig) -> Iterator[str]:
    chosen = (settings.max_tokens, settings.temperature, settings.top_p, settings.seed)
    if session.tokenizer:
        yield from session.stream(*chosen)
    else:
        yield from (f"{int(ids[0])} " for ids in session.generate(*chosen))


def tell(sleep: "Sleep") -> None:
    """Beside the text, not in it."""
    print(
        f"[slept after {sleep.num_tokens} tokens: {sleep.num_passes} passes, {sleep.seconds:.2f} s]",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
