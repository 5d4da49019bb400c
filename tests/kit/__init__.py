"""What the tests share: a trainer to start, corpora, checkpoints, sounds, planted faults."""

import os
import sys
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "examples"), str(_ROOT / "benchmarks")]

# Tiny tensors: threads cost more than they bring, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
