"""A pipeline of diffusers as a sampler: prompts or classes, guidance, its own scheduler and everything around it."""

from __future__ import annotations

import copy
import inspect
import json
import linecache
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.calib_data.prompts import DEFAULT_PROMPTS
from ptq_tdq.calib_data.sampler import Sampled, Sampler, takes
from ptq_tdq.errors import ConfigError, MissingExtraError, ModelError, PtqTdqError, first_line
from ptq_tdq.hooks import hooked

_log = logging.getLogger(__name__)

PROMPT, LABELS = "prompt", "class_labels"
_TEXT = re.compile(r"(negative_)?prompt(_\d+)?")
_MEDIA = re.compile(r"(?!ip_adapter|negative)(\w+_)?(image|video|audio)s?")  # which JSON does not have
OWN = ("generator", "output_type", "return_dict", "num_images_per_prompt", PROMPT, LABELS)
SCHEDULER, STEPS = "scheduler", "num_inference_steps"  # the ends of a component's and an argument's names


class PipelineSampler(Sampler):
    """Runs ``pipe`` with another denoiser in the place of its ``component``.

    ``call`` are further arguments of the pipeline (guidance_scale, height, width, num_frames, ...). The scheduler and
    the number of steps are the component's own where the pipeline has several, each with the name of its part.
    """

    batch = 4

    def __init__(
        self,
        pipe: Any,
        component: str,
        prompts: str | Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises :class:`ConfigError` for prompts, classes or arguments that the pipeline does not take.

        Raises :class:`ModelError` for a component without a scheduler, and for a pipeline that names neither steps nor
        a generator.
        """
        if not (takes(pipe.__call__, "num_inference_steps") or takes(pipe.__call__, "generator")):
            raise ModelError(
                f"{type(pipe).__name__} names neither num_inference_steps nor a generator, so how it samples cannot be "
                f"chosen; run it yourself and record calls of its {component}."
            )
        self.pipe, self.component, self.call = pipe, component, dict(call or {})
        self._scheduler_name = _find_scheduler(pipe, component)
        self._steps = self._scheduler_name.removesuffix(SCHEDULER) + STEPS
        self.scheduler = getattr(pipe, self._scheduler_name)
        self.condition, self.num_classes = find_condition(pipe, component)
        _check_call(pipe, self.call, self.condition, self._steps)
        if prompts is not None and self.condition != PROMPT:
            raise ConfigError(f"{type(pipe).__name__} takes no prompts; leave them out.")
        self.prompts = [prompts] if isinstance(prompts, str) else list(DEFAULT_PROMPTS if prompts is None else prompts)
        if not self.prompts:
            raise ConfigError("There is no prompt; give at least one.")
        self._alone = getattr(pipe, "free_noise_enabled", False)  # FreeNoise takes one prompt, and no lists
        self._alone = self._alone or (self.condition == PROMPT and self._refuses_lists())
        self.batch = 1 if self._alone else self.batch
        self.choose(classes)

    @property
    def num_conditions(self) -> int:
        return len(self.prompts) if self.condition == PROMPT else super().num_conditions

    def conditions(self, count: int) -> list[Any]:
        if self.condition == PROMPT:
            return [self.prompts[i % len(self.prompts)] for i in range(count)]
        return super().conditions(count)

    def recipe(self) -> dict[str, Any]:
        of_condition: dict[str, dict[str, Any]] = {PROMPT: {"prompts": self.prompts}, LABELS: {"classes": self.classes}}
        return {"sampler": type(self.pipe).__name__, "call": self.call, **of_condition.get(self.condition or "", {})}

    @torch.no_grad()
    def run(
        self,
        denoiser: nn.Module,
        conditions: Sequence[Any],
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        schedule: Any,
    ) -> Sampled:
        """As the base says. Raises :class:`ModelError` with the pipeline's own words for a call that it refuses.

        Raises it as well for a run that never calls the denoiser: what it gives says nothing of it.
        """
        own, its_scheduler = (id(getattr(self.pipe, name)) for name in (self.component, self._scheduler_name))
        pipe = _exchanged(self.pipe, {own: denoiser, its_scheduler: schedule})
        pipe.set_progress_bar_config(disable=True)
        count, call = len(conditions), self._arguments(conditions, generators, num_inference_steps)
        called: list[nn.Module] = []

        def hear(module: nn.Module, args: Any) -> None:
            if not called:
                _warn_of_attention(pipe, self.component, own_attention)
            called.append(module)

        listening = denoiser.register_forward_pre_hook(hear)
        with _refusals(pipe, call), _processors(denoiser) as own_attention, _decoded(pipe) as latents, listening:
            made = _first(pipe(**call)[0])
        if not called:
            raise ModelError(
                f"{type(pipe).__name__} never called its {self.component}, so its samples say nothing of it; take more "
                "inference steps, or give the pipeline that the denoiser runs in."
            )
        if not latents or sum(map(len, latents)) % count:
            return Sampled(made.float().cpu(), _images(made))
        joined = torch.cat(latents).float().cpu()
        return Sampled(joined.reshape(count, -1, *joined.shape[1:]).squeeze(1), _images(made))

    def _arguments(
        self, conditions: Sequence[Any], generators: Sequence[torch.Generator], num_inference_steps: int
    ) -> dict[str, Any]:
        """Those of the pipeline, in a call that draws ``conditions``."""
        call: dict[str, Any] = {
            **_with_tuples(self.pipe, self.call),
            "generator": list(generators),
            "return_dict": False,
        }
        count = len(conditions)
        call |= {self.condition: list(conditions)} if self.condition else {}
        if self._alone:
            call |= {"generator": generators[0], PROMPT: conditions[0]}
        else:  # some pipelines want as many other texts as there are prompts
            call |= {key: [value] * count for key, value in call.items() if _TEXT.fullmatch(key) and type(value) is str}
        for key, value in ((self._steps, num_inference_steps), ("output_type", "np")):
            call |= {key: value} if takes(self.pipe.__call__, key) else {}
        if self.condition != PROMPT and takes(self.pipe.__call__, "batch_size"):
            call["batch_size"] = count
        return call

    def _refuses_lists(self) -> bool:
        """Whether the pipeline (Wan VACE) goes on to encode a prompt by itself, and no list of prompts."""
        if not hasattr(self.pipe, "encode_prompt"):
            return False
        scheduler, reached = getattr(self.pipe, self._scheduler_name), list[bool]()
        pipe = _exchanged(self.pipe, {id(scheduler): copy.deepcopy(scheduler)})
        pipe.set_progress_bar_config(disable=True)

        def stop(*args: Any, **kwargs: Any) -> None:
            reached.append(self._alone)
            raise _Reached

        pipe.encode_prompt = stop
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        for self._alone in (False, True):  # whatever computes first has been reached
            with suppress(Exception, _Reached), hooked(part.register_forward_pre_hook(stop) for part in parts):
                pipe(**self._arguments(self.prompts[:1] * 2, [torch.Generator()] * 2, 1))
            if reached:
                break
        return reached == [True]


class _Reached(BaseException):
    """Ends a run that has gone far enough; no pipeline takes it for an error of its own."""


def _find_scheduler(pipe: Any, component: str) -> str:
    """The scheduler of ``component``, by its name: "prior_scheduler" is that of all that begins with "prior"."""
    names: list[str] = [name for name, each in pipe.components.items() if name.endswith(SCHEDULER) and each is not None]
    own = [name for name in names if component.startswith(name.removesuffix(SCHEDULER).removesuffix("_"))]
    if not own:
        raise ModelError(f"{type(pipe).__name__} has no scheduler of its {component}; record calls of it.")
    return max(own, key=len)


def _exchanged(pipe: Any, others: Mapping[int, Any]) -> Any:
    """A copy of ``pipe`` and of the pipelines in it, with ``others`` in the place of what has their ids."""
    from diffusers import DiffusionPipeline

    made = copy.copy(pipe)
    for name, value in vars(pipe).items():
        if id(value) in others:
            setattr(made, name, others[id(value)])
        elif isinstance(value, DiffusionPipeline):
            setattr(made, name, _exchanged(value, others))
    return made


def _with_tuples(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with tuples where ``pipe`` says that it takes them, for which JSON has lists."""
    parameters = inspect.signature(pipe.__call__).parameters
    tuples = {key for key, p in parameters.items() if "tuple" in str(p.annotation).lower() or type(p.default) is tuple}
    return {key: tuple(value) if key in tuples and type(value) is list else value for key, value in call.items()}


def find_condition(pipe: Any, component: str) -> tuple[str | None, int]:
    """The argument of ``pipe`` that says what to draw, where there is one, and the number of classes it may name."""
    config = getattr(pipe, component).config
    if takes(pipe.__call__, PROMPT):
        return PROMPT, 0
    classes = getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)
    return (LABELS, int(classes)) if classes and takes(pipe.__call__, LABELS) else (None, 0)


def _check_call(pipe: Any, call: Mapping[str, Any], condition: str | None, steps: str) -> None:
    """Whether ``pipe`` can be called with ``call``, its condition and ``steps``, and with nothing more."""
    name, parameters = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = [key for key in named if key not in (*OWN, steps)]
    wrong = [key for key in call if key not in known]
    if wrong:
        raise ConfigError(f"{name} takes no argument {wrong[0]!r} here; it takes {', '.join(known)}.")
    odd = [key for key, value in call.items() if not _plain(value)]
    if odd:
        raise ConfigError(
            f"The argument {odd[0]!r} is {shortened(call[odd[0]])}, which no recipe can tell; run the {name} yourself "
            "and record calls of its denoiser."
        )
    missing = [key for key, p in named.items() if p.default is p.empty and key not in (*call, condition, steps)]
    if missing:
        raise ConfigError(f"{name} needs {missing[0]}, which is more than a prompt or a class; record calls of it.")


def _plain(value: Any) -> bool:
    """Whether JSON has ``value``."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@contextmanager
def _refusals(pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """One sentence for whatever a pipeline says of its ``call``."""
    try:
        yield
    except PtqTdqError:
        raise
    except Exception as error:  # of any type, from the pipeline or a library behind it
        name, said = type(pipe).__name__, first_line(error)
        if isinstance(error, ImportError) or _not_imported(error):
            raise MissingExtraError(
                f"{name} needs a package that is not installed ({said}); install what its documentation names."
            ) from error
        media = [key for key in inspect.signature(pipe.__call__).parameters if _MEDIA.fullmatch(key)]
        if without := ", ".join(key for key in media if key not in call):
            raise ModelError(
                f"{name} cannot sample so, without {without} ({said}); change its other arguments (height, width, "
                "...), or run it yourself with what it needs and record calls of its denoiser."
            ) from error
        raise ModelError(
            f"{name} cannot sample so ({said}); change its arguments (height, width, ...) or record calls of it."
        ) from error


@contextmanager
def _processors(denoiser: nn.Module) -> Iterator[dict[Any, Any]]:
    """The attention processors of a denoiser by their modules, which have them again afterwards, however it ends."""
    own = {module: module.processor for module in denoiser.modules() if hasattr(module, "processor")}
    try:
        yield own
    finally:
        for module, processor in own.items():
            if module.processor is not processor:
                module._modules.pop("processor", None)
                module.processor = processor


def _warn_of_attention(pipe: Any, component: str, own: Mapping[Any, Any]) -> None:
    """Say where a pipeline that runs computes attention itself; ``own`` are the processors before."""
    given = [module.processor for module, before in own.items() if type(module.processor) is not type(before)]
    code = {type(each).__name__: getattr(type(each).__call__, "__code__", None) for each in given}
    by_hand = [name for name, each in code.items() if each and "get_attention_scores" in each.co_names]
    if by_hand:
        _log.warning(
            "%s computes attention of its %s by hand (%s), where nothing is quantized: a model whose attention "
            "products are quantized will be refused in it. Set attention=false, or calibrate in another pipeline.",
            type(pipe).__name__, component, by_hand[0],
        )  # fmt: skip


def _not_imported(error: Exception) -> bool:
    """Whether a name is missing that the file which uses it imports, where the package is there."""
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    if at is None or type(error) is not NameError:
        return False
    lines = linecache.getlines(at.tb_frame.f_code.co_filename)
    return any(re.match(rf"\s+(from|import)\b.*\b{error.name}\b", line) for line in lines)


@contextmanager
def _decoded(pipe: Any) -> Iterator[list[Tensor]]:
    """What the pipeline hands to its VAE to decode, while it is open."""
    seen: list[Tensor] = []
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if vae is None:
        yield seen
        return
    original = vae.decode

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(z.detach())
        return original(z, *args, **kwargs)

    vae.decode = decode
    try:
        yield seen
    finally:
        del vae.decode


def _first(made: Any) -> Tensor:
    """What a pipeline gives, of several things (a picture and its depth) the first one."""
    while isinstance(made, tuple):
        made = made[0]
    return torch.as_tensor(made)


def _images(made: Tensor) -> Tensor | None:
    """What a pipeline gives as "np", [B, (frames,) H, W, C] in [0, 1], as images; None for sounds."""
    if made.ndim == 5:
        made = made[:, 0]
    if made.ndim != 4 or made.shape[-1] not in (1, 3):
        return None
    return (made.permute(0, 3, 1, 2).float().cpu() * 2 - 1).clamp(-1, 1)
