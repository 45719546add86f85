"""R20: keys and tokens of the environment are in no file of the run folder: logs, settings, checkpoints,
metrics, what wandb keeps; be it a run that ends well, or one that fails with the key in its message."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_runs import Moment, Process, before_step

from sleeptrain.engine import logs
from sleeptrain.engine.logs import rank_log
from sleeptrain.pretrain import main

pytestmark = pytest.mark.more
CANARIES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefcanary01",
    "AWS_SECRET_ACCESS_KEY": "canary02/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "HF_TOKEN": "hf_canary03abcdefghijklmnopqrstuvw",
}
REMOTE_TOKEN = "ghp_canary04ABCDEFGHIJKLMNOPQRSTUV"
NETRC_PASSWORD = "canary05netrc0123456789abcdef0123456789a"
SHORT = ["optim.num_steps=8", "log.wandb=offline"]


@pytest.fixture(autouse=True)
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment, in the home folder, and in the address of the repository that the run starts in."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    repository = tmp_path / "home" / "repository"
    repository.mkdir(parents=True)
    (repository.parent / ".netrc").write_text(f"machine api.wandb.ai login user password {NETRC_PASSWORD}\n")
    monkeypatch.setenv("HOME", str(repository.parent))
    monkeypatch.chdir(repository)
    address = f"https://{REMOTE_TOKEN}:x-oauth-basic@example.invalid/code.git"
    for command in ("init -q", f"remote add origin {address}"):
        subprocess.run(["git", *command.split()], check=True)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "first"], check=True)


def leaks(folder: Path) -> list[str]:
    """Which canary is where, in plain or as the header of a request would hold it."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for name, value in (CANARIES | {"remote": REMOTE_TOKEN, "netrc": NETRC_PASSWORD}).items():
            encoded = base64.b64encode(f"api:{value}".encode())
            if value.encode() in content or encoded in content or value in path.name:
                found.append(f"{name} in {path.relative_to(folder)}")
    return found


def failing_with_a_key(moment: Moment) -> None:
    def fail() -> None:
        print(f"asking with {os.environ['AWS_SECRET_ACCESS_KEY']}")
        raise OSError(f"401 Unauthorized for https://host/?token={os.environ['HF_TOKEN']}")

    before_step(6, fail)


def test_a_run_keeps_no_secret(tmp_path: Path) -> None:
    """R20: with logs, a checkpoint, and all that wandb keeps of it."""
    process = Process(tmp_path / "run", SHORT)
    assert process.wait() == 0, process.output()
    assert (tmp_path / "run" / "checkpoints" / "step_00000008" / "config.json").exists()
    [kept] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"train/loss" in kept.read_bytes()
    assert leaks(tmp_path / "run") == []


def test_a_run_that_fails_with_a_key_in_its_message_keeps_none(tmp_path: Path) -> None:
    """R20: the log names the variable in its place, and the rest of the message is there."""
    process = Process(tmp_path / "run", SHORT, failing_with_a_key)
    assert process.wait() == 98  # the traceback goes on to the terminal
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "OSError: 401 Unauthorized for https://host/?token=<HF_TOKEN>" in log
    assert "asking with <AWS_SECRET_ACCESS_KEY>" in log
    assert leaks(tmp_path / "run") == []


def test_the_log_of_another_rank_keeps_none(tmp_path: Path) -> None:
    """R20: of ranks above 0, which say nothing on the terminal."""

    def speak() -> None:
        print("one with", os.environ["WANDB_API_KEY"])
        print("another with", os.environ["HF_TOKEN"], file=sys.stderr)
        raise OSError(f"401 for {os.environ['HF_TOKEN']}")

    with pytest.raises(OSError, match="401"), rank_log(tmp_path / "run", 1):
        speak()
    log = (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert "one with <WANDB_API_KEY>\nanother with <HF_TOKEN>\n" in log
    assert leaks(tmp_path / "run") == []


@pytest.mark.parametrize("setting", ["log.wandb_project", "run.id", "task.name"])
def test_a_setting_that_holds_a_key_is_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R20: before the run folder is there, and without the value."""
    setting_value = f"{setting}=prefix_{CANARIES['HF_TOKEN']}"
    assert main([f"run.dir={tmp_path}/run", "experiment=quickstart", setting_value]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    if setting != "task.name":  # which is not a known one
        assert f"{setting} holds the value of the environment variable HF_TOKEN" in said
        assert CANARIES["HF_TOKEN"] not in said
    assert not (tmp_path / "run").exists()


def test_a_key_for_wandb_is_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """R20: there is no field that one could put it in."""
    assert main([f"run.dir={tmp_path}/run", f"log.wandb_key={CANARIES['WANDB_API_KEY']}"]) == 2
    said = capsys.readouterr().err
    assert "unknown setting 'log.wandb_key'" in said
    assert CANARIES["WANDB_API_KEY"] not in said
    assert not (tmp_path / "run").exists()


def test_what_only_looks_like_a_secret_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R20: short words, and paths to files that exist."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tokenizers")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SESSION_TOKEN", "short")
    with rank_log(tmp_path / "run", 1):
        print(f"tokenizers {tmp_path} short")
    assert (tmp_path / "run" / "logs" / "rank_1.log").read_text() == f"tokenizers {tmp_path} short\n"


def test_it_would_notice_what_wandb_keeps_by_itself(tmp_path: Path) -> None:
    """Negative control of R20: the address of the repository, with its token."""
    code = f"import wandb; wandb.init(dir={str(tmp_path / 'run')!r}, mode='offline', project='p').finish()"
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert any(leak.startswith("remote in wandb/") for leak in leaks(tmp_path / "run"))


def test_it_would_notice_a_message_that_is_not_cleaned(tmp_path: Path) -> None:
    """Negative control of R20."""

    def sabotage(moment: Moment) -> None:
        logs.secrets = dict
        failing_with_a_key(moment)

    Process(tmp_path / "run", SHORT[:1], sabotage).wait()
    assert {leak.split()[0] for leak in leaks(tmp_path / "run")} == {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"}
