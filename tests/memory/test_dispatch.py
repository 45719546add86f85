"""Which backend runs and why; a forced one that cannot run is refused in one sentence."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from sleeptrain import memory
from sleeptrain.memory import dispatch, peers
from sleeptrain.schema import ConfigError


def inputs(num_tokens: int = 5) -> list[torch.Tensor]:
    shape = (1, num_tokens, 2)
    q, k, v = torch.randn(3, *shape, 4)
    return [q, k, v, -torch.rand(shape), torch.rand(shape), torch.randn(1, 2, 4, 4)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    memory.choose.cache_clear()
    yield
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


@pytest.mark.usefixtures("compiled")
def test_forced_triton_that_cannot_run_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"model.memory_backend=triton.* on cpu; use .*=auto or chunked"):
        memory.apply(*inputs(), backend="triton")


@pytest.fixture
def installed(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
def test_the_kernels_of_others_run_where_they_are_asked_for(backend: str) -> None:
    reason = f"model.memory_backend={backend} asks for it"
    assert memory.choose("cuda", torch.bfloat16, 128, backend) == (backend, reason)
    assert memory.choose("cuda", torch.bfloat16, 128).backend == "triton"


REFUSED = [
    ("fla", {"device_type": "cpu"}, "fla needs a CUDA device, and the tensors are on cpu"),
    ("fla", {"dtype": torch.float32}, "fla takes float16 and bfloat16, not float32"),
    ("fla", {"key_dim": 320}, "fla takes key sizes up to 256, not 320"),
    ("flash_qla", {"device_type": "cpu"}, "flash_qla needs a CUDA device, and the tensors are on cpu"),
    ("flash_qla", {"dtype": torch.float32}, "flash_qla takes float16 and bfloat16, not float32"),
    ("flash_qla", {"key_dim": 64}, "flash_qla takes keys and values of size 128, not 64 and 128"),
    ("flash_qla", {"value_dim": 256}, "flash_qla takes keys and values of size 128, not 128 and 256"),
    ("flash_qla", {"rule": "delta"}, "flash_qla has the rule gated_delta, not delta"),
]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("backend", "change", "why"), REFUSED)
def test_what_others_cannot_run_is_refused_in_one_sentence(backend: str, change: dict, why: str) -> None:
    fitting = {"device_type": "cuda", "dtype": torch.bfloat16, "key_dim": 128, "value_dim": 128}
    with pytest.raises(ConfigError) as refused:
        memory.choose(**fitting | change, backend=backend)
    remedy = "use model.memory_backend=auto or chunked"
    assert str(refused.value) == f"model.memory_backend={backend} cannot run: {why}; {remedy}"


@pytest.mark.usefixtures("installed")
def test_flash_qla_is_refused_on_a_device_it_is_not_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ConfigError, match="for Hopper and Blackwell, and the device is NVIDIA A100; use"):
        memory.choose("cuda", torch.bfloat16, 128, "flash_qla")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("backend", "package"), [("fla", "fla-core"), ("flash_qla", "flash-qla")])
def test_what_is_not_installed_is_named(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{backend} is not installed \(pip install {package}==\d"):
        memory.choose("cuda", torch.bfloat16, 128, backend)


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


def test_the_memory_runs_where_no_kernels_are_installed() -> None:
    script = (
        "import sys; sys.modules |= dict.fromkeys(('triton', 'fla', 'flash_qla'))\n"
        "import torch; from sleeptrain import memory\n"
        "x, g = torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1)\n"
        "memory.apply(x, x, x, g, g, torch.zeros(1, 1, 2, 2))\n"
        "memory.short_convolution(x[..., 0], None, None, None, 1)\n"
        "memory.gated_rms_norm(x, x, x[0, 0, 0], 1e-6)\n"
        "memory.gates_of_logits(g, None, None)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
