"""Checkpoints and what keeps a long run alive."""
