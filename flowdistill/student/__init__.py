"""Students: one-step generators initialised from their teacher, saved, loaded and exported."""

from flowdistill.student.base import Student, StudentInfo
from flowdistill.student.export import export
from flowdistill.student.flow_map import FlowMap
from flowdistill.student.generator import START_UNITS, Generator, generated, start_time
from flowdistill.student.routed import RoutedStudent, write_manifest
from flowdistill.student.shapes import parameters, reshaped, smaller
from flowdistill.student.storage import find_student, is_student_folder, load_student

__all__ = [
    "FlowMap",
    "START_UNITS",
    "Generator",
    "RoutedStudent",
    "Student",
    "StudentInfo",
    "export",
    "find_student",
    "generated",
    "is_student_folder",
    "load_student",
    "parameters",
    "reshaped",
    "smaller",
    "start_time",
    "write_manifest",
]
