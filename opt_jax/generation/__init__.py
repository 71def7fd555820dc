"""From prompts to tokens: options, logits processors, compiled loops, and what runs them."""
