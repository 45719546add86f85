"""Which backend runs and why; a forced one that cannot run is refused in one sentence."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from sleeptrain import memory
from sleeptrain.memory import dispatch
from sleeptrain.schema import ConfigError


def inputs(num_tokens: int = 5) -> list[torch.Tensor]:
    shape = (1, num_tokens, 2)
    q, k, v = torch.randn(3, *shape, 4)
    return [q, k, v, -torch.rand(shape), torch.rand(shape), torch.randn(1, 2, 4, 4)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    memory.choose.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_a_cpu_runs_the_chunked_form_and_says_why() -> None:
    assert memory.choose("cpu", torch.float32, 64) == (
        "chunked",
        "Triton kernels need a CUDA device, and the tensors are on cpu",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.usefixtures("compiled")
def test_cuda_runs_the_kernels_where_they_can_be() -> None:
    assert memory.choose("cuda", torch.bfloat16, 256).backend == "triton"
    assert memory.choose("cuda", torch.float64, 64) == (
        "chunked",
        "Triton kernels take float32, float16 and bfloat16, not float64",
    )
    assert memory.choose("cuda", torch.bfloat16, 257) == (
        "chunked",
        "Triton kernels take key sizes up to 256, not 257",
    )


@pytest.mark.usefixtures("compiled")
def test_without_triton_cuda_runs_the_chunked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert memory.choose("cuda", torch.bfloat16, 64) == ("chunked", "triton is not installed")
    memory.choose.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_forced_triton_that_cannot_run_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"model.memory_backend=triton.* on cpu; use .*=auto or chunked"):
        memory.apply(*inputs(), backend="triton")


@pytest.mark.parametrize("is_read", [True, False])
def test_forced_backends_agree(is_read: bool) -> None:
    q, *rest = inputs()
    results = [memory.apply(q if is_read else None, *rest, backend=b) for b in ("recurrent", "chunked")]
    torch.testing.assert_close(*results)
    assert (results[0][0] is None) == (not is_read)


@pytest.mark.usefixtures("compiled")
def test_the_forced_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ran = inputs(), []
    monkeypatch.setattr(dispatch, "recurrent", lambda *args: ran.append(args))
    memory.apply(*values, backend="recurrent")
    memory.apply(*values)
    assert len(ran) == 1
    assert (
        memory.choose("cpu", torch.float32, 4, "recurrent").reason
        == "model.memory_backend=recurrent asks for it"
    )


def around(x: torch.Tensor, backend: str) -> list[Callable[[], object]]:
    """Calls of what stands around the rule."""
    taps, heads = x.new_ones(4, 3), x[..., None]
    return [
        lambda: memory.short_convolution(x, taps, None, None, 2, 1.0, backend),
        lambda: memory.gates_of_logits(x, None, None, backend=backend),
        lambda: memory.gated_rms_norm(heads, heads, x.new_ones(1), 1e-6, backend),
    ]


@pytest.mark.usefixtures("compiled")
def test_what_stands_around_the_rule_follows_its_choice() -> None:
    for call in around(torch.randn(1, 5, 4), "triton"):
        with pytest.raises(ConfigError, match=r"model.memory_backend=triton cannot run"):
            call()
    for backend in ("auto", "chunked", "recurrent"):
        for call in around(torch.randn(1, 5, 4), backend):
            call()


def test_the_memory_runs_where_triton_is_not_installed() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sleeptrain import memory\n"
        "x, g = torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1)\n"
        "memory.apply(x, x, x, g, g, torch.zeros(1, 1, 2, 2))\n"
        "memory.short_convolution(x[..., 0], None, None, None, 1)\n"
        "memory.gated_rms_norm(x, x, x[0, 0, 0], 1e-6)\n"
        "memory.gates_of_logits(g, None, None)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
