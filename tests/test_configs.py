"""The files of configs/: every experiment and every baseline composes, and trains."""

from pathlib import Path

import pytest
import yaml

from sleeptrain.config import DepoConfig, GSMInfiniteConfig, RecallConfig, Rule110Config, TextConfig
from sleeptrain.data.stream import TrainStream
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.pretrain import CONFIGS, compose_config, main
from sleeptrain.schema import to_dict
from sleeptrain.tasks import make_task

H200_GB = 149  # 139 GiB


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", names("experiment"))
def test_an_experiment_composes_under_its_own_name(experiment: str) -> None:
    config = compose_config([f"experiment={experiment}"])
    assert config.run.id == experiment
    assert Path(config.run.dir) == Path("runs") / experiment
    assert compose_config([f"experiment={experiment}", "run.id=mine"]).run.dir == "runs/mine"


@pytest.mark.more
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(
    "experiment", ["ouro_gsm", "ouro_sliding_stage1", "ouro_sliding", "jet_nemotron_gsm"]
)
def test_a_dry_run_of_the_papers_retrofits_fits_an_h200_without_their_weights(
    experiment: str, gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no imported model there
    degrees = ["parallel.backend=megatron_deepspeed", f"parallel.data_size={gpus}"]
    assert main([f"experiment={experiment}", "dry_run=true", *degrees]) == 0
    text = capsys.readouterr().out
    assert "is not here yet: planned with bytes" in text
    assert f"x data {gpus}" in text
    needs = text.split("fullest moment")[1].splitlines()[2].split()
    assert needs[0] == "0"  # the only stage
    assert needs[-1] == "G"
    assert 20 < float(needs[-2]) < 0.9 * H200_GB
    assert ("are new" in text) == (experiment in ("ouro_gsm", "ouro_sliding_stage1"))


@pytest.mark.parametrize("baseline", names("baseline"))
def test_a_baseline_takes_a_step_from_its_loss(baseline: str) -> None:
    settings = [
        "experiment=quickstart",
        f"baseline={baseline}",
        "data.batch_sequences=4",
        "model.init_std=0.02",
    ]
    config = compose_config(settings)
    task = make_task(config.task)
    backend = LocalBackend(config, task.vocab_size)
    before = {name: p.detach().clone() for name, p in backend.model.named_parameters()}
    batch = TrainStream(task, 0, 4, config.sleep.window_tokens).batch(0)
    result = backend.forward_backward(batch, config.sleep.num_passes)
    assert 0.1 < float(result.loss) < 10
    assert backend.step(1.0, result.loss).applied
    unchanged = [n for n, p in backend.model.named_parameters() if (p == before[n]).all()]
    assert not unchanged


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rule110", Rule110Config),
        ("depo", DepoConfig),
        ("recall", RecallConfig),
        ("text", TextConfig),
        ("gsm_infinite", GSMInfiniteConfig),
    ],
)
def test_a_task_file_holds_the_defaults_of_its_dataclass(name: str, kind: type) -> None:
    """Hydra lets only written keys be changed, so every field has to stand there."""
    written = yaml.safe_load((CONFIGS / "task" / f"{name}.yaml").read_text())
    assert written == to_dict(kind())
