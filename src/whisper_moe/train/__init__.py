"""Recipes to runs: the loop, its losses and optimizer, and what survives a kill at any moment."""
