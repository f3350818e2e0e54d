"""What is left of general ability: held-out loss and multiple-choice accuracy, in a training or by themselves."""

from gere.evaluation.callback import GeneralAbilityCallback as GeneralAbilityCallback
from gere.evaluation.choices import ChoiceScore as ChoiceScore
from gere.evaluation.choices import choice_accuracy as choice_accuracy
from gere.evaluation.choices import option_scores as option_scores
from gere.evaluation.general import general_loss as general_loss
from gere.evaluation.questions import Question as Question
from gere.evaluation.questions import read_questions as read_questions
from gere.model.forward import evaluating as evaluating
