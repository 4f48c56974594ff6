"""Teachers: samples to blocks of raw logits."""

from logitstore.teachers.base import (
    Classifier,
    Teacher,
    TeacherOptions,
    load_classifier,
    load_teacher,
)

__all__ = ["Classifier", "Teacher", "TeacherOptions", "load_classifier", "load_teacher"]
