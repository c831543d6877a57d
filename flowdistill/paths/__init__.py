"""The linear path, and the schedule and prediction type of a diffusers scheduler as functions of its time."""

from flowdistill.paths.native_path import Coefficients, NativePath, flow_path, path_from_scheduler

__all__ = ["Coefficients", "NativePath", "flow_path", "path_from_scheduler"]
