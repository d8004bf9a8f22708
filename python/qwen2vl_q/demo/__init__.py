"""What the packaged model knows: its cards."""
