"""Pictures, as the vision tower takes them."""
