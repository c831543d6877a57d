"""Helpers that know nothing of diffusion: files, processes, randomness, hashing, images, logging."""
