"""Corpora to samples, and samples to packs that the model is trained and evaluated on."""
