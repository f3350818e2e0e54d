"""General texts, from wherever they are, as rows of token ids and as batches."""

from gere.replay.rows import ReplaySet as ReplaySet
from gere.replay.rows import load_replay_set as load_replay_set
from gere.replay.rows import tokenize as tokenize
from gere.replay.texts import load_texts as load_texts
