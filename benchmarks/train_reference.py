"""Train, train on and evaluate the embedded reference model (latent diffusion on 32x32 images, 10 classes).

From scratch, in this order::

    python benchmarks/train_reference.py --data cifar10_jpeg.npz --work work vae
    python benchmarks/train_reference.py --data cifar10_jpeg.npz --work work unet --decay-start 4500
    python benchmarks/train_reference.py --data cifar10_jpeg.npz --work work evaluate
    python benchmarks/train_reference.py --data cifar10_jpeg.npz --work work export OUTPUT

``--init FOLDER`` starts each stage from the weights in FOLDER/vae and FOLDER/unet instead; ``decoder`` trains the VAE's
decoder on with the encoder (so the latents) fixed. Results are written to WORK/vae, WORK/unet and WORK/scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from reference_model import classifier as classifier_stage
from reference_model import dit as dit_stage
from reference_model import pixel as pixel_stage
from reference_model import unet as unet_stage
from reference_model import vae as vae_stage
from reference_model.data import cached_latents, load_images, save_atomic, to_unit
from reference_model.evaluate import evaluate as evaluate_model
from reference_model.export import export_halves
from reference_model.loop import train

from ptq_tdq.calib_data.reference import ConvMixer, load_classifier

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Folders:
    """Where a stage reads and writes."""

    data: Path
    work: Path
    init: Path | None
    device: torch.device

    def find(self, part: str) -> Path:
        """Return the newest weights of ``part``: trained here, else those of ``--init``."""
        for base in (self.work, self.init):
            if base and any((base / part).glob("*config.json")):
                return base / part
        raise click.UsageError(f"No {part} in --work or --init. Run the {part} stage first or give --init.")

    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.find("vae"), torch_dtype=torch.float32).eval().to(self.device)

    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the training images and of their mirror images [2, N, 4, h, w], and labels [N]."""
        images, labels = load_images(self.data)
        latents = cached_latents(self.vae(), images, self.work / "latents.pt")
        return latents.to(self.device), labels.to(self.device)

    def pixels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The training images in [-1, 1] and their mirror images [2, N, 3, 32, 32] in float16, and labels [N]."""
        images, labels = load_images(self.data)
        unit = to_unit(images.to(self.device)).half()
        return torch.stack([unit, unit.flip(3)]), labels.to(self.device)


@click.group(context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="An npz or folders.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Checkpoints, cached latents and results.")
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Folder with unet/ and vae/ to start from.")
@click.option("--threads", default=2)
@click.option("--device", default="cpu", help="Of the denoisers' and the second classifier's training.")
@click.pass_context
def main(context: click.Context, data: Path, work: Path, init: Path | None, threads: int, device: str) -> None:
    """Train and evaluate the embedded reference model."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    work.mkdir(parents=True, exist_ok=True)
    context.obj = Folders(data, work, init, torch.device(device))


@main.command()
@click.option("--steps", default=4000, help="The last step; the learning rate is 0 there.")
@click.option("--batch", default=64)
@click.option("--lr", default=1e-3, help="Peak learning rate.")
@click.option("--seed", default=0)
@click.pass_obj
def vae(folders: Folders, steps: int, batch: int, lr: float, seed: int) -> None:
    """Train the autoencoder from scratch (L1 + L2 + 1e-5 KL); latents cached before are stale then."""
    torch.manual_seed(seed)
    images, _ = load_images(folders.data)
    model = AutoencoderKL(**vae_stage.CONFIG)
    vae_stage.train_vae(model, images, steps=steps, batch=batch, peak=lr, seed=seed)
    model.save_pretrained(folders.work / "vae")


@main.command()
@click.option("--steps", default=1500, help="The last step; the learning rate is 0 there.")
@click.option("--batch", default=64)
@click.option("--lr", default=3e-4, help="Peak learning rate.")
@click.option("--feature-weight", default=0.1, help="Weight of the classifier's feature maps in the loss.")
@click.option("--seed", default=0)
@click.option("--checkpoint-every", default=250, help="Steps.")
@click.pass_obj
def decoder(
    folders: Folders, steps: int, batch: int, lr: float, feature_weight: float, seed: int, checkpoint_every: int
) -> None:
    """Train the decoder on; the encoder, and with it every latent, stays."""
    torch.manual_seed(seed)
    images, _ = load_images(folders.data)
    model = folders.vae()
    latents = cached_latents(model, images, folders.work / "latents.pt")
    vae_stage.train_decoder(
        model,
        images,
        latents,
        load_classifier(),
        folders.work,
        steps=steps,
        batch=batch,
        peak=lr,
        feature_weight=feature_weight,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    model.save_pretrained(folders.work / "vae")


def _training(steps: int, batch: int, lr: float) -> Callable[[Command], Command]:
    """The options of every stage that runs the common loop."""
    options = (
        click.option("--steps", default=steps, help="The last step; the learning rate is 0 there."),
        click.option("--batch", default=batch),
        click.option("--lr", "peak", default=lr, help="Peak learning rate."),
        click.option("--warmup", default=500, help="Steps."),
        click.option("--decay-start", default=0, help="Step at which the linear decay begins (0: at once)."),
        click.option("--ema", "ema_decay", default=0.9995, help="Decay of the weight average."),
        click.option("--seed", default=0),
        click.option("--checkpoint-every", default=250, help="Steps."),
    )

    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


@main.command()
@_training(steps=7500, batch=128, lr=4e-4)
@click.pass_obj
def unet(folders: Folders, /, batch: int, seed: int, **schedule: Any) -> None:
    """Train the U-Net on cached latents (AdamW, EMA)."""
    torch.manual_seed(seed)
    latents, labels = folders.latents()
    if folders.init:
        new = UNet2DModel.from_pretrained(folders.init / "unet", torch_dtype=torch.float32)
    else:
        new = UNet2DModel(**unet_stage.CONFIG)
    scheduler = DDIMScheduler(**unet_stage.SCHEDULER)
    loss = unet_stage.unet_loss(latents, labels, scheduler, batch)
    trained = train("unet", new.to(folders.device), loss, folders.work, seed=seed, **schedule)
    trained.save_pretrained(folders.work / "unet")
    scheduler.save_pretrained(folders.work / "scheduler")


@main.command()
@_training(steps=8000, batch=96, lr=6e-4)
@click.pass_obj
def dit(folders: Folders, /, batch: int, seed: int, **schedule: Any) -> None:
    """Train the transformer on cached latents (flow matching, AdamW, EMA, bf16 autocast)."""
    torch.manual_seed(seed)
    latents, labels = folders.latents()
    if folders.init and (folders.init / "transformer").exists():
        new = DiTTransformer2DModel.from_pretrained(folders.init / "transformer", torch_dtype=torch.float32)
    else:
        new = dit_stage.new_dit()
    loss = dit_stage.dit_loss(latents, labels, batch)
    trained = train("dit", new.to(folders.device), loss, folders.work, seed=seed, **schedule)
    trained.save_pretrained(folders.work / "transformer")
    FlowMatchEulerDiscreteScheduler(**dit_stage.SCHEDULER).save_pretrained(folders.work / "scheduler")


@main.command()
@_training(steps=20000, batch=128, lr=4e-4)
@click.pass_obj
def pixel(folders: Folders, /, batch: int, seed: int, **schedule: Any) -> None:
    """Train the pixel-space U-Net (AdamW, EMA)."""
    torch.manual_seed(seed)
    images, labels = folders.pixels()
    scheduler = DDIMScheduler(**pixel_stage.SCHEDULER)
    new = UNet2DModel(**pixel_stage.CONFIG).to(folders.device, memory_format=torch.channels_last)
    loss = pixel_stage.pixel_loss(images, labels, scheduler, batch)
    trained = train("pixel", new, loss, folders.work, seed=seed, **schedule)
    DDIMPipeline(trained, scheduler).save_pretrained(folders.work / "pixel")


@main.command()
@_training(steps=8000, batch=512, lr=3e-3)
@click.pass_obj
def classifier(folders: Folders, /, batch: int, seed: int, **schedule: Any) -> None:
    """Train the second classifier and print its accuracy on the test images."""
    torch.manual_seed(seed)
    images, labels = folders.pixels()
    new = ConvMixer().to(folders.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = classifier_stage.classifier_loss(images, labels, batch)
    trained = train("classifier", new, loss, folders.work, seed=seed, **schedule)
    held_out, expected = load_images(folders.data, "test")
    with torch.no_grad():
        found = torch.cat([trained(to_unit(part.to(folders.device))).argmax(1).cpu() for part in held_out.split(500)])
    click.echo(json.dumps({"images": len(expected), "accuracy": float((found == expected).double().mean())}))
    save_atomic({name: value.cpu() for name, value in trained.state_dict().items()}, folders.work / "convmixer.pt")


@main.command()
@click.option("--samples", default=1000, help="How many to draw; 0: none.")
@click.option("--steps", default=25, help="DDIM steps.")
@click.option("--reconstructions", default=2000, help="How many; 0: no test images at all.")
@click.option("--seed", default=7)
@click.option("--bf16", is_flag=True, help="Run the U-Net in bf16 autocast.")
@click.pass_obj
def evaluate(folders: Folders, samples: int, steps: int, reconstructions: int, seed: int, bf16: bool) -> None:
    """Print FD-C10 and class accuracy as JSON lines."""
    images, labels = load_images(folders.data, "test")
    net = UNet2DModel.from_pretrained(folders.find("unet"), torch_dtype=torch.float32).eval() if samples else None
    scheduler = DDIMScheduler.from_pretrained(folders.find("scheduler")) if samples else None
    evaluate_model(
        net,
        folders.vae(),
        scheduler,
        load_classifier(),
        images,
        labels,
        lambda record: click.echo(json.dumps(record)),
        reconstructions=reconstructions,
        count=samples,
        steps=steps,
        seed=seed,
        bf16=bf16,
    )


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.pass_obj
def export(folders: Folders, output: Path) -> None:
    """Write unet/, vae/ and scheduler/ with fp16 weights to OUTPUT."""
    for part in ("unet", "vae", "scheduler"):
        export_halves(folders.find(part), output / part)


if __name__ == "__main__":
    main()
