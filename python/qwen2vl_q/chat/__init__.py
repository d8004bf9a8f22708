"""Conversations, and the prompts that a template makes of them."""
