"""Tokens read by replaying a real CUDA graph against tokens started kernel by kernel. ``pytest -m gpu``."""

import contextlib

import pytest
import torch
from plain import WINDOW, build, make
from test_decoder import read_by, read_eagerly
from test_ragged import fed_raggedly

from sleeptrain.model.decoder import Decoder
from sleeptrain.model.layers import cast_linear_maps

pytestmark = pytest.mark.gpu
EVERY_KIND = "attn jet gdn swa:3 gdn"


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("low", [False, True])
def test_replayed_tokens_equal_eager_ones(eviction: str, low: bool) -> None:
    """Over windows and sleeps; two rows, then one with a recording of its own."""
    model = build(EVERY_KIND, dtype=torch.float32, eviction=eviction).cuda()
    if low:
        cast_linear_maps(model, torch.bfloat16)

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16, enabled=low)

    ids = make(3 * WINDOW, []).ids.cuda()
    decoder = Decoder(model, autocast)
    for rows in (2, 1):
        with torch.device("cuda"):
            with autocast():
                _, start = fed_raggedly(model, ids[:rows], [(3,) * rows], 3)
                expected, _ = read_eagerly(model, start, ids[:rows, 3:], 3)
            found, _, number = read_by(decoder, start, ids[:rows, 3:], 3)
        assert number > 2 * WINDOW - 2
        tolerance = 3e-2 if low else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
