"""The anchor: what the base model says about the replay set, on disk."""

from gere.cache.build import build_anchor as build_anchor
from gere.cache.plan import BuildPlan as BuildPlan
from gere.cache.plan import Distilled as Distilled
from gere.cache.resolve import named_fields as named_fields
from gere.cache.resolve import open_named as open_named
from gere.cache.resolve import open_or_build as open_or_build
from gere.cache.store import Anchor as Anchor
from gere.losses.bands import BandRule as BandRule
from gere.losses.bands import Bands as Bands
from gere.losses.bands import MeanStd as MeanStd
from gere.losses.bands import Moments as Moments
from gere.losses.bands import Quantiles as Quantiles
from gere.losses.bands import mean_std_bands as mean_std_bands
from gere.losses.codes import pack as pack
from gere.losses.codes import regions as regions
from gere.losses.codes import unpack as unpack
