"""Texts that the base model writes for its own replay: how they are sampled, what is dropped, what is kept."""

from gere.writing.kept import anchored_texts as anchored_texts
from gere.writing.kept import base_texts as base_texts
