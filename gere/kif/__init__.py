"""Recurrent-KIF and TaSL: fuse a task with the earlier ones of a sequence, entry by entry of the adapter."""

from gere.kif.config import PRESETS as PRESETS
from gere.kif.config import KIFConfig as KIFConfig
from gere.kif.memory import MemoryRow as MemoryRow
from gere.kif.memory import TaskMemory as TaskMemory
from gere.kif.state import read_history as read_history
from gere.kif.trainer import KIFMixin as KIFMixin
from gere.kif.trainer import RecurrentKIFTrainer as RecurrentKIFTrainer
from gere.kif.trainer import recurrent_kif_trainer as recurrent_kif_trainer
