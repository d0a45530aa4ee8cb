"""Particle stacks: how they are read, prepared and simulated."""
