"""The line from base to tuned weights: base decay pulls the model along it while it trains."""

from gere.blend.base import BaseWeights as BaseWeights
from gere.blend.base import find_base as find_base
from gere.blend.decay import BaseDecay as BaseDecay
from gere.blend.decay import DecayCallback as DecayCallback
from gere.blend.schedule import pulls as pulls
