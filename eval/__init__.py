"""Evaluation: lmms-eval, needle, quality and speed."""
