"""Read and write what other engines write: families, names and folders of their models."""
