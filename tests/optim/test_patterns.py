"""Weights by patterns of their names: frozen ones, which nothing moves and for which nothing is kept, and
those with other rates."""

import pytest
import torch
from small import VOCAB, batch_of, config_of

from sleeptrain.config import Config, OptimConfig
from sleeptrain.optim.patterns import check_patterns, fits, rate_factor
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
    assert [name for name in NAMES if fits(name, patterns)] == frozen


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
        check_patterns(NAMES, OptimConfig(frozen=patterns))
    check_patterns(NAMES, OptimConfig(frozen=ONE_BLOCK))


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
    assert moved == {name for name in names if not fits(name, patterns)}
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


def test_scaled_weights_move_by_their_factor_and_frozen_ones_are_not_scaled() -> None:
    """The first step of AdamW and of Muon is in proportion to the rate, and here there is no decay."""
    plain, scaled = (
        config_of(weight_decay=0.0, **more)
        for more in ({}, {"scaled": ("*", "!stack.blocks.1.*"), "scaled_factor": 0.25, "frozen": ("head.*",)})
    )
    start = dict(LocalBackend(plain, VOCAB).model.named_parameters())
    whole, part = (dict(trained(config, 1)[0].model.named_parameters()) for config in (plain, scaled))
    for name, before in start.items():
        factor = 0.0 if name.startswith("head.") else 1.0 if name.startswith("stack.blocks.1.") else 0.25
        assert rate_factor(name, scaled.optim) == factor
        moves = (whole[name] - before, part[name] - before)
        torch.testing.assert_close(moves[1], factor * moves[0], rtol=1e-3, atol=1e-6, msg=name)
    with pytest.raises(ConfigError, match=r"optim.scaled='nothing' names no weight of this model"):
        check_patterns(NAMES, OptimConfig(scaled=("nothing",)))
