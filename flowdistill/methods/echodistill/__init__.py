"""EchoDistill (Yang et al., arXiv 2510.20512): a new concept for a one-step text-to-image student."""

from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.methods.echodistill.settings import EchoDistillConfig
from flowdistill.methods.echodistill.student import ConceptStudent

__all__ = ["ConceptStudent", "EchoDistill", "EchoDistillConfig"]
