"""The training loop of both denoisers: resumable, its schedule counted in steps and never in seconds."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from reference_model.data import save_atomic

Model = TypeVar("Model", bound=nn.Module)


def fast_autocast(device: torch.device) -> torch.autocast:
    """bf16 products where the device has them; elsewhere they would be emulated, ten times slower than float32."""
    has_bfloat16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16)


def learning_rate(step: int, peak: float, warmup: int, anchor: tuple[int, float], last: int) -> float:
    """Linear warm-up to ``peak``, then a straight line from ``anchor`` (step, rate) down to 0 at step ``last``."""
    decayed = anchor[1] * (last - step) / max(1, last - anchor[0]) if step >= anchor[0] else peak
    return min(peak * (step + 1) / max(1, warmup), decayed)


def train(
    name: str,
    model: Model,
    loss_of: Callable[[Model, torch.Generator], torch.Tensor],
    work: Path,
    *,
    steps: int,
    peak: float,
    warmup: int,
    decay_start: int,
    ema_decay: float,
    seed: int,
    checkpoint_every: int,
) -> Model:
    """Train to step ``steps`` and return the model with its averaged (EMA) weights.

    ``loss_of`` draws a batch with the generator (on the model's device) and gives its mean loss. A checkpoint
    ``name.ckpt`` in ``work`` is resumed; when ``steps`` has changed since, the rate falls in a straight line from where
    it is now to 0 at the new end. SIGTERM writes a checkpoint and exits with 143.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator(device).manual_seed(seed)
    anchor, step, path = (decay_start, peak), 0, work / f"{name}.ckpt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, anchor = state["average"], state["step"], tuple(state["anchor"])
        generator.set_state(state["generator"].cpu())
        if state["last"] != steps and step > anchor[0]:
            anchor = (step, learning_rate(step, peak, warmup, anchor, state["last"]))

    def checkpoint() -> None:
        values = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        save_atomic({**values, "anchor": anchor, "last": steps, "generator": generator.get_state()}, path)

    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    running, started = torch.zeros((), device=device), time.perf_counter()
    model.train()
    while step < steps:
        rate = learning_rate(step, peak, warmup, anchor, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - ema_decay)
        step += 1
        running += loss.detach()  # read once in 50 steps: a device must not wait for each
        if step % 50 == 0:
            mean, seconds = running.item() / 50, (time.perf_counter() - started) / 50
            print(f"{name} {step}/{steps} loss {mean:.4f} lr {rate:.2e} {seconds:.3f} s/step", flush=True)
            running, started = torch.zeros((), device=device), time.perf_counter()
        if step % checkpoint_every == 0 or step == steps or stopping:
            checkpoint()
        if stopping:
            raise SystemExit(143)
    with torch.no_grad():
        torch._foreach_copy_(list[torch.Tensor](parameters), average)
    return model.eval()
