"""Students: one-step generators initialised from their teacher, saved, loaded and exported."""

from flowdistill.student.export import export
from flowdistill.student.flow_map import FlowMap, StudentInfo
from flowdistill.student.storage import find_student, is_student_folder, load_student

__all__ = ["FlowMap", "StudentInfo", "export", "find_student", "is_student_folder", "load_student"]
