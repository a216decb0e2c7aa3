"""One thread a process: the tests run in several, and small sums gain nothing."""

import torch

torch.set_num_threads(1)
