"""A store as one table of rows, and its views."""
