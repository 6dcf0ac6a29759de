"""The course's exercises, trained again and compared with the course's own results."""

from gptfast.reproduction.exercises import EXERCISES, Exercise, Reproduction, Trained
from gptfast.reproduction.runs import reproduce

__all__ = ["EXERCISES", "Exercise", "Reproduction", "Trained", "reproduce"]
