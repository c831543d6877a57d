"""Students: one-step generators initialised from their teacher, saved and loaded."""

from flowdistill.students.flow_map import FlowMap
from flowdistill.students.generator import START_UNITS, Generator, generated, start_time
from flowdistill.students.storage import find_student, is_student_folder, load_student
from flowdistill.students.student import Student, StudentInfo

__all__ = [
    "FlowMap",
    "START_UNITS",
    "Generator",
    "Student",
    "StudentInfo",
    "find_student",
    "generated",
    "is_student_folder",
    "load_student",
    "start_time",
]
