"""What cannot be spread over processes is refused before they meet."""

import pytest

from sleeptrain.config import Config, ParallelConfig, SleepConfig
from sleeptrain.parallel.place import Alone, open_place
from sleeptrain.schema import ConfigError

LEARNED = SleepConfig(window_tokens=12, halting="learned")


@pytest.mark.parametrize("degree", ["tensor_size", "pipeline_size", "data_size"])
def test_learned_halting_is_of_one_process(degree: str) -> None:
    config = Config(sleep=LEARNED, parallel=ParallelConfig(**{degree: 2}))
    with pytest.raises(ConfigError, match=r"sleep\.halting=learned"), open_place(config, 4, 26):
        pass


def test_learned_halting_is_refused_where_a_launcher_started_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(sleep=LEARNED)
    with open_place(config, 4, 26) as place:
        assert isinstance(place, Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"sleep\.halting=learned"), open_place(config, 4, 26):
        pass
