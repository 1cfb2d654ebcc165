"""The background writer: from batches of rows to committed chunks."""
