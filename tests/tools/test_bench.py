"""Each benchmark runs from end to end at tiny sizes and prints its ratio; the figures are not tested."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sleeptrain.config import ModelConfig
from sleeptrain.schema import from_dict, to_dict

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tools" / "bench"
PEERS = ("transformers", "megatron", "fla")

pytestmark = pytest.mark.more


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def numbers_after(label: str, output: str) -> list[float]:
    """The first number of every line that starts with ``label``."""
    return [float(x) for x in re.findall(rf"^{re.escape(label)}: (\d+\.\d+)", output, re.MULTILINE)]


def quick(name: str) -> str:
    done = run(name, "--quick", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert f"{name}.py --quick --rounds 2" in done.stdout
    assert re.search(r"one thread; torch \d", done.stdout)
    assert "PASS" not in done.stdout
    assert "FAIL" not in done.stdout
    return done.stdout


def test_gdn_cpu_compares_equal_results_of_all_peers():
    output = quick("gdn_cpu")
    assert "refused" not in output
    for peer in ("transformers", "megatron", "fla naive"):
        [ratio] = numbers_after(f"ratio {peer} / ours", output)
        assert ratio > 0


@pytest.mark.parametrize("peer", PEERS)
def test_gdn_cpu_names_the_extra_when_a_peer_is_missing(peer):
    hidden = f"import sys, runpy; sys.modules[{peer!r}] = None; sys.argv = ['gdn_cpu.py', '--quick']; "
    script = hidden + f"runpy.run_path({str(BENCH / 'gdn_cpu.py')!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{BENCH}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert peer in done.stderr
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install -e ".[bench]"' in done.stderr


def test_step_overhead_ends_with_equal_weights():
    output = quick("step_overhead")
    assert "equal weights after 6 steps each" in output
    [ratio] = numbers_after("ratio framework / bare", output)
    assert ratio > 0


def test_passes_measures_time_and_memory():
    output = quick("passes")
    rows = re.findall(r"^([12])  +\d+\.\d", output, re.MULTILINE)
    assert rows == ["1", "2", "1", "2"]  # one table of times, one of memory
    assert "ratio per pass / keep all" in output
    assert "growth per extra pass: keep all" in output


def test_latency_times_tokens_awake_and_sleeps() -> None:
    output = quick("latency")
    for name in ("N = 2 / N = 1", "3 windows / 1", "3 windows / 1, attention to all"):
        [ratio] = numbers_after(f"ratio p50, {name}", output)
        assert ratio > 0
    [difference] = numbers_after("worst relative difference of the decoder's logits", output)
    assert difference < 1e-5
    assert "ratio sleep / forwards, worst" in output
    assert "growth of the peak per 10k tokens" in output


def test_tasks_compares_every_task_with_its_model():
    output = quick("tasks")
    rows = re.findall(r"^(rule110|depo|recall|text) .*  \d+\.\d{3} \(cpu \d+\.\d{3}\)$", output, re.MULTILINE)
    assert rows == ["rule110", "rule110", "depo", "recall", "text"]


def test_shards_finds_the_same_samples_on_all_sides():
    output = quick("shards")
    assert "40 samples; all sides find the same" in output
    for peer in ("webdataset", "bytes alone", "tarfile"):
        [ratio] = numbers_after(f"ratio ours, no hash / {peer}", output)
        assert ratio > 0


def test_pipeline_bubble_measures_every_stage_count_and_draws_nothing():
    output = quick("pipeline_bubble")
    assert "timed sleep, 20 ms forward, 40 ms backward (shared cores)" in output
    rows = re.findall(r"^2 +([12]) +([23]) +2 +(\d+\.\d+)", output, re.MULTILINE)
    assert rows == [("1", "2", "20.00"), ("2", "3", "14.29")]
    assert "figure" not in output


def test_parallel_overhead_compares_equal_gradients():
    output = quick("parallel_overhead")
    assert output.count("gradients equal") == 3  # ZeRO 0 and 1 in one process, two replicas beside DDP
    for name in ("parallel, ZeRO 0 / local", "parallel, ZeRO 1 / local", "parallel, ZeRO 1 / DDP"):
        [ratio] = numbers_after(f"ratio {name}", output)
        assert ratio > 0


@pytest.mark.parametrize(
    "name",
    [
        *("gdn_cpu", "step_overhead", "passes", "tasks", "pipeline_bubble", "parallel_overhead", "shards"),
        *("latency", "goodput", "gdn_gpu", "train_gpu", "pass_roofline"),
    ],
)
def test_help_explains_the_figure(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)  # as where the script itself runs
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "--quick" in said
    assert "ratio" in said.lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
@pytest.mark.parametrize(("name", "arguments"), [("gdn_gpu", ["--quick"]), ("train_gpu", [])])
def test_those_of_a_gpu_refuse_to_measure_a_cpu(name: str, arguments: list[str]) -> None:
    done = run(name, *arguments)
    assert done.returncode == 2
    assert done.stderr == f"error: {name}.py measures a CUDA device, and torch sees none here\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_gdn_gpu_leaves_out_a_peer_that_cannot_run_a_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr("sleeptrain.memory.peers.find_spec", lambda name: name)
    script = runpy.run_path(str(BENCH / "gdn_gpu.py"))
    [small], large = script["QUICK_SHAPES"], script["SHAPES"][0]
    assert script["rules_for"](large).keys() == {"ours", "fla", "flash_qla"}
    assert script["rules_for"](small).keys() == {"ours", "fla"}
    sizes = "flash_qla takes keys and values of size 128, not 64 and 64"
    assert capsys.readouterr().out == f"no flash_qla: {sizes}\n"


def test_train_gpu_shows_every_setting_and_traces_a_step(tmp_path: Path) -> None:
    done = run("train_gpu", "--quick", "--rounds", "1", "--profile", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for way in ("kernel by kernel", "graphs"):
        table = done.stdout.partition(f"windows of 24, checkpointing pass, {way}\n")[2]
        assert [line.split()[0] for line in table.splitlines()[:3]] == ["N", "1", "2"]
    [ratio] = numbers_after("ratio kernel by kernel / graphs, windows of 24, N = 2", done.stdout)
    assert ratio > 0
    assert "PASS  two deterministic steps have equal gradients" in done.stdout
    assert (tmp_path / "step_n1_window24_pass.json.gz").stat().st_size > 1000
    assert numbers_after("ratio loss, graphs / kernel by kernel", done.stdout) == [1]


def test_train_gpu_measures_the_model_of_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    script = runpy.run_path(str(BENCH / "train_gpu.py"))
    values = yaml.safe_load((ROOT / "configs" / "model" / "ouro_1b4_jet.yaml").read_text())
    assert script["OURO_JET"] == from_dict(ModelConfig, to_dict(ModelConfig()) | values, "model.")


def test_pass_roofline_counts_less_with_every_variant() -> None:
    output = quick("pass_roofline")
    names = ("plain torch", "rule as kernels", "also what stands around it", "weights cast once")
    ratios = [
        numbers_after(f"ratio of floors, plain torch / {name}", output)[0]
        for name in (*names, "pointwise work compiled")
    ]
    assert ratios == sorted(ratios)
    assert ratios[0] == 1 < ratios[-1]
    [of_token] = numbers_after("ratio of floors, token / weights", output)
    assert 1 < of_token < 2


def test_ray_overhead_compares_the_same_run() -> None:
    done, num_cores = run("ray_overhead", "--quick", "--rounds", "1"), len(os.sched_getaffinity(0))
    assert done.returncode == 0, done.stderr
    label = f"ratio step under ray / under torchrun, {num_cores} processes on {num_cores} cores"
    [ratio] = numbers_after(label, done.stdout)
    assert ratio > 0


def test_goodput_kills_a_run_that_ends_like_the_one_it_did_not_kill() -> None:
    done = run("goodput", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills in " in done.stdout
    assert "PASS  bit-equal to the run without kills" in done.stdout
    [ratio] = numbers_after("ratio effective / formula", done.stdout)
    assert ratio > 0
