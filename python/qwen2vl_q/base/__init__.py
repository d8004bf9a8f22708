"""What every room uses: errors, text for messages, arguments, files."""
