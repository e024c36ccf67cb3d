"""Images and latents in files, as what a model that is sampled by the plain loop is fine-tuned on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq_tdq.calib_data import LoadedModel, LoopSampler
from ptq_tdq.calib_data.loop import LABELS
from ptq_tdq.errors import CalibrationSetError, ConfigError
from ptq_tdq.files import reason
from ptq_tdq.finetuning.data import NoisedSamples
from ptq_tdq.timeaxis import TimeAxis

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ENCODED = 64  # images at once


def read_data(path: Path, model: LoadedModel, axis: TimeAxis, *, denoise: bool) -> NoisedSamples:
    """Images in a folder (one sub-folder per class for a model with classes) or an npz file, ready to be noised.

    The file has ``images`` uint8 [N, H, W, 3] or ``latents`` [N, C, H, W] and, for a model with classes, ``labels``
    [N]. Images of a latent model pass its VAE once. Images in folders are cropped and resized.

    Raises :class:`ConfigError` for a model with another condition, and for predictions that have no name here;
    :class:`CalibrationSetError` for files that cannot be read or do not fit the model.
    """
    sampler = model.sampler
    if not isinstance(sampler, LoopSampler):
        raise ConfigError(
            "Fine-tuning on files is for models of x, t and at most a class; leave out --data, and this model learns "
            "from its own full-precision trajectories."
        )
    alphas, predicts = _prediction(model.scheduler)
    found = _read_file(path) if path.is_file() else _read_folder(path, _image_size(sampler), bool(sampler.num_classes))
    clean = torch.as_tensor(found["latents"]).float() if "latents" in found else _clean(found["images"], sampler)
    if tuple(clean.shape[1:]) != tuple(sampler.shape):
        raise CalibrationSetError(
            f"The model samples {list(sampler.shape)}, and '{path}' holds {list(clean.shape[1:])}; "
            "give data of its size."
        )
    if len(clean) < 2 or not bool(clean.isfinite().all()):
        raise CalibrationSetError(f"'{path}' holds fewer than two samples, or NaN or Inf; give more and finite ones.")
    labels = _labels(found.get("labels"), len(clean), sampler.num_classes, path)
    names = (*sampler.names, LABELS)
    place = {"device": model.denoiser.device, "dtype": model.denoiser.dtype}
    return NoisedSamples(clean, labels, axis, names, alphas=alphas, predicts=predicts, denoise=denoise, **place)


def _prediction(scheduler: Any) -> tuple[Tensor | None, str]:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    predicts = "flow" if alphas is None else getattr(scheduler.config, "prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction", "sample", "flow"):
        raise ConfigError(f"What the model predicts ({predicts}) has no training loss here; leave out --data.")
    return alphas, predicts


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise CalibrationSetError(f"'{path}' cannot be read as an npz file ({reason(error)}); give another.") from None
    if "arr_0" in found:  # what np.savez calls an array without a name
        found["images"] = found.pop("arr_0")
    if not found.keys() & {"images", "latents"}:
        raise CalibrationSetError(
            f"'{path}' has neither 'images' nor 'latents'; it has {', '.join(found) or 'nothing'}."
        )
    return found


def _read_folder(folder: Path, size: tuple[int, int], classes: bool) -> Mapping[str, Any]:
    """Images uint8 [N, H, W, 3] in the order of their names, and the numbers of their sub-folders."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not folder.is_dir():
        raise CalibrationSetError(f"There is no file or folder '{folder}'; give images or an npz file.")
    parts = [sorted(x for x in folder.iterdir() if x.is_dir())] if classes else [[folder]]
    images, labels = [], []
    for number, part in enumerate(parts[0]):
        for path in sorted(x for x in part.rglob("*") if x.suffix.lower() in ENDINGS):
            try:
                with Image.open(path) as image:
                    images.append(np.asarray(ImageOps.fit(image.convert("RGB"), size[::-1])))
            except (OSError, UnidentifiedImageError) as error:
                raise CalibrationSetError(f"'{path}' is no image that can be read ({reason(error)}).") from None
            labels.append(number)
    if not images:
        where = "its sub-folders, one per class," if classes else "it"
        raise CalibrationSetError(f"'{folder}' has no images in {where} ({', '.join(ENDINGS)}); give another folder.")
    return {"images": np.stack(images), **({"labels": np.array(labels)} if classes else {})}


def _image_size(sampler: LoopSampler) -> tuple[int, int]:
    """Height and width of the images that the model's samples are made of."""
    height, width = (*sampler.shape, 1, 1)[1:3]
    factor = 1 if sampler.vae is None else 2 ** (len(sampler.vae.config.block_out_channels) - 1)
    return height * factor, width * factor


def _clean(images: Any, sampler: LoopSampler) -> Tensor:
    """x0 of images uint8 [N, H, W, 3]."""
    pixels = torch.as_tensor(images)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or pixels.dtype != torch.uint8:
        raise CalibrationSetError(
            f"Images must be uint8 [N, H, W, 3]. Got {pixels.dtype} {list(pixels.shape)} instead; convert them."
        )
    unit = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    if sampler.vae is None:
        return unit.contiguous()
    return torch.cat([_encode(part, sampler.vae) for part in unit.split(ENCODED)])


@torch.no_grad()
def _encode(images: Tensor, vae: Any) -> Tensor:
    encoded = vae.encode(images.to(vae.device, vae.dtype))
    if not hasattr(encoded, "latent_dist"):
        raise ConfigError(f"A {type(vae).__name__} has no distribution of latents; give an npz file of latents.")
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents: Tensor = (encoded.latent_dist.mode().float().cpu() - shift) * vae.config.scaling_factor
    return latents


def _labels(labels: Any, count: int, num_classes: int, path: Path) -> Tensor | None:
    if not num_classes:
        return None
    found = torch.as_tensor([] if labels is None else labels).long().flatten()
    if len(found) != count or not bool(((found >= 0) & (found < num_classes)).all()):
        raise CalibrationSetError(
            f"The model has {num_classes} classes, and '{path}' does not hold a class from 0 to {num_classes - 1} for "
            f"each of its {count} samples; add 'labels', or one sub-folder per class."
        )
    return found
