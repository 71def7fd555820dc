"""Fine-tuning tasks: sequence classification and extractive question answering."""
