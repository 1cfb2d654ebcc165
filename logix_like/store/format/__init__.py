"""What a store consists of: documents, arrays, columns and the commit record, each spelt in one place."""
