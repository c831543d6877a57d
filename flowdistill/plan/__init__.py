"""How much memory a run takes, before anything of it is loaded."""

from flowdistill.plan.memory import Plan, make_plan

__all__ = ["Plan", "make_plan"]
