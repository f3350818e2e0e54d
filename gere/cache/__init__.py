"""The anchor: what the base model says about the replay set, on disk."""

from gere.cache.bands import BandRule as BandRule
from gere.cache.bands import Bands as Bands
from gere.cache.bands import MeanStd as MeanStd
from gere.cache.bands import Moments as Moments
from gere.cache.bands import Quantiles as Quantiles
from gere.cache.bands import mean_std_bands as mean_std_bands
from gere.cache.build import build_anchor as build_anchor
from gere.cache.codec import pack as pack
from gere.cache.codec import regions as regions
from gere.cache.codec import unpack as unpack
from gere.cache.plan import BuildPlan as BuildPlan
from gere.cache.plan import Distilled as Distilled
from gere.cache.resolve import named_fields as named_fields
from gere.cache.resolve import open_named as open_named
from gere.cache.resolve import open_or_build as open_or_build
from gere.cache.resolve import refuse_other_base as refuse_other_base
from gere.cache.store import Anchor as Anchor
from gere.cache.targets import Likeliest as Likeliest
from gere.cache.targets import Live as Live
from gere.cache.targets import Losses as Losses
from gere.cache.targets import Regions as Regions
from gere.cache.targets import States as States
from gere.cache.targets import Target as Target
