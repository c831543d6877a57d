"""Methods, by name. A new method is one file and one line here."""

METHODS: dict[str, str] = {
    "boot": "flowdistill.methods.boot:Boot",
    "data_flow_map": "flowdistill.methods.data_flow_map:DataFlowMap",
    "diff_instruct": "flowdistill.methods.score_distillation:DiffInstruct",
    "disback": "flowdistill.methods.disback:DisBack",
    "dmd2": "flowdistill.methods.score_distillation:Dmd2",
    "echodistill": "flowdistill.methods.echodistill.method:EchoDistill",
    "freeflow": "flowdistill.methods.freeflow:FreeFlow",
    "msd": "flowdistill.methods.msd.method:Msd",
    "sid": "flowdistill.methods.score_distillation:Sid",
    "tsm": "flowdistill.methods.teacher_score_matching:TeacherScoreMatching",
}
"""Method name -> ``module:Class``, imported only when used; the class has ``Config``, its settings' dataclass."""
