"""What a session does to write: the decoder reads its tokens, with weights in the type that multiplies."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_generate import PROMPT, SMALL, TEXT, saved
from torch import Tensor

from sleeptrain.config import SleepConfig
from sleeptrain.engine.restored import restore
from sleeptrain.model import session as sessions
from sleeptrain.model.decoder import Decoder
from sleeptrain.session import Session, choose


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_what_a_decoder_reads_is_what_any_session_reads(
    tmp_path: Path, eviction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads most of what a session writes. Whether a memory is saved, a fork made or another memory loaded
    meanwhile makes no difference but for roundings."""
    num_read = counted(monkeypatch)
    folder = saved(tmp_path / "run", replace(TEXT, sleep=replace(TEXT.sleep, eviction=eviction)))
    plain, decoded = (Session(folder, num_sequences=2) for _ in range(2))
    for session in (plain, decoded):
        session.read([PROMPT, PROMPT[:9]])
        session.save(tmp_path / "before")
    generator, expected = torch.Generator().manual_seed(4), []
    for _ in range(40):
        expected.append(choose(plain.next_logits, 1.0, 1.0, generator))
        plain.read(expected[-1][:, None])
    for number, ids in enumerate(decoded.generate(40, temperature=1.0, seed=4)):
        assert torch.equal(ids, expected[number])
        if number == 19:
            decoded.save(tmp_path / "amid")
            fork = decoded.fork([1, 0, 1])
    assert decoded.num_tokens == plain.num_tokens
    assert len(num_read) > 25  # in windows of 8, two rows that sleep apart
    torch.testing.assert_close(decoded.next_logits, plain.next_logits, rtol=1e-5, atol=1e-5)
    following = torch.stack(expected[20:], dim=1)
    for session, rows in ((fork, [1, 0, 1]), (decoded.load(tmp_path / "amid"), [0, 1])):
        logits = session.feed(following[rows])
        torch.testing.assert_close(logits[:, -1], plain.next_logits[rows], rtol=1e-5, atol=1e-5)
    next(decoded.generate(1))
    decoded.load(tmp_path / "before")
    for ids, again in zip(expected, decoded.generate(9, temperature=1.0, seed=4)):
        assert torch.equal(ids, again)


def test_weights_in_bfloat16_multiply_as_autocast_does(tmp_path: Path) -> None:
    """A session keeps those of linear maps in the type that multiplies, a tied head's too."""
    model, run = replace(SMALL, tie_embeddings=True), replace(TEXT.run, precision="bfloat16")
    folder = saved(tmp_path / "run", replace(TEXT, model=model, run=run))
    session, backend = Session(folder), restore(folder).backend
    ids = torch.tensor([list(PROMPT.encode())])
    with backend.autocast():
        expected, _ = sessions.feed(backend.model, sessions.begin(backend.model, 1), ids, 3)
    assert torch.equal(session.feed(ids), expected)
    kept = {name: p.dtype for name, p in session.model.named_parameters()}
    assert kept["embed.weight"] == kept["stack.blocks.1.mixer.b_proj.weight"] == torch.float32
    assert kept["head.weight"] == kept["stack.blocks.1.mixer.q_proj.weight"] == torch.bfloat16


def test_a_session_needs_no_graphs_of_training(tmp_path: Path) -> None:
    """They would hold copies of all weights, and sums of their gradients."""
    sleep = replace(TEXT.sleep, activation_checkpointing="pass")
    config = replace(TEXT, sleep=sleep, run=replace(TEXT.run, cuda_graphs=True))
    assert Session(saved(tmp_path / "run", config)).model.graphs is None


def test_a_window_that_never_ends(tmp_path: Path) -> None:
    sleep = SleepConfig(window_tokens=0, num_passes=1)
    folder = saved(tmp_path / "run", replace(TEXT, sleep=sleep, model=replace(SMALL, pattern="attn attn")))
    session, alike = Session(folder), Session(folder)
    for each in (session, alike):
        each.read(PROMPT)
    ids = torch.stack(list(session.generate(5)), dim=1)
    logits = alike.feed(ids)
    assert logits[:, :-1].argmax(-1).tolist() == ids[:, 1:].tolist()
    torch.testing.assert_close(logits[:, -1], session.next_logits, rtol=1e-5, atol=1e-5)


def test_a_token_that_was_interrupted_was_not_read(tmp_path: Path) -> None:
    """In any block: what it had written by then is overwritten, or left behind."""
    session, alike = (Session(saved(tmp_path / name)) for name in ("a", "b"))
    for each in (session, alike):
        each.read(PROMPT[:10])
    writing = session.generate(4)
    for block in session.model.stack.blocks[::-1]:
        alike.read(next(writing)[:, None])

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        hook = block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(session.generate(1))
        hook.remove()
        following = torch.tensor([[5]])
        expected = alike.fork([0]).feed(following)
        torch.testing.assert_close(session.fork([0]).feed(following), expected, rtol=1e-5, atol=1e-5)


def test_a_memory_of_a_gpu_is_gone_on_with_on_a_cpu(tmp_path: Path) -> None:
    """Where keys and values were bfloat16, and are float32."""
    low = replace(TEXT, run=replace(TEXT.run, precision="bfloat16"))
    writer, reader = Session(saved(tmp_path / "low", low)), Session(saved(tmp_path / "run"))
    writer.read(PROMPT)
    writer.save(tmp_path / "memory")
    reader.load(tmp_path / "memory")
    usual, following = reader.fork([0]), torch.stack(list(reader.generate(5)), dim=1)
    usual.read(following)
    torch.testing.assert_close(reader.next_logits, usual.next_logits, rtol=1e-2, atol=1e-2)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All tokens that decoders read from now on."""
    seen: list[Tensor] = []
    read: Callable[[Decoder, Tensor], Tensor] = Decoder.read

    def counting(decoder: Decoder, ids: Tensor) -> Tensor:
        seen.append(ids)
        return read(decoder, ids)

    monkeypatch.setattr(Decoder, "read", counting)
    return seen
