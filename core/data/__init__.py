"""Turn files into micro-batches: indexed datasets, sample order, tokenizers, the loader.

Nothing here knows the mesh: a data-parallel replica is two plain numbers (loader.Replica).
"""
