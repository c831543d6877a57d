"""Teachers: any supported diffusers pipeline, or an exact one, as a velocity field on the linear path."""

from flowdistill.teachers.loading import load_teacher
from flowdistill.teachers.teacher import Teacher

__all__ = ["Teacher", "load_teacher"]
