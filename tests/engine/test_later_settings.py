"""Which changes of a run between two starts count."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sleeptrain.config import Config, ModelConfig
from sleeptrain.engine.resume import require_same_run, versions
from sleeptrain.schema import ConfigError, from_dict, to_dict


class Saved(NamedTuple):
    """What of a checkpoint is compared."""

    documents: dict[str, Any]
    path: Path = Path("checkpoints/step_10")


def test_a_setting_that_came_after_the_checkpoint_had_its_default() -> None:
    before, now = ({"config": to_dict(Config()), "versions": {}} for _ in range(2))
    del before["config"]["sleep"]["halting"]
    require_same_run(Saved(before), now, change_allowed=False)  # type: ignore[arg-type]
    now["config"]["sleep"]["halting"] = "learned"
    with pytest.raises(ConfigError, match=r'sleep.halting: saved "none", now "learned"; go back'):
        require_same_run(Saved(before), now, change_allowed=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "package"), [("auto", "triton"), ("fla", "fla-core"), ("flash_qla", "flash-qla")]
)
def test_another_library_of_kernels_counts_where_they_are_used(
    backend: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = tmp_path / f"{package.replace('-', '_')}-9.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.8+local\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = from_dict(Config, {"model": {"memory_backend": backend}, "run": {"deterministic": False}})
    now = {"config": to_dict(config), "versions": versions()}
    assert now["versions"][package] == "9.8"
    before = now | {"versions": now["versions"] | {package: "9.7"}}
    with pytest.raises(ConfigError, match=rf'versions\.{package}: saved "9\.7", now "9\.8"; go back'):
        require_same_run(Saved(before), now, change_allowed=False)  # type: ignore[arg-type]
    require_same_run(Saved(before), now, change_allowed=True)  # type: ignore[arg-type]
    warning = f'warning: going on with other settings, versions.{package}: saved "9.7", now "9.8"\n'
    assert capsys.readouterr().out == warning
    if backend != "auto":
        elsewhere = now | {"config": to_dict(replace(config, model=ModelConfig()))}
        require_same_run(Saved(before), elsewhere, change_allowed=False)  # type: ignore[arg-type]
    del before["versions"][package]
    require_same_run(Saved(before), now, change_allowed=False)  # type: ignore[arg-type]
