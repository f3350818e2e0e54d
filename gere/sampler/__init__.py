"""Which row comes next: pure functions of seed, epoch and geometry."""

from gere.sampler.insertion import BatchInsertionSampler as BatchInsertionSampler
from gere.sampler.insertion import added_rows as added_rows
from gere.sampler.insertion import parent_order as parent_order
from gere.sampler.insertion import replay_stream as replay_stream
