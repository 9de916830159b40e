"""Settings of every test."""

import torch

torch.set_num_threads(1)  # the tests' models are so small that threads only wait for each other
