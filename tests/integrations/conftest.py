"""Small networks on one thread; nothing is fetched."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("KERAS_BACKEND", "torch")

# For the helpers of tests/test_docs.py.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

torch.set_num_threads(1)
