"""From files to micro-batches: indexed datasets, sample order, tokenizers, the loader.

Knows no mesh: dp_rank and dp_size are numbers.
"""
