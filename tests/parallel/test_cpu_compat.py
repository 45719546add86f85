"""The run's device decides, not what else the machine has."""

import pytest
import torch

from sleeptrain.parallel.cpu_compat import cuda_means_cpu, prepare_deepspeed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[False, True], ids=["no GPU", "a GPU"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: request.param)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)


@pytest.mark.usefixtures("machine")
def test_on_the_cpu_whatever_asks_for_cuda_gets_the_cpu() -> None:
    with cuda_means_cpu(CPU):
        assert torch.empty(2, device="cuda").device == CPU
        assert torch.cuda.current_device() == CPU
    assert torch.cuda.current_device() == 3


@pytest.mark.usefixtures("machine")
def test_on_cuda_nothing_is_entered() -> None:
    with cuda_means_cpu(CUDA):
        assert torch.cuda.current_device() == 3
        assert torch.zeros(2, device="meta").device.type == "meta"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("device", "told"), [(CPU, "cpu"), (CUDA, None)])
def test_deepspeed_is_told_of_the_cpu_alone(
    device: torch.device, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {})
    prepare_deepspeed(device)
    import os

    assert os.environ.get("DS_ACCELERATOR") == told
