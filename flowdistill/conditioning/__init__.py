"""Conditions: class labels and prompts as named tensors, shared by teachers and students."""

from flowdistill.conditioning.conditions import ClassLabels, Condition

__all__ = ["ClassLabels", "Condition"]
