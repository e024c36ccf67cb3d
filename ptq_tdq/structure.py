"""The model that an artifact describes, built from its configuration: first without memory, then for real.

A configuration comes from elsewhere, so nothing in it is trusted: it names a denoiser of diffusers or nothing, and what
it builds is held against what the weights file really has before any of it takes memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock, get_ident
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from ptq_tdq.ambient import FLOAT32_DEFAULT
from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ArtifactMismatchError, ConfigError, PtqTdqError, first_line, of_memory
from ptq_tdq.fit import check_fit, classes_of
from ptq_tdq.identity import base_config, state_of
from ptq_tdq.wrap import fold, folded_copy

LARGEST_INTEGER = 2**24  # in a configuration; a list of so many entries is still small
COUNTS = {"num_groups", "heads", "num_heads", "num_attention_heads"}  # attributes of modules that are above 0
IN_TRAINING = {"training", "gradient_checkpointing"}  # attributes that are nothing to a model that samples
# A model makes each of its tensors and initializes it, in two to three calls; what it makes beside them (encodings of
# positions) is small. Both limits are for files of a few values, where that "small" is more than the model itself.
CALLS_PER_TENSOR, SPARE_CALLS = 8, 1_000
VALUES_PER_VALUE, SPARE_VALUES = 4, 2**24
_PATCHING = Lock()  # torch has one class of modules for all threads


def diffusers_class(name: Any, base: Literal["ModelMixin", "SchedulerMixin"] = "ModelMixin") -> Any:
    """The class of diffusers that is called ``name``, or None; nothing else of the package counts."""
    import diffusers  # takes seconds, and who only asks for help or reads an artifact needs none of it

    try:
        cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    except Exception as error:  # diffusers imports it now, and an optional package may be missing or broken
        if of_memory(error):
            raise MemoryError from error
        return None
    return cls if isinstance(cls, type) and issubclass(cls, getattr(diffusers, base)) else None


@contextmanager
def building() -> Iterator[None]:
    """Around all that makes a model of an artifact: float32, and one kind of error for whatever a constructor meets.

    Raises :class:`ArtifactMismatchError` in the place of what is no error of this package.
    """
    try:
        with FLOAT32_DEFAULT:
            yield
    except PtqTdqError:
        raise
    except Exception as error:  # nobody has checked the entries of the configuration one by one
        raise ArtifactMismatchError(
            f"The artifact's model_config is none that its model takes ({first_line(error)}); make the artifact again."
        ) from error


@dataclass(frozen=True)
class TensorCounts:
    """How many tensors a file holds for a model, and how many values they have in all."""

    tensors: int
    values: int

    @classmethod
    def of(cls, artifact: Artifact) -> TensorCounts:
        tensors = (*artifact.weight_codes.values(), *artifact.float_state.values())
        return cls(len(tensors), sum(tensor.numel() for tensor in tensors))


def as_configured(model: nn.Module, time: str) -> nn.Module | None:
    """What the configuration of ``model``, folded and with the time argument ``time``, builds on the meta device.

    None for classes that are not diffusers' own, which their users build, and where nothing can be built of it.
    """
    config, state = base_config(model), state_of(model).values()
    cls = diffusers_class(config["_class_name"])
    if cls is None or not isinstance(model, cls):
        return None
    with suppress(ArtifactMismatchError), building():  # what is refused here is refused when it is loaded, too
        return meta_model(config, time, TensorCounts(len(state), sum(tensor.numel() for tensor in state)))
    return None


def beside_configuration(model: nn.Module, time: str) -> tuple[dict[str, str | None], dict[str, bool | float | str]]:
    """What of ``model``, folded and with the time argument ``time``, its configuration does not build.

    That is :func:`exchanged_modules` and :func:`changed_settings`; nothing where there is no :func:`as_configured`.
    """
    built = as_configured(model, time)
    return ({}, {}) if built is None else (exchanged_modules(model, built), changed_settings(model, built))


def exchanged_modules(model: nn.Module, built: nn.Module) -> dict[str, str | None]:
    """The modules of ``model`` that are of another class than in what its configuration builds, with their class.

    The class is None for a module that the model lacks. The model itself is to be of the class that its configuration
    names, for which diffusers may build a newer one.
    """
    own, known = classes_of(model), {**classes_of(built), "": diffusers_class(type(model).__name__)}
    names = [name for name in {**own, **known} if own.get(name) is not known.get(name)]
    return {name: own[name].__name__ if name in own else None for name in names}


def changed_settings(model: nn.Module, built: nn.Module) -> dict[str, bool | float | str]:
    """Plain attributes of modules that what the configuration builds has otherwise or lacks, such as FreeU's factors.

    ``built`` is what :func:`as_configured` gives for ``model``. Private ones, and those that only training reads, are
    left out.
    """
    known = dict(built.named_modules())
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in model.named_modules()
        if name in known and type(module) is type(known[name])
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key not in IN_TRAINING and key[0] != "_"
        if vars(known[name]).get(key) != value
    }


def check_built(artifact: Artifact) -> None:
    """Refuse an artifact of a model that its configuration does not build: something in it was exchanged.

    Raises :class:`ArtifactMismatchError` naming the first of them.
    """
    for name, cls in artifact.config.get("exchanged_modules", {}).items():
        raise ArtifactMismatchError(
            f"The artifact is of a model whose module '{name}' was {f'of class {cls}' if cls else 'taken out'}, which "
            "its configuration does not say; give ptq_tdq.load_quantized a model that is changed so, as model=..."
        )


def meta_model(config: dict[str, Any], time: str, counts: TensorCounts) -> nn.Module:
    """The structure of a denoiser on the meta device, which holds shapes and no values.

    ``config`` is its configuration, ``time`` its time argument. Raises :class:`ArtifactMismatchError` for a class that
    is no denoiser of this diffusers, and for a configuration that the class does not take or that asks for far more
    than the file's ``counts``.
    """
    cls = _denoiser(config, time)
    _check_integers(config, counts)
    _check_types(cls, config)
    with torch.device("meta"), _Limit(counts):
        structure = cls.from_config(config)
    assert isinstance(structure, nn.Module)
    _check_counts(structure)
    return fold(structure)


def asks_too_much(cls: Any, config: dict[str, Any], counts: TensorCounts) -> bool:
    """Whether a model of diffusers takes far more to build than a file of ``counts`` can fill.

    What else is wrong with its configuration, whoever builds it will say.
    """
    try:
        _check_integers(config, counts)
        with torch.device("meta"), _Limit(counts):
            cls.from_config(config)
    except ArtifactMismatchError:
        return True
    except Exception:
        return False
    return False


def hollow_model(artifact: Artifact, model: nn.Module | None = None) -> nn.Module:
    """The artifact's model on the CPU, but for its parameters, which are on the meta device.

    So all that no file holds, such as tables of positions, has its values, and nothing else takes memory. ``model`` is
    one of the same structure, which is left as it is, for classes that are not diffusers' own. Raises what
    :func:`meta_model`, :func:`check_built`, :func:`~ptq_tdq.fit.check_fit` and :func:`~ptq_tdq.identity.state_of`
    raise, and :class:`ConfigError` for a ``model`` that is no module or lacks values, before anything takes memory.
    """
    if model is not None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be an instance of the model's class. Got a {type(model).__name__} instead.")
        state_of(model)  # refuses what no artifact is of
        hollow = _hollow_copy(model)
        check_fit(hollow, artifact)
        return hollow
    check_built(artifact)
    structure = meta_model(artifact.config["model_config"], artifact.time_axis.argument, TensorCounts.of(artifact))
    check_fit(structure, artifact)
    cls: Any = type(structure)
    with _PATCHING, torch.device("cpu"), _hollow_parameters():
        built = cls.from_config(artifact.config["model_config"])
    assert isinstance(built, nn.Module)
    return fold(built)


def _hollow_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the CPU, whose parameters are on the meta device."""
    copied = folded_copy(model)
    known = {id(p): nn.Parameter(p.to("meta"), False) for p in copied.parameters()}
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set:
                raise ConfigError(
                    f"The buffer {name!r} of model ({type(module).__name__}) is on the meta device, where it has no "
                    "values, and no artifact holds it (persistent=False); give an instance that was built on the CPU."
                )
            module._buffers[name] = buffer if buffer is None or buffer.is_meta else buffer.cpu()
    return copied


@contextmanager
def _hollow_parameters() -> Iterator[None]:
    """While open, parameters of the modules that this thread builds go to the meta device as soon as they are made."""
    original, thread = nn.Module.register_parameter, get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and get_ident() == thread:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # torch has a hook for it, but a module that another thread builds as it comes or goes fails
    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _denoiser(config: dict[str, Any], time: str) -> Any:
    """The class of diffusers that ``config`` names."""
    name = config.get("_class_name")
    cls = diffusers_class(name)
    if cls is None:
        raise ArtifactMismatchError(
            f"The artifact is of a {name!r}, which this version of diffusers does not have; pass an instance of it as "
            "model=..."
        )
    if time not in inspect.signature(cls.forward).parameters:
        raise ArtifactMismatchError(f"The artifact is of a {name!r}, which takes no time step and is no denoiser.")
    return cls


def _check_integers(config: dict[str, Any], counts: TensorCounts) -> None:
    """Refuse integers beyond all reason: constructors make lists and loops of them, which no device can limit."""
    largest = max(LARGEST_INTEGER, counts.values)
    rest: list[Any] = [config]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
        elif isinstance(value, int) and abs(value) > largest:
            raise ArtifactMismatchError(
                f"The artifact's model_config holds a number beyond {largest}; make the artifact again."
            )


def _check_counts(structure: nn.Module) -> None:
    """Refuse what constructors take and calls do not: sizes that are products of two negative numbers.

    Nor do they take paddings beyond a kernel, which no tensor's shape tells of and which may ask for any memory.
    """
    for name, module in structure.named_modules():
        if isinstance(module, _ConvNd) and not isinstance(module.padding, str):
            spans = [1 + by * (size - 1) for size, by in zip(module.kernel_size, module.dilation, strict=True)]
            if any(pad > span for pad, span in zip(module.padding, spans, strict=True)):
                raise ArtifactMismatchError(
                    f"The artifact's model_config is none that its model takes ('{name}' would pad its input by "
                    f"{max(module.padding)}); make the artifact again."
                )
        for key in COUNTS & vars(module).keys():
            value = getattr(module, key)
            if isinstance(value, int) and (value < 1 or value is True):
                raise ArtifactMismatchError(
                    f"The artifact's model_config is none that its model takes ('{name}' would have {value} as its "
                    f"{key}); make the artifact again."
                )


_PLAIN: dict[Any, Any] = {float: (int, float), int: int, bool: int, str: str, dict: dict, type(None): type(None)}


def _check_types(cls: Any, config: dict[str, Any]) -> None:
    """Refuse entries of other types than the constructor declares: what only forward reads would fail in a call."""
    try:
        declared = get_type_hints(cls.__init__)
    except Exception:  # of any type: names that are there for type checkers only
        return
    parameters = inspect.signature(cls.__init__).parameters
    for name, value in config.items():
        given = value is not None or name not in parameters or parameters[name].default is not None
        if given and not _fits(value, declared.get(name, Any)):
            wanted = getattr(declared[name], "__name__", declared[name])
            raise ArtifactMismatchError(
                f"The artifact's model_config is none that its model takes ({name} = {str(value)[:100]!r} is no "
                f"{wanted}); make the artifact again."
            )


def _fits(value: Any, declared: Any) -> bool:
    """Whether a value of JSON is of a declared type; sequences may be nested and hold None."""
    kind, args = get_origin(declared) or declared, [arg for arg in get_args(declared) if arg is not ...]
    if kind in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if kind is Literal:
        return value in args
    if kind in (list, tuple, Sequence):
        takes = [*args, declared] if args else [Any]
        return isinstance(value, list | tuple) and all(
            item is None or any(_fits(item, take) for take in takes) for item in value
        )
    return isinstance(value, _PLAIN.get(kind, object))


class _Limit(TorchFunctionMode):
    """Ends a construction that makes more tensors, or larger ones, than the artifact's own tensors account for."""

    def __init__(self, counts: TensorCounts) -> None:
        super().__init__()
        self._calls = SPARE_CALLS + CALLS_PER_TENSOR * counts.tensors
        self._values = SPARE_VALUES + VALUES_PER_VALUE * counts.values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls -= 1
        if isinstance(result, Tensor) and not any(result is given for given in args):
            self._values -= result.numel()
        if self._calls < 0 or self._values < 0:
            raise ArtifactMismatchError(
                "The artifact's model_config asks for a far larger model than its tensors; make the artifact again."
            )
        return result
