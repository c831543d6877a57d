"""Run configurations: dataclasses, YAML files, ``key=value`` overrides, and one-sentence errors.

A file holds the sections of :class:`RunConfig`. The type of ``method`` follows from ``method.name`` through
``METHODS``, so a new method brings its own settings without a line here. A file may name a base
with ``defaults_from: other.yaml`` (relative to itself), whose values lie underneath its own.

Importing this package costs neither torch nor OmegaConf.
"""

from flowdistill.config.checks import check_texts, validate
from flowdistill.config.loading import accept_former_names, load_config, method_config_class, save_config
from flowdistill.config.registry import METHODS, register_method
from flowdistill.config.run_folder import found_again, run_settings, teacher_found_again
from flowdistill.config.schema import (
    FEATURES,
    MISSING,
    PROTOCOLS,
    SCORERS,
    DataOptions,
    EvaluationConfig,
    HostingConfig,
    OptimizerConfig,
    RunConfig,
    StopConfig,
    TeacherConfig,
    TrainConfig,
    check_protocol_features,
    needs,
    option,
    what_is_missing,
)

__all__ = [
    "FEATURES",
    "METHODS",
    "MISSING",
    "PROTOCOLS",
    "SCORERS",
    "DataOptions",
    "EvaluationConfig",
    "HostingConfig",
    "OptimizerConfig",
    "RunConfig",
    "StopConfig",
    "TeacherConfig",
    "TrainConfig",
    "accept_former_names",
    "check_protocol_features",
    "check_texts",
    "found_again",
    "load_config",
    "method_config_class",
    "needs",
    "option",
    "register_method",
    "run_settings",
    "save_config",
    "teacher_found_again",
    "validate",
    "what_is_missing",
]
