"""Images and latents in files, as what a model that is sampled by the plain loop is fine-tuned on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from ptq_tdq.calib_data import LoadedModel, LoopSampler
from ptq_tdq.calib_data.loop import LABELS
from ptq_tdq.errors import CalibrationSetError, ConfigError
from ptq_tdq.files import IMAGE_ENDINGS, check_file, find_images, read_image, reason
from ptq_tdq.finetuning.data import NoisedSamples
from ptq_tdq.timeaxis import TimeAxis

SAMPLES = {"images", "latents"}
MOST_PACKED = 100  # how many times as long as in a compressed file an array may be
LARGEST = 1e4  # of latents, which are of the order of 1
ENCODED = 64  # images at once


def read_data(path: Path, model: LoadedModel, axis: TimeAxis, *, denoise: bool) -> NoisedSamples:
    """Images in a folder (one sub-folder per class for a model with classes) or an npz file, ready to be noised.

    The file has ``images`` uint8 [N, H, W, C] (or [N, H, W]) or ``latents`` [N, C, H, W] and, for a model with classes,
    ``labels`` [N]. Images of a latent model pass its VAE once. Images in folders are cropped and resized, and turned
    grey for a model of one channel.

    Raises :class:`ConfigError` for a model with another condition, and for predictions that have no name here;
    :class:`CalibrationSetError` for files that cannot be read or do not fit the model.
    """
    sampler = model.sampler
    if not isinstance(sampler, LoopSampler):
        raise ConfigError(
            "Fine-tuning on files is for models that no pipeline samples, of x, t and at most a class; leave data out, "
            "and this model learns from its own full-precision trajectories."
        )
    alphas, predicts = _prediction(model.scheduler)
    found = _read_file(path) if path.is_file() else _read_folder(path, _image_shape(sampler), sampler.num_classes)
    clean = _latents(found["latents"]) if "latents" in found else _clean(found["images"], sampler)
    if tuple(clean.shape[1:]) != tuple(sampler.shape):
        raise CalibrationSetError(
            f"The model samples {list(sampler.shape)}, and '{path}' holds {list(clean.shape[1:])}; "
            "give data of its size."
        )
    if len(clean) < 2 or not bool(clean.isfinite().all()):
        raise CalibrationSetError(f"'{path}' holds fewer than two samples, or NaN or Inf; give more and finite ones.")
    if (largest := float(clean.abs().max())) > LARGEST:
        raise CalibrationSetError(f"'{path}' holds values of {largest:.3g}; give latents as the model samples them.")
    labels = _labels(found.get("labels"), len(clean), sampler.num_classes, path)
    names = (*sampler.names, LABELS)
    place = {"device": model.denoiser.device, "dtype": model.denoiser.dtype}
    return NoisedSamples(clean, labels, axis, names, alphas=alphas, predicts=predicts, denoise=denoise, **place)


def _prediction(scheduler: Any) -> tuple[Tensor | None, str]:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None and hasattr(scheduler, "scale_noise"):  # by which flow matching, and nothing else, mixes noise in
        return None, "flow"
    predicts = getattr(scheduler.config, "prediction_type", "epsilon")
    if alphas is None or predicts not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"What a model predicts under {type(scheduler).__name__} ({predicts}) has no training loss here; leave "
            "data out."
        )
    return alphas, predicts


def _read_file(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of an npz file that are looked for, and no others; nothing is read before its size is known."""
    try:
        check_file(path)
        with ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            if "arr_0" in members and not members.keys() & SAMPLES:  # what np.savez calls an array without a name
                members["images"] = members.pop("arr_0")
            if len(members.keys() & SAMPLES) != 1:
                raise CalibrationSetError(
                    f"'{path}' has both 'images' and 'latents'; leave one of them out."
                    if members.keys() >= SAMPLES
                    else f"'{path}' has neither 'images' nor 'latents'; it has {', '.join(members) or 'nothing'}."
                )
            return {name: _array(file, members[name]) for name in members.keys() & {*SAMPLES, "labels"}}
    except CalibrationSetError:
        raise
    except Exception as error:  # zipfile, its decompressors and numpy raise many unrelated types
        raise CalibrationSetError(f"'{path}' cannot be read as an npz file ({reason(error)}); give another.") from None


def _array(file: ZipFile, info: ZipInfo) -> np.ndarray:
    """One array of numbers; raises ValueError for a size that its bytes in the file cannot have."""
    with file.open(info.filename) as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
        if dtype.kind not in "biuf":
            raise ValueError(f"'{info.filename}' is not of real numbers")
        if info.file_size != member.tell() + dtype.itemsize * math.prod(shape):
            raise ValueError(f"'{info.filename}' is not as long as its shape says")
        if info.file_size > MOST_PACKED * max(info.compress_size, 1 << 10):
            raise ValueError(
                f"'{info.filename}' would be more than {MOST_PACKED} times as long as in the file; save it without "
                "compression"
            )
    with file.open(info.filename) as member:
        found: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return np.ascontiguousarray(found, found.dtype.newbyteorder("="))


def _read_folder(folder: Path, shape: tuple[int, int, int], classes: int) -> Mapping[str, np.ndarray]:
    """Images uint8 [N, H, W, C] in the order of their names, and the numbers of their sub-folders."""
    if not folder.exists():
        raise CalibrationSetError(f"There is no file or folder '{folder}'; give images or an npz file.")
    if not folder.is_dir():
        raise CalibrationSetError(f"'{folder}' is no folder and no regular file; give images or an npz file.")
    parts = [folder]
    if classes:
        parts = sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))
        if parts and len(parts) != classes:
            raise CalibrationSetError(
                f"The model has {classes} classes, and '{folder}' has {len(parts)} sub-folders; give it one for each "
                "class, in the order of their names, empty where there are no images."
            )
    images, labels = [], []
    for number, part in enumerate(parts):
        for path in find_images(part):
            images.append(_read_image(path, shape))
            labels.append(number)
    if not images:
        where = "its sub-folders, one per class," if classes else "it"
        endings = ", ".join(IMAGE_ENDINGS)
        raise CalibrationSetError(f"'{folder}' has no images in {where} ({endings}); give another folder.")
    return {"images": np.stack(images), **({"labels": np.array(labels)} if classes else {})}


def _read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, uint8 [H, W, C], cropped and resized."""
    from PIL import ImageOps

    channels, height, width = shape
    try:
        image = ImageOps.fit(read_image(path), (width, height))
    except OSError as error:
        raise CalibrationSetError(f"'{path}' is no image that can be read ({reason(error)}).") from None
    return np.asarray(image) if channels > 1 else np.asarray(image.convert("L"))[..., None]


def _image_shape(sampler: LoopSampler) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model's samples are made of."""
    channels, height, width = (*sampler.shape, 1, 1)[:3]
    if sampler.vae is None:
        return channels, height, width
    factor = 2 ** (len(sampler.vae.config.block_out_channels) - 1)
    return sampler.vae.config.in_channels, height * factor, width * factor


def _latents(latents: np.ndarray) -> Tensor:
    """x0 of latents of any floating type [N, C, H, W]."""
    if latents.dtype.kind != "f":
        raise CalibrationSetError(f"Latents must be floating-point numbers. Got {latents.dtype} instead; convert them.")
    with np.errstate(over="ignore"):  # Inf is refused below
        return torch.from_numpy(latents.astype(np.float32))


def _clean(images: np.ndarray, sampler: LoopSampler) -> Tensor:
    """x0 of images uint8 [N, H, W, C] or [N, H, W]."""
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise CalibrationSetError(
            f"Images must be uint8 [N, H, W, 1 or 3]. Got {images.dtype} {list(images.shape)} instead; convert them."
        )
    unit = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
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


def _labels(labels: np.ndarray | None, count: int, num_classes: int, path: Path) -> Tensor | None:
    if not num_classes:
        return None
    found = np.zeros(0) if labels is None or labels.dtype.kind not in "iuf" else labels
    if found.shape not in ((count,), (count, 1)) or not np.isin(found, np.arange(num_classes)).all():
        raise CalibrationSetError(
            f"The model has {num_classes} classes, and '{path}' does not hold a class from 0 to {num_classes - 1} for "
            f"each of its {count} samples; add 'labels', or one sub-folder per class."
        )
    return torch.from_numpy(found.astype(np.int64)).flatten()
