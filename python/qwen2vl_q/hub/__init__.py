"""Models by their name on the Hugging Face hub: found, fetched, converted once, kept."""
