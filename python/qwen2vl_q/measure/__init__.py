"""What a model takes, against what the machine gives."""
