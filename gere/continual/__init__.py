"""Sequences of tasks: one model over tasks 1..T, all tasks evaluated after each, resumed where a kill left it."""

from gere.continual.answers import Scores as Scores
from gere.continual.answers import greedy_answers as greedy_answers
from gere.continual.answers import likeliest_answers as likeliest_answers
from gere.continual.answers import normalised as normalised
from gere.continual.answers import score as score
from gere.continual.folder import Matrix as Matrix
from gere.continual.sequence import Measure as Measure
from gere.continual.sequence import run as run
from gere.continual.settings import SequenceSettings as SequenceSettings
from gere.continual.settings import read_sequence as read_sequence
from gere.continual.tasks import Task as Task
from gere.continual.tasks import read_task as read_task
from gere.continual.trainers import TrainerFactory as TrainerFactory
from gere.evaluation.examples import TaskRow as TaskRow
