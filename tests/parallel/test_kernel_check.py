"""Before a run starts, the kernels of its fast weights are held against the recurrence, and refused where
they are wrong. On a CPU torch stands in for them: what they compute is for tests/memory/kernels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sleeptrain import memory
from sleeptrain.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, SleepConfig
from sleeptrain.engine.trainer import train
from sleeptrain.memory.kernels import check
from sleeptrain.memory.kernels.check import Case, cases_of_run
from sleeptrain.parallel.kernel_check import check_kernels
from sleeptrain.schema import ConfigError

MODEL = ModelConfig(
    d_model=16,
    num_heads=2,
    memory_heads=4,
    memory_qk_heads=2,
    memory_key_dim=4,
    memory_value_dim=6,
    memory_backend="triton",
)
CONFIG = Config(
    run=RunConfig(device="cpu"),
    model=MODEL,
    sleep=SleepConfig(window_tokens=12, num_passes=2),
    data=DataConfig(batch_sequences=4, micro_batch_sequences=2),
    optim=OptimConfig(num_steps=1),
)
Rule = Callable[..., tuple[Tensor | None, Tensor]]


def wrong(*values: Tensor | None, rule: str) -> tuple[Tensor | None, Tensor]:
    """The gradient of the keys is 1.5 times what it should be."""
    q, k, *rest = values
    return memory.apply(q, 1.5 * k - 0.5 * k.detach(), *rest, rule=rule, backend="chunked")


def right(*values: Tensor | None, rule: str) -> tuple[Tensor | None, Tensor]:
    return memory.apply(*values, rule=rule, backend="chunked")


def failing(*values: Tensor | None, rule: str) -> tuple[Tensor | None, Tensor]:
    raise RuntimeError("no\nkernel")


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], list]:
    """Puts a function in the place of all kernels; the list fills with the values of its calls."""

    def put(function: Rule) -> list:
        calls: list = []

        def recorded(*values: Tensor | None, rule: str) -> tuple[Tensor | None, Tensor]:
            calls.append(values)
            return function(*values, rule=rule)

        monkeypatch.setattr(check, "implementation", lambda backend: recorded)
        monkeypatch.setattr(check, "parts_of_run", lambda *sizes: ())
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # a CPU may then be asked for kernels
        memory.choose.cache_clear()
        return calls

    yield put
    memory.choose.cache_clear()


def test_right_kernels_pass_in_the_sizes_of_the_run(stands_in) -> None:
    calls = stands_in(right)
    check_kernels(CONFIG)
    assert [q is not None for q, *_ in calls] == [True, False, True]
    for _, k, v, _, _, state in calls:
        assert k.shape == (2, 12, 2, 4)
        assert v.shape == (2, 12, 4, 6)
        assert state.shape == (2, 4, 4, 6)
        assert v.dtype == torch.float32


def test_tensor_ranks_check_their_own_heads_and_replicas_their_rows(stands_in) -> None:
    calls = stands_in(right)
    parallel = replace(CONFIG.parallel, tensor_size=2)
    data = DataConfig(batch_sequences=4)
    check_kernels(replace(CONFIG, parallel=parallel, data=data), num_replicas=4)
    assert {v.shape for _, _, v, *_ in calls} == {(1, 12, 2, 6)}


def test_a_wrong_gradient_is_refused_in_one_sentence(stands_in) -> None:
    stands_in(wrong)
    with pytest.raises(ConfigError) as refused:
        check_kernels(CONFIG)
    assert str(refused.value) == (
        "the triton kernels of the fast weights fail their check on cpu, gated_delta float32 T 12 heads 2/4 "
        "K 4 V 6 usual gates seed 0: d_k is off by 5.0e-01; set model.memory_backend=chunked"
    )


def test_an_error_of_the_library_is_part_of_the_sentence(stands_in) -> None:
    stands_in(failing)
    with pytest.raises(ConfigError, match="seed 0: RuntimeError: no kernel; set"):
        check_kernels(CONFIG)


def test_the_trainer_starts_no_run_on_wrong_kernels(stands_in, tmp_path: Path) -> None:
    stands_in(wrong)
    with pytest.raises(ConfigError, match="fail their check on cpu"):
        train(replace(CONFIG, run=RunConfig(dir=str(tmp_path), device="cpu")), "")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("change", [{"memory_backend": "chunked"}, {"pattern": "attn"}])
def test_where_no_kernel_runs_nothing_is_checked(change: dict, stands_in) -> None:
    calls = stands_in(failing)
    sleep = replace(CONFIG.sleep, num_passes=1)
    check_kernels(replace(CONFIG, model=replace(MODEL, **change), sleep=sleep))
    assert calls == []


def test_a_large_run_is_checked_in_a_part_that_fills_the_device() -> None:
    large = Case(
        num_sequences=256, num_tokens=2048, num_heads=16, num_key_heads=16, key_dim=128, value_dim=128
    )
    [first, unread, extreme] = cases_of_run(large)
    assert (first.num_sequences, first.num_tokens) == (5, 130)
    assert not unread.is_read
    assert extreme.extreme
    assert len(list(cases_of_run(large._replace(rule="delta")))) == 2


def test_a_run_of_few_long_sequences_checks_the_split_too() -> None:
    long = Case(num_sequences=1, num_tokens=8192, num_heads=8, num_key_heads=8, key_dim=128, value_dim=128)
    *_, split = cases_of_run(long)
    assert (split.num_sequences, split.num_tokens) == (1, 1024)
