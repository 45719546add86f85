"""Models that never sleep, to stand beside one that does (method: what else the same compute could buy).

N = 1 and N = 1 trained longer are columns of the study itself; these change the model.
"""

from sleeptrain.config import Config
from sleeptrain.study.spec import NUM_PASSES, Control, Settings

TITLES: dict[str, str] = {
    "deeper": "deeper: blocks repeated until a pass costs as much as all passes of the sleeping model",
    "wider_state": "wider state: fast weights with N times the columns, for the largest N",
    "full_attention": "full attention: a transformer that sees the whole sequence at once",
    "cleared_cache": "cleared cache: a transformer without fast weights, which remembers nothing",
}


def changes_of(control: Control, config: Config, flops_ratio: float) -> Settings:
    """Settings that turn a run of N passes into the control; ``flops_ratio``: its FLOPs over those of N =
    1."""
    model, num_passes = config.model, config.sleep.num_passes
    num_blocks = len(model.blocks)
    awake: Settings = {NUM_PASSES: 1, "sleep.min_passes": 1, "sleep.passes_schedule": "fixed"}
    attention: Settings = {
        "model.pattern": "attn",
        "model.pattern_repeats": num_blocks,
        "model.prelude_blocks": 0,
        "model.coda_blocks": 0,
        "sleep.learned_initial_state": False,
    }
    changes: dict[str, Settings] = {
        "deeper": {"model.pattern_repeats": model.pattern_repeats * max(2, round(flops_ratio))},
        "wider_state": {"model.memory_value_dim": model.memory_value_dim * num_passes},
        "full_attention": attention | {"sleep.window_tokens": 0},
        "cleared_cache": attention,
    }
    return awake | changes[control]
