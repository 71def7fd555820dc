"""Fine-tuning tasks: classification of sequences, extractive question answering."""
