"""One thread: the suite's results and its time do not depend on the number of cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
