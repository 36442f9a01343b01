"""What every test finds in place: Triton's interpreter where there is no GPU, and ranks that end with the run."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny models: a second thread only waits
