"""Frozen weights: which they are, and that nothing moves them or is kept for them."""

import pytest
import torch
from small import VOCAB, batch_of, config_of

from sleeptrain.config import Config
from sleeptrain.optim.frozen import check_frozen, is_frozen
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import ConfigError

ONE_BLOCK = ("*", "!stack.blocks.1.*")
NAMES = ("embed.weight", "stack.blocks.0.mlp.up_proj.weight", "stack.blocks.1.mixer.A_log")


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ((), []),
        (("embed.*",), ["embed.weight"]),
        (ONE_BLOCK, list(NAMES[:2])),
        (("!stack.blocks.1.*", "*"), list(NAMES)),
        (("stack.blocks.*.mlp.*", "stack.blocks.?.mixer.*"), list(NAMES[1:])),
        (("EMBED.*",), []),
    ],
)
def test_the_last_pattern_that_fits_decides(patterns: tuple[str, ...], frozen: list[str]) -> None:
    assert [name for name in NAMES if is_frozen(name, patterns)] == frozen


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        (("embed.*", "stack.blocks.2.*"), r"optim.frozen='stack.blocks.2.\*' names no weight of this model"),
        (("*", "!head.*"), r"optim.frozen='!head.\*' names no weight"),
        (("*",), r"optim.frozen=\['\*'\] leaves no weight to train; take some out with a pattern .* !"),
    ],
)
def test_patterns_without_effect_and_nothing_to_train_are_refused(
    patterns: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_frozen(NAMES, patterns)
    check_frozen(NAMES, ONE_BLOCK)


def trained(config: Config, num_steps: int = 2) -> tuple[LocalBackend, set[str]]:
    """The backend after some steps, and the names of the weights that moved."""
    backend = LocalBackend(config, VOCAB)
    before = {name: p.detach().clone() for name, p in backend.model.named_parameters()}
    for seed in range(num_steps):
        result = backend.forward_backward(batch_of(seed=seed), num_passes=2)
        assert backend.step(1.0, result.loss).applied
    moved = {n for n, p in backend.model.named_parameters() if not torch.equal(p, before[n])}
    return backend, moved


@pytest.mark.parametrize("patterns", [ONE_BLOCK, ("stack.blocks.*.mlp.*", "embed.weight"), ("stack.*",)])
def test_frozen_weights_stay_and_have_no_gradient_and_no_moments(patterns: tuple[str, ...]) -> None:
    """Weight decay is 0.1. What is saved holds them all the same, and is read again."""
    config = config_of(frozen=patterns)
    backend, moved = trained(config)
    names = {name for name, _ in backend.model.named_parameters()}
    assert moved == {name for name in names if not is_frozen(name, patterns)}
    backend.forward_backward(batch_of(), num_passes=2)
    assert {n for n, p in backend.model.named_parameters() if p.grad is not None} == moved
    slices = backend.slices()
    assert {piece.name for piece in slices["model"]} == names
    assert {piece.name.rpartition("/")[0] for piece in slices["optimizer"]} == moved | {""}
    again = LocalBackend(config, VOCAB)
    again.optimizer.load({piece.name: piece.values for piece in slices["optimizer"]})
    assert again.optimizer.num_updates == 2


def test_others_learn_as_if_the_frozen_ones_were_none_of_the_optimizers_business() -> None:
    """One step of AdamW or Muon on a weight depends on its own gradient alone, but for clipping."""
    both = [trained(config_of(frozen=frozen, clip_norm=0.0), 1) for frozen in ((), ONE_BLOCK)]
    free, part = (dict(backend.model.named_parameters()) for backend, _ in both)
    same = {name for name in free if torch.equal(free[name], part[name])}
    assert same >= {name for name in free if name.startswith("stack.blocks.1.")}
    assert "embed.weight" not in same
