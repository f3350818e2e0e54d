"""Values that the official code computed. Set GERE_DATA to the folder that holds golden/official_rows.safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gere.cache import pack, regions, unpack
from gere.losses.cross_entropy import next_token_ce
from gere.losses.margin import threshold_margin

GOLDEN = Path(os.environ.get("GERE_DATA", "")) / "golden" / "official_rows.safetensors"
pytestmark = pytest.mark.skipif(not GOLDEN.is_file(), reason="GERE_DATA is not set to the recorded values")


@pytest.mark.parametrize("case", range(20))
def test_official_values(case):
    stored = {name[3:]: value for name, value in load_file(GOLDEN).items() if name.startswith(f"{case:02d}.")}
    lower, upper = stored["mean"] - stored["std"], stored["mean"] + stored["std"]
    region = unpack(pack(regions(stored["base_state"], lower, upper)), len(lower))
    mask = stored["mask"][None]
    margin = threshold_margin(stored["state"][None], region[None], lower, upper, mask)
    ce = next_token_ce(stored["logits"][None], stored["input_ids"][None], mask)
    torch.testing.assert_close(margin[0], stored["tm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ce[0], stored["ce"], rtol=1e-5, atol=0)
