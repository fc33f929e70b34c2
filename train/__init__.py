"""Recipes, stages and the training loop."""
