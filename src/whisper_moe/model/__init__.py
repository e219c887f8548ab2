"""Packs to states: attention, test-time training and mixtures of experts on flat [tokens, width] tensors."""
