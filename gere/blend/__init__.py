"""The line from base to tuned weights: base decay pulls the model along it, a budget chooses a point of it."""

from gere.blend.base import BaseWeights as BaseWeights
from gere.blend.base import find_base as find_base
from gere.blend.choice import grid as grid
from gere.blend.choice import largest_within as largest_within
from gere.blend.decay import BaseDecay as BaseDecay
from gere.blend.schedule import pulls as pulls
from gere.blend.trained import TrainedWeights as TrainedWeights
from gere.blend.trained import go_to as go_to
