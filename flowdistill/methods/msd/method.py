"""MSD: multi-student distillation (Song et al., arXiv 2410.23274), a partition of conditions over any one-step method.

    V_1 ... V_K = partition(conditions)                     disjoint, of equal size, close conditions together
    start       = the teacher, or a smaller network after teacher score matching (Eq. 8), shared by all students
    for each k, on its own:
        G_k = host(teacher, conditions of V_k, start)       distribution matching; paired regression on ALL pairs
        G_k = host with an adversarial term (optional)      from the last G_k; real images of V_k only
    sample(y) = G_k(noise, y) for the k that owns y

So MSD is no loss: it is K runs of the host, whose teacher draws some of its conditions only. ``settings`` has what is
set, ``partition`` the parts, ``runs`` the runs and their configurations, ``student`` the K students as one.
"""

from __future__ import annotations

from flowdistill.config import RunConfig, register_method
from flowdistill.methods.msd.partition import PROMPT_RULES
from flowdistill.methods.msd.runs import distill_students, host_run
from flowdistill.methods.msd.settings import MsdConfig
from flowdistill.teachers import Teacher
from flowdistill.training.method import About, Method, Suggestion
from flowdistill.training.run import Run, method_class


@register_method
class Msd(Method):
    """MSD as ``distill`` sees it: not a method that trains, but a plan of several runs."""

    name = "msd"
    Config = MsdConfig
    about = About("several students, each for its share of the classes or prompts, by another method",
                  "MSD, arXiv 2410.23274", data="as the host", calls="as the host", networks="as the host")

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        host = method_class(MsdConfig.usual_host)
        found = [Suggestion("method.host.name", MsdConfig.usual_host, "the method that trains each student")]
        if teacher.prompts is not None:
            found.insert(0, Suggestion("method.partition", PROMPT_RULES[0], "how the prompts are shared out"))
        return found + [each._replace(key=each.key.replace("method.", "method.host.", 1))
                        if each.key.startswith("method.") else each for each in host.suggest(teacher, guidance)]

    @classmethod
    def distill(cls, config: RunConfig) -> Run:
        return distill_students(config)

    @classmethod
    def representative_run(cls, config: RunConfig) -> RunConfig:
        """The host's own run: no student takes more than that."""
        return host_run(config)
