"""Losses of replay rows: tensors in, one value a row out; nothing here knows a disk, a trainer or another process."""

from gere.losses.bands import Bands as Bands
from gere.losses.bands import mean_std_bands as mean_std_bands
from gere.losses.codes import pack as pack
from gere.losses.codes import regions as regions
from gere.losses.codes import unpack as unpack
from gere.losses.cross_entropy import next_token_ce as next_token_ce
from gere.losses.cross_entropy import token_ce as token_ce
from gere.losses.imitation import l1_distance as l1_distance
from gere.losses.imitation import l2_distance as l2_distance
from gere.losses.kl import TopLogits as TopLogits
from gere.losses.kl import token_kl as token_kl
from gere.losses.kl import top_k_kl as top_k_kl
from gere.losses.kl import top_logits as top_logits
from gere.losses.margin import MarginSums as MarginSums
from gere.losses.margin import Normalization as Normalization
from gere.losses.margin import margin_sums as margin_sums
from gere.losses.margin import normalize_margin as normalize_margin
from gere.losses.margin import threshold_margin as threshold_margin
