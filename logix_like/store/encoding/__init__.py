"""From rows of numbers to the bytes that are stored, and back."""
