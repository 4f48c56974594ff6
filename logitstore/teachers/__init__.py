"""Teachers: samples to blocks of raw logits."""

from logitstore.teachers.base import Teacher, TeacherOptions, load_teacher

__all__ = ["Teacher", "TeacherOptions", "load_teacher"]
