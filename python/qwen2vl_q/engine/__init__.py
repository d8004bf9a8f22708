"""A loaded model: its configuration and parts, prompts, and many answers at once."""
