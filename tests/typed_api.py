"""What a user's code sees of the types of ``import ig_dist``: checked by mypy, not run."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import ig_dist
from ig_dist.models.dit import DiT
from ig_dist.sampling.pictures import Images

pipe = ig_dist.load("runs/digits", ema=0.995, device="cpu")
assert_type(pipe, ig_dist.Pipeline)
assert_type(pipe(labels=[207, "golden retriever"], ig_scale=1.4, cfg_interval=(0, 0.7)), Images)
assert_type(pipe(num=8, seed=0)[0], Image.Image)
assert_type(pipe(num=8)[2:4], Images)
assert_type(pipe(range(10), output="numpy"), NDArray[np.uint8])
assert_type(pipe(np.arange(10), steps=8, output="latents"), Tensor)
assert_type(pipe.decode(pipe.noise(2), output="torch"), Tensor)
assert_type(pipe.velocity(pipe.noise(2), 0.5, 3, ig_scale=1.4), Tensor)
assert_type(pipe.model, DiT)
assert_type(ig_dist.grid([pipe(num=2), pipe(num=2)]), Image.Image)
assert_type(ig_dist.train("digits", "train.steps=100", run={"dir": "runs/mine"}), Path)
assert_type(ig_dist.encode("digits", Path("runs/digits-data")), str)
assert_type(ig_dist.sweep("runs/digits", ig_scale=[1.0, 1.4]), dict[str, Any])
pipe(num=2, stesp=3)  # type: ignore[call-overload]
