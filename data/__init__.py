"""Documents, and how they become packed batches."""
