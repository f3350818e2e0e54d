"""General ability: held-out loss and multiple-choice accuracy, before, during and after a training."""

from gere.ability.callback import GeneralAbilityCallback as GeneralAbilityCallback
from gere.ability.choices import ChoiceScore as ChoiceScore
from gere.ability.choices import choice_accuracy as choice_accuracy
from gere.ability.choices import option_scores as option_scores
from gere.ability.questions import Question as Question
from gere.ability.questions import read_questions as read_questions
