"""The conclusion of a study follows from what its seeds can tell apart."""

from collections.abc import Sequence

import pytest

from sleeptrain.study.statistics import Paired, estimate
from sleeptrain.study.verdict import Against, conclusion

SURE, UNSURE, SURE_LOSS = (0.10, 0.11, 0.12), (0.10, -0.08, 0.05), (-0.10, -0.11, -0.12)


def gains(*seeds: Sequence[float]) -> list:
    return [(Against(2, estimate([0.5]), 10, Paired(estimate(one), 0, 0, 0, 1.0)), {}) for one in seeds]


@pytest.mark.parametrize(
    ("at_tokens", "at_flops", "said"),
    [
        (gains(UNSURE), gains(UNSURE), "does not tell whether more passes help"),
        (gains((0.3,)), gains((0.3,)), "does not tell whether more passes help"),  # one seed is no proof
        (gains(SURE), gains(SURE), "from the same compute, too"),
        (gains(SURE), gains(SURE_LOSS), "but less from the same compute"),
        (gains(SURE_LOSS, SURE_LOSS, UNSURE), gains(SURE), "they are ahead at equal compute"),
        (gains(UNSURE), gains(SURE_LOSS), "but less from the same compute"),
        (gains(SURE_LOSS), gains(SURE_LOSS), "do not help at this scale"),
    ],
)
def test_it_says_what_is_beyond_the_spread(at_tokens: list, at_flops: list, said: str) -> None:
    assert said in conclusion(at_tokens, at_flops, "exact_accuracy")


def test_where_less_is_better_a_fall_is_a_gain() -> None:
    assert "from the same compute, too" in conclusion(gains(SURE_LOSS), gains(SURE_LOSS), "loss")
