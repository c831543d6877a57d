"""MSD (Song et al., arXiv 2410.23274): multi-student distillation."""

from flowdistill.methods.msd.method import Msd
from flowdistill.methods.msd.settings import MsdConfig
from flowdistill.methods.msd.student import RoutedStudent

__all__ = ["Msd", "MsdConfig", "RoutedStudent"]
