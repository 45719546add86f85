"""Worker or driver, and what is refused before anything starts."""

import os
import subprocess
from pathlib import Path

import pytest
from e2e_runs import TINY, command

from sleeptrain.config import ClusterConfig, Config, DataConfig, ParallelConfig
from sleeptrain.pretrain import main
from sleeptrain.schema import ConfigError

TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}


def test_where_rank_is_set_it_trains_whatever_the_cluster(tmp_path: Path) -> None:
    """As under torchrun with the settings of a Ray job: no Ray is looked for."""
    ranked = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "RAY_ADDRESS": "127.0.0.1:1"}
    few = ("cluster=ray", "optim.num_steps=2", "run.device=cpu")
    done = subprocess.run(command(tmp_path / "run", *few), env=ranked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*2"))) == 1


@pytest.mark.more
def test_local_procs_becomes_torchrun(tmp_path: Path) -> None:
    settings = ("cluster=local_procs", "parallel=dp2", "optim.num_steps=2", "run.device=cpu")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(tmp_path / "run", *settings), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "logs" / "rank_1.log").is_file()


@pytest.mark.parametrize(
    ("environ", "setting", "sentence"),
    [
        (TASK, "cluster=local", "srun started 4 tasks, and cluster.kind=local would make each of them a run"),
        ({}, "cluster=slurm", "cluster=slurm is for a task that srun started, and this is none"),
    ],
)
def test_slurm_and_the_settings_must_agree(
    environ: dict[str, str], setting: str, sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main([f"run.dir={tmp_path / 'run'}", *TINY, setting]) == 2
    assert f"error: {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_as_many_workers_as_the_degrees_ask_for() -> None:
    parallel = ParallelConfig(tensor_size=2, pipeline_size=2, data_size=3)
    assert ClusterConfig().workers(parallel) == 12
    assert ClusterConfig().workers(ParallelConfig(tensor_size=2)) == 2
    assert ClusterConfig(kind="ray", num_workers=4).workers(parallel) == 4


@pytest.mark.parametrize(
    ("cluster", "parallel", "sentence"),
    [
        ({"num_workers": 2}, {}, "cluster.num_workers=2 is not for cluster.kind=local"),
        ({"kind": "slurm", "min_workers": 2}, {}, "cluster.min_workers=2 is for cluster=ray"),
        ({"kind": "ray", "num_workers": 0}, {}, "cluster.num_workers=0 must be at least 1"),
        ({"kind": "ray", "max_restarts": -1}, {}, "cluster.max_restarts=-1 must be at least 0"),
        ({"kind": "ray", "num_workers": 3}, {"tensor_size": 2}, "is no multiple of the 2 processes"),
        ({"kind": "ray", "num_workers": 4, "min_workers": 6}, {}, "must be a multiple of 1 up to"),
        ({"kind": "ray", "num_workers": 4, "min_workers": 1}, {"tensor_size": 2}, "must be a multiple of 2"),
        ({"kind": "ray", "min_workers": 2}, {"data_size": 2}, "parallel.data_size=2 fixes it"),
    ],
)
def test_numbers_of_workers_that_do_not_fit(cluster: dict, parallel: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Config(cluster=ClusterConfig(**cluster), parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(("num_workers", "usable"), [(8, 8), (7, 4), (5, 4), (4, 4), (3, 2), (2, 2), (1, 0)])
def test_elastic_replicas_are_whole_and_share_the_batch(num_workers: int, usable: int) -> None:
    ray_worker = pytest.importorskip("sleeptrain.cluster.ray_worker")
    config = Config(data=DataConfig(batch_sequences=8), parallel=ParallelConfig(tensor_size=2))
    assert ray_worker.usable_workers(config, num_workers) == usable


def test_the_command_of_local_sh_names_its_number_of_processes(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "launchers" / "local.sh"
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run([script, "3", "run.id=a"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [
        *("-m", "sleeptrain.pretrain", "cluster=local_procs", "cluster.num_workers=3", "run.id=a")
    ]
