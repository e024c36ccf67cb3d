"""Blocks with their passes fused: norms and activations go into quantizers, residual sums into products.

All of this is for speed alone: a block of another form, a call with other arguments, or one of a block whose modules
have got hooks, takes the block's own way, where its layers run in integers one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any, ClassVar

import torch
from diffusers.models import activations
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.modules.products import products_of
from ptq_tdq.runtime.attention import IntegerProduct
from ptq_tdq.runtime.image_blocks import PlannedAttention, PlannedResnet
from ptq_tdq.runtime.kernels import SILU, Activation, Norm
from ptq_tdq.runtime.layer import FORMS, IntegerLayer, IntegerLinear, WeightOnlyLayer
from ptq_tdq.runtime.step import kept

FEW, MOST = 8, 1024  # time steps in a call, and results of them, that are remembered


def norm_of(module: nn.Module | None) -> Norm | None:
    """The group norm as data, or None for another kind of norm."""
    if not isinstance(module, nn.GroupNorm) or module.weight is None:
        return None
    weight, bias = (p.detach().float().contiguous() for p in (module.weight, module.bias))
    return Norm(int(module.num_groups), weight, bias, module.eps)


def takes_norm(layer: nn.Module | None, kind: type[IntegerLayer] = IntegerLayer) -> bool:
    """Whether a group norm's values can be quantized by the layer: it has one channel range, and zeros as border."""
    whole = type(layer) is kind and len(layer.parts) == 1
    return whole and getattr(layer, "padding_mode", "zeros") == "zeros"


class Watched:
    """Modules and parts of them by their places, which somebody may exchange, hook into or give a ``forward``."""

    def __init__(self, modules: list[nn.Module], places: list[tuple[dict[str, nn.Module | None], str]]) -> None:
        self.modules, self.kinds = modules, list(map(type, modules))
        self.siblings, self.names = [siblings for siblings, _ in places], [name for _, name in places]
        self.children: list[Any] = [siblings[name] for siblings, name in places]
        self.own: list[dict[str, Any]] = list(map(vars, self.children))
        self.forwards: list[Any] = []  # where the modules have got their forms: another one is somebody's own
        self.hooks = [hooks for m in self.children for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy's modules have attributes of their own."""
        return {**vars(self), "own": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, own=list(map(vars, state["children"])))

    @property
    def untouched(self) -> bool:
        """Whether its modules are as they were: none is another, has hooks, or a ``forward`` that somebody gave it.

        Lists as wholes, since this is asked in each call.
        """
        return (
            not any(self.hooks)
            and list(map(type, self.modules)) == self.kinds
            and list(map(dict.get, self.siblings, self.names)) == self.children
            and self._own_forwards() == self.forwards
        )

    def _own_forwards(self) -> list[Any]:
        return list(map(dict.get, self.own, repeat("forward")))


class Fused(Watched):
    """Computes instead of a block's ``forward``, or by it where the arguments are other ones."""

    def __init__(self, block: Any) -> None:
        modules = list(block.modules())
        inner = [(m._modules, name) for m in modules for name, child in m._modules.items() if child is not None]
        super().__init__(modules, inner)
        self.block = block

    def seal(self) -> None:
        """All blocks in it have got their forms."""
        self.forwards = [forward if isinstance(forward, Fused) else None for forward in self._own_forwards()]

    def plainly(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class FusedTimesteps(Fused):
    """Timesteps, which remembers what it made of few numbers: torch's small operations add up to a layer's time."""

    known: ClassVar[dict[tuple[Any, ...], Tensor]] = {}

    def __call__(self, timesteps: Tensor) -> Any:
        if timesteps.ndim != 1 or timesteps.shape[0] > FEW or torch.compiler.is_compiling():
            return self.plainly(timesteps)
        block = self.block
        how = block.num_channels, block.flip_sin_to_cos, block.downscale_freq_shift, block.scale
        key = *how, *timesteps.tolist()
        y = self.known.get(key)
        if y is None:
            if len(self.known) >= MOST:  # threads may have passed it
                self.known.clear()
            y = self.known[key] = self.plainly(timesteps)
        return y.clone()  # which whoever asks may write to


class FusedOutput(Watched):
    """The last norm, SiLU and convolution of a U-Net: the first two hand x on, and the convolution does their part."""

    places = "conv_norm_out", "conv_act", "conv_out"

    def __init__(self, model: Any, norm: Norm) -> None:
        super().__init__([getattr(model, name) for name in self.places], [(model._modules, n) for n in self.places])
        self.norm = norm
        self.forwards = [*(partial(self.hand_on, module) for module in self.modules[:-1]), self]
        for own, forward in zip(self.own, self.forwards, strict=True):
            own["forward"] = forward

    @classmethod
    def of(cls, model: Any) -> FusedOutput | None:
        """For a model that ends so."""
        norm, activation, last = (model._modules.get(name) for name in cls.places)
        known = norm_of(norm)
        return cls(model, known) if known and isinstance(activation, nn.SiLU) and takes_norm(last) else None

    def hand_on(self, module: nn.Module, input: Tensor) -> Tensor:
        """In the place of the norm's and the activation's ``forward``."""
        return input if self.untouched else type(module).forward(module, input)

    def __call__(self, input: Tensor) -> Any:
        """In the place of the convolution's."""
        last: Any = self.modules[-1]
        if self.untouched:
            return last.run(input, norm=self.norm, activation=SILU).contiguous()
        return type(last).forward(last, input)


class TimeProjections:
    """The time-embedding linears of all residual blocks as one; computed when the first of them asks."""

    def __init__(self, linears: list[WeightOnlyLayer]) -> None:
        self.linear = linears[0].linear
        self.sizes = [len(linear.codes) for linear in linears]
        self.codes = torch.cat([linear.codes for linear in linears])
        self.scale = torch.cat([linear.scale.detach() for linear in linears])
        zeros = (torch.zeros(size) for size in self.sizes)
        self.bias = torch.cat([z if m.bias is None else m.bias.detach() for z, m in zip(zeros, linears, strict=True)])
        for linear, codes in zip(linears, self.codes.split(self.sizes), strict=True):
            linear.codes = codes  # the same memory

    def shift(self, temb: Tensor, index: int) -> Tensor | None:
        """temb [B, E] -> the shift [B, C] of block ``index``; None for another temb than that of this call's others."""
        last, shifts = kept().get(self, (None, ()))
        if last is None:
            y = self.linear(functional.silu(temb), self.codes, self.scale, self.bias)
            last, shifts = kept()[self] = temb, y.split(self.sizes, 1)
        return shifts[index] if last is temb else None


class FusedResnet(Fused):
    """ResnetBlock2D: ``conv2(silu(norm2(conv1(silu(norm1(x))) + temb))) + shortcut(x)``."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.norms = norm_of(block.norm1), norm_of(block.norm2)
        self.planned = PlannedResnet.of(block, self.norms)
        self.projections: tuple[TimeProjections, int] | None = None
        self.projects = block.time_emb_proj is not None

    @staticmethod
    def of(block: Any) -> FusedResnet | None:
        covered = (
            all(takes_norm(conv) for conv in (block.conv1, block.conv2))
            and all(norm_of(norm) for norm in (block.norm1, block.norm2))
            and isinstance(block.nonlinearity, nn.SiLU)
            and (block.upsample is None and block.downsample is None)
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
        )
        return FusedResnet(block) if covered else None

    def __call__(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        block, x = self.block, input_tensor
        fits = temb is None or (self.projects and temb.ndim == 2 and temb.shape[0] == x.shape[0])
        if x.ndim != 4 or not fits or not self.untouched:
            return self.plainly(x, temb, *args, **kwargs)
        shift = None if temb is None else self._shift(temb)
        y = (self.planned if self.planned and self.planned.takes(x) else self.layers)(x, shift)
        return y if block.output_scale_factor == 1 else y / block.output_scale_factor

    def layers(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """x [B, C, H, W] and the shift [B, O] before the second norm -> [B, O, H, W], layer by layer."""
        block, (first, second) = self.block, self.norms
        # a copy, since the sum takes its place and x may be wanted again as a skip connection
        residual = x.clone(memory_format=torch.channels_last) if block.conv_shortcut is None else block.conv_shortcut(x)
        y = block.conv1.run(x, norm=first, activation=SILU)
        z: Tensor = block.conv2.run(y, norm=second, activation=SILU, shift=shift, onto=residual)
        return z

    def _shift(self, temb: Tensor) -> Tensor:
        if self.projections is not None:
            together, index = self.projections
            shift = together.shift(temb, index)
            if shift is not None:
                return shift
        own: Tensor = self.block.time_emb_proj(functional.silu(temb))
        return own


class FusedUpsample(Fused):
    """Upsample2D by nearest neighbours and a convolution: codes are enlarged, not numbers."""

    @staticmethod
    def of(block: Any) -> FusedUpsample | None:
        covered = (
            block.use_conv
            and block.name == "conv"
            and takes_norm(block.conv)
            and block.interpolate
            and block.norm is None
            and not block.use_conv_transpose
        )
        return FusedUpsample(block) if covered else None

    def __call__(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        if output_size is not None or hidden_states.ndim != 4 or not self.untouched:
            return self.plainly(hidden_states, output_size, *args, **kwargs)
        return self.block.conv.run(hidden_states, up=2)


class FusedAttention(Fused):
    """Self-attention over the pixels of an image, with the residual of ``Attention``."""

    def __init__(self, block: Any, product: IntegerProduct) -> None:
        super().__init__(block)
        self.product, self.norm = product, norm_of(block.group_norm)
        self.planned = PlannedAttention.of(block, self.norm, product)

    @staticmethod
    def of(block: Any) -> FusedAttention | None:
        products = products_of(block)
        projections = (
            block.to_q,
            block.to_k,
            block.to_v,
            block.to_out[0] if isinstance(block.to_out, nn.ModuleList) else None,
        )
        covered = (
            len(products) == 1
            and type(block.processor) is AttnProcessor2_0
            and all(takes_norm(layer, IntegerLinear) for layer in projections)
            and norm_of(block.group_norm) is not None  # tokens have another norm, outside
            and (block.spatial_norm is None and block.norm_q is None and block.norm_k is None)
            and not block.is_cross_attention
        )
        return FusedAttention(block, products[0]) if covered else None

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        block, x = self.block, hidden_states
        plain = type(self.block.processor) is AttnProcessor2_0 and encoder_hidden_states is None
        if x.ndim != 4 or not plain or attention_mask is not None or not self.untouched:
            return self.plainly(x, encoder_hidden_states, attention_mask, **kwargs)
        with torch._C.DisableTorchFunction():  # what follows is not to be listened to
            y = (self.planned if self.planned and self.planned.takes(x) else self.layers)(x)
            return y if block.rescale_output_factor == 1 else y / block.rescale_output_factor

    def layers(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same, layer by layer."""
        x = x.contiguous(memory_format=torch.channels_last)
        block, (height, width) = self.block, x.shape[2:]
        q, k, v = (
            layer.run(x, norm=self.norm)
            .permute(0, 2, 3, 1)
            .flatten(1, 2)
            .unflatten(2, (block.heads, -1))
            .transpose(1, 2)
            for layer in (block.to_q, block.to_k, block.to_v)
        )
        out = self.product.attend(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
        image = out.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y: Tensor = block.to_out[0].run(image, onto=x.clone() if block.residual_connection else None)
        return y


class FusedChain(Fused):
    """Modules one after the other: an activation goes into the quantizer of the integer layer that follows it."""

    def __init__(self, block: Any, chain: list[tuple[nn.Module, Activation | None]]) -> None:
        super().__init__(block)
        self.chain = chain

    @staticmethod
    def of(block: Any) -> FusedChain | None:
        modules = block.net if isinstance(block, FeedForward) else block
        modules = [module for module in modules if type(module) not in (nn.Dropout, nn.Identity)]
        chain: list[tuple[nn.Module, Activation | None]] = []
        pending: Activation | None = None
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            before, activation = [module], None
            if type(module) in ACTIVATED and type(following) in FORMS.values() and len(following.parts) == 1:
                first, last = ACTIVATED[type(module)](module)
                if type(following) is IntegerLinear or not last.gated:  # a gate is in the last dimension
                    before, activation = first, last
            chain += [(m, pending) for m in before]
            pending = activation
        return FusedChain(block, chain) if any(activation for _, activation in chain) else None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.untouched:
            return self.plainly(x, *args, **kwargs)
        for module, activation in self.chain:
            x = module(x) if activation is None else module(x, activation)
        return x


def _gelu(module: Any) -> Activation:
    return Activation("gelu" if module.approximate == "none" else "gelu-tanh")


ACTIVATED: dict[type[nn.Module], Callable[[Any], tuple[list[nn.Module], Activation]]] = {
    nn.SiLU: lambda module: ([], SILU),
    nn.GELU: lambda module: ([], _gelu(module)),
    activations.GELU: lambda module: ([module.proj], _gelu(module)),
    activations.ApproximateGELU: lambda module: ([module.proj], Activation("gelu-sigmoid")),
    activations.GEGLU: lambda module: ([module.proj], Activation("gelu", gated=True)),
    activations.SwiGLU: lambda module: ([module.proj], Activation("silu", gated=True)),
}
"""What a module does before its activation, which comes last, and that activation."""
