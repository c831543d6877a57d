"""Students: one-step generators initialised from their teacher, saved and loaded."""

from flowdistill.students.description import describe
from flowdistill.students.flow_map import FlowMap
from flowdistill.students.generator import START_UNITS, Generator, generated, given_times, start_time
from flowdistill.students.info import StudentInfo
from flowdistill.students.loading import exported_student, load_student
from flowdistill.students.storage import find_student, is_student_folder
from flowdistill.students.student import STUDENT_KINDS, Student

__all__ = [
    "FlowMap",
    "START_UNITS",
    "STUDENT_KINDS",
    "Generator",
    "Student",
    "StudentInfo",
    "describe",
    "exported_student",
    "find_student",
    "generated",
    "given_times",
    "is_student_folder",
    "load_student",
    "start_time",
]
