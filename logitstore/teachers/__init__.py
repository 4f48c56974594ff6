"""Teachers: samples to blocks of raw logits."""

from logitstore.teachers.base import (
    DTYPES,
    Classifier,
    Teacher,
    TeacherOptions,
    load_classifier,
    load_teacher,
)

__all__ = ["DTYPES", "Classifier", "Teacher", "TeacherOptions", "load_classifier", "load_teacher"]
