"""Results as pages to read in a browser."""
