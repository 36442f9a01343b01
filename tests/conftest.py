"""Use Triton's interpreter where there is no GPU, and one thread in every test."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny models: a second thread only waits
