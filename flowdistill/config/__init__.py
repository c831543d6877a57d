"""Run configurations: dataclasses, YAML files, ``key=value`` overrides, and one-sentence errors.

A file holds the sections of :class:`RunConfig`. The type of ``method`` follows from ``method.name`` through
``flowdistill.methods.METHODS``, so a new method brings its own settings without a line here. A file may name a base
with ``defaults_from: other.yaml`` (relative to itself), whose values lie underneath its own.

Importing this package costs neither torch nor OmegaConf.
"""

from flowdistill.config.checks import validate
from flowdistill.config.loading import load_config, method_config_class, save_config
from flowdistill.config.schema import (
    MISSING,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    option,
)

__all__ = [
    "MISSING",
    "EvaluationConfig",
    "OptimizerConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
    "method_config_class",
    "option",
    "save_config",
    "validate",
]
