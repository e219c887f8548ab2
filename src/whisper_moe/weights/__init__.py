"""Weights in and out: Whispers of every origin, and this project's own checkpoint directories."""
