"""Objectives: pure functions of tensors, one file a family, each tested against a closed form."""
