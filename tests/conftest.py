"""Settings of every test."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tests' models are so small that threads only wait for each other

settings.register_profile("stnify", deadline=None)  # the first call of an operation takes long
settings.load_profile("stnify")
