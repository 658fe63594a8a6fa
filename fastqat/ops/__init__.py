"""Operators: their schemas, their backends, and the choice among them. Nothing here knows of autograd or training."""
