"""FID, sFID and Inception Score in the features of the original Inception network, through torch-fidelity.

FID: 2048 pooled features (arXiv 1706.08500). sFID: the first 7 channels of Mixed_6d's 1x1 branch at all 17 x 17
places (arXiv 2103.03841, as the guided-diffusion evaluation takes them). IS: the unbiased logits. torch-fidelity is
not among the tested packages: it needs torchvision, of which there is no build for every build of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_tdq.errors import MissingExtraError, UsageError, first_line
from ptq_tdq.evaluate.frechet import feature_statistics, frechet_distance
from ptq_tdq.evaluate.quality import inception_score
from ptq_tdq.files import find_images, read_image, reason

BATCH = 50
SPATIAL_CHANNELS = 7


def load_inception() -> Any:
    """The network of torch-fidelity; raises :class:`MissingExtraError` where the package or its weights are missing."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as module
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise MissingExtraError(
            f"Inception metrics need torch-fidelity with a torchvision that fits torch ({first_line(error)}); "
            "pip install 'ptq-tdq[fidelity]'."
        ) from None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = module.URL_INCEPTION_V3.rpartition("/")[2]
    if not (folder / name).is_file():
        raise MissingExtraError(f"The Inception weights are missing; put {module.URL_INCEPTION_V3} into {folder}.")
    return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])


def find_real(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders; raises :class:`UsageError` where there are fewer than 2."""
    paths = find_images(folder) if folder.is_dir() else []
    if len(paths) < 2:
        raise UsageError(f"'{folder}' is no folder with at least 2 images; pass one with the real images.")
    return paths


def read_real(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Images of files, uint8 [N, 3, H, W] of ``size`` (H, W).

    Raises :class:`UsageError` where one cannot be read or has another size: resizing would change the distances.
    """
    images = []
    for path in paths:
        try:
            images.append(np.asarray(read_image(path)))
        except OSError as error:
            said = f"The image '{path}' cannot be read ({reason(error)}); remove it or copy it again."
            raise UsageError(said) from None
        if images[-1].shape[:2] != size:
            height, width = images[-1].shape[:2]
            raise UsageError(
                f"The image '{path}' is {width}x{height}, the samples are {size[1]}x{size[0]}; "
                "pass images of their size."
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def to_uint8(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] in [-1, 1] -> uint8 [N, 3, H, W]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


@torch.no_grad()
def describe(network: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features [N, 2048], spatial features [N, 2023] and logits [N, 1008] of images uint8 [N, 3, H, W]."""
    spatial: list[Tensor] = []
    with network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, output: spatial.append(output[:, :SPATIAL_CHANNELS].flatten(1))
    ):
        parts = [network(part) for part in images.split(BATCH)]
    pooled, logits = (torch.cat(each) for each in zip(*parts, strict=True))
    return pooled, torch.cat(spatial), logits


def against_data(network: Any, images: Tensor, real: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """FID, sFID and IS of images [N, 3, H, W] in [-1, 1] to what :func:`describe` gave for the real ones."""
    pooled, spatial, logits = describe(network, to_uint8(images))
    return {
        "fid": _frechet(pooled, real[0]),
        "sfid": _frechet(spatial, real[1]),
        "inception_score": inception_score(logits),
    }


def _frechet(a: Tensor, b: Tensor) -> float:
    return frechet_distance(*feature_statistics(a.numpy()), *feature_statistics(b.numpy()))
