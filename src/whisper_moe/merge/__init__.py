"""Fine-tuned Whispers become the experts of one model."""
