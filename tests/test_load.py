"""What an artifact needs to become a model again: classes of one's own, half precision, tensors that no file holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, Denoiser, prediction
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from recorded import calls_of
from torch import Tensor, nn
from unets import tiny_unet

from ptq_tdq import Calls, QuantizedModel, calibrate, load_quantized, preset
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.errors import ArtifactMismatchError, ConfigError, ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.identity import model_sha256
from ptq_tdq.integrations.diffusers import as_diffusers
from ptq_tdq.structure import as_configured, beside_configuration, hollow_model
from ptq_tdq.wrap import folded_copy

QUICK = preset(
    "default",
    scheme="W8A8",
    method="step-table",
    rounding="nearest",
    round_again=False,
    activation_iterations=0,
    weight_range="minmax",
    activation_range="minmax",
)


class Own(nn.Module):
    """A denoiser outside diffusers, with reparametrized weights, a transposed convolution and a table of positions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(1, width)
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, width, 3, stride=2, padding=1))
        self.b = nn.utils.parametrizations.spectral_norm(nn.Conv2d(width, width, 3, padding=1, groups=2))
        self.c = nn.ConvTranspose2d(width, 3, 2, stride=2)
        self.register_buffer("positions", torch.randn(width, 1, 1), persistent=False)
        self.positions: Tensor

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        t = self.embed(timestep.to(sample.dtype)[:, None] / 1000)
        y = self.a(sample) + t[:, :, None, None] + self.positions
        result: Tensor = self.c(self.b(y.tanh()))
        return result


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"sample": torch.randn(4, 3, 8, 8, dtype=dtype), "timestep": torch.tensor([1000.0, 600.0, 200.0, 0.0])}


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, QuantizedModel]:
    model = Own().eval()
    quantized = calibrate(model, QUICK, calls_of(model, **inputs(), num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    return tmp_path / "out", quantized


@torch.no_grad()
def test_a_class_of_ones_own_is_loaded_with_an_instance_whose_weights_do_not_matter(own: Any) -> None:
    folder, quantized = own
    other = Own().eval()
    for parameter in other.parameters():
        parameter.fill_(3.0)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loaded = load_quantized(folder, model=other)
    assert torch.equal(loaded(**inputs()), quantized(**inputs()))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    integer = load_quantized(folder, model=other, backend="integer")
    assert sqnr_db(quantized(**inputs()), integer(**inputs())) > 30


def test_without_an_instance_the_error_says_what_is_needed(own: Any) -> None:
    for backend in ("simulated", "integer"):
        with pytest.raises(
            ArtifactMismatchError, match=r"is of a 'Own', which .* pass an instance of it as model=\.\.\."
        ):
            load_quantized(own[0], backend=backend)


@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device: str, tmp_path: Path) -> None:
    for backend in ("simulated", "integer"):
        with pytest.raises(ConfigError, match=f"The device '{device}' cannot be used here"):
            load_quantized(tmp_path, backend=backend, device=device)


def test_an_instance_of_another_structure_is_refused(own: Any) -> None:
    for backend in ("simulated", "integer"):
        with pytest.raises(ArtifactMismatchError, match="has codes of the shape"):
            load_quantized(own[0], model=Own(16), backend=backend)


def test_what_is_no_instance_with_values_is_refused(own: Any) -> None:
    folder, quantized = own
    with torch.device("meta"):
        hollow = nn.Sequential(nn.BatchNorm2d(3))
        hollow.register_buffer("positions", torch.randn(8), persistent=False)
    for backend in ("simulated", "integer"):
        with pytest.raises(ConfigError, match=r"an instance of the model's class\. Got a type instead"):
            load_quantized(folder, model=Own, backend=backend)
        with pytest.raises(ConfigError, match=r"'positions' of model .* is on the meta device"):
            load_quantized(folder, model=hollow, backend=backend)
        with pytest.raises(ConfigError, match=r"a folder or a hub id\. Got a QuantizedModel instead"):
            load_quantized(quantized, backend=backend)


class SiLU(nn.SiLU):
    """Under the name of what it takes the place of."""

    def forward(self, input: Tensor) -> Tensor:
        return input.tanh()


@pytest.mark.parametrize("act", [nn.GELU(), SiLU()])
@torch.no_grad()
def test_a_module_that_was_exchanged_before_calibration_is_not_lost(act: nn.Module, tmp_path: Path) -> None:
    model, given = tiny_unet(), {**inputs(), "timestep": torch.tensor([999, 600, 200, 0])}
    model.conv_act = act
    quantized = calibrate(model, QUICK, calls_of(model, **given))
    assert any(f"'conv_act' is of class {type(act).__name__})" in notice for notice in quantized.notices)
    quantized.save_pretrained(tmp_path / "out")
    for backend in ("simulated", "integer"):
        with pytest.raises(ArtifactMismatchError, match=r"whose module 'conv_act' was of class .* as model=\.\.\."):
            load_quantized(tmp_path / "out", backend=backend)
    if isinstance(act, nn.GELU):
        with pytest.raises(ArtifactMismatchError, match="is of class SiLU in the model, of class GELU in the artifact"):
            load_quantized(tmp_path / "out", model=tiny_unet())
    loaded = load_quantized(tmp_path / "out", model=model)
    assert torch.equal(prediction(loaded(**given)), prediction(quantized(**given)))
    with pytest.raises(ArtifactMismatchError, match="'conv_act' was of class"):
        as_diffusers(quantized).save_pretrained(tmp_path / "component")


def changes(model: nn.Module, time: str = "timestep") -> dict[str, Any]:
    folded = folded_copy(model)
    assert as_configured(folded, time) is not None
    exchanged, settings = beside_configuration(folded, time)
    return exchanged | settings


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda denoiser: denoiser.name)
@torch.no_grad()
def test_nothing_was_exchanged_in_a_model_as_it_is_built(denoiser: Denoiser) -> None:
    model = denoiser.build()
    model(**denoiser.inputs(2, torch.tensor([700.0, 300.0])))
    assert not changes(model, denoiser.time_argument)


def test_dropout_that_was_taken_out_is_no_other_model() -> None:
    model = tiny_unet()
    for block in model.mid_block.resnets:
        block.dropout = nn.Identity()
    assert not changes(model)


def test_what_only_training_reads_and_diffusers_own_attention_are_no_other_model() -> None:
    model = tiny_unet()
    model.enable_gradient_checkpointing()
    model.mid_block.attentions[0].set_processor(AttnProcessor())
    assert not changes(model.train())


class Halved(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) / 2


@torch.no_grad()
def test_an_attention_processor_of_ones_own_is_not_lost(tmp_path: Path) -> None:
    model, given = tiny_unet(), {**inputs(), "timestep": torch.tensor([999, 600, 200, 0])}
    model.mid_block.attentions[0].set_processor(Halved())
    quantized = calibrate(model, QUICK, calls_of(model, **given))
    quantized.save_pretrained(tmp_path / "out")
    with pytest.raises(ArtifactMismatchError, match=r"attentions.0.processor' was of class Halved"):
        load_quantized(tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", model=model)
    assert torch.equal(prediction(loaded(**given)), prediction(quantized(**given)))


@torch.no_grad()
def test_settings_that_no_configuration_holds_are_told_and_can_be_given_again(tmp_path: Path) -> None:
    unet = next(denoiser for denoiser in DENOISERS if denoiser.name == "UNet2DConditionModel (SD 1.5)")
    model, given = unet.build(), unet.inputs(2, torch.tensor([700.0, 300.0]))
    freeu = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    model.enable_freeu(**freeu)
    quantized = calibrate(model, QUICK, calls_of(model, **given, num_train_timesteps=1000))
    assert any("('up_blocks.0.s1' is 0.9); give them to the loaded model again" in n for n in quantized.notices)
    quantized.save_pretrained(tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    assert not torch.equal(prediction(loaded(**given)), prediction(quantized(**given)))
    loaded.enable_freeu(**freeu)
    assert torch.equal(prediction(loaded(**given)), prediction(quantized(**given)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_model_in_half_precision_comes_back_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Own().eval().to(dtype)
    quantized = calibrate(model, QUICK, calls_of(model, **inputs(dtype), num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", model=Own())
    assert loaded.dtype == dtype and loaded.model.positions.dtype == dtype
    found = loaded(**inputs(dtype))
    assert found.dtype == dtype and torch.equal(found, quantized(**inputs(dtype)))
    for ours, theirs in zip(loaded.quantizers().values(), quantized.quantizers().values(), strict=True):
        assert ours.source.scale.dtype == torch.float32  # type: ignore[union-attr]
        assert torch.equal(ours.source.scale, theirs.source.scale)  # type: ignore[union-attr]
    expected = model(**inputs(dtype))
    assert sqnr_db(expected, found) > 25


@torch.no_grad()
def test_integers_of_a_model_in_double_precision_compute_in_single(tmp_path: Path) -> None:
    class Normed(Own):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh())
            self.double()

    model, given = Normed().eval(), inputs(torch.float64)
    quantized = calibrate(model, QUICK, calls_of(model, **given, num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    integer = load_quantized(tmp_path / "out", model=Normed(), backend="integer")
    found = integer(**given)
    assert found.dtype == integer.dtype == torch.float64
    assert sqnr_db(quantized(**given), found) > 30


class Encoded(nn.Module):
    """A denoiser around torch's encoder, whose fast path goes around the layers inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.first, self.encoder, self.last = nn.Linear(3, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, sample: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        """sample [B, N, 3], mask bool [B, N]: tokens that are padding."""
        y = self.first(sample) + timestep.float()[:, None, None] / 1000
        result: Tensor = self.last(self.encoder(y, src_key_padding_mask=mask))
        return result


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_layers_inside_of_torchs_encoder_are_quantized_and_come_back(tmp_path: Path) -> None:
    model, mask = Encoded().eval(), torch.arange(6) >= torch.tensor([6, 4, 3, 6])[:, None]
    torch.manual_seed(1)
    arguments = {"sample": torch.randn(4, 6, 3), "timestep": inputs()["timestep"], "mask": mask}
    quantized = calibrate(model, QUICK, calls_of(model, **arguments, num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    found = quantized(**arguments)
    assert torch.equal(load_quantized(tmp_path / "out", model=Encoded())(**arguments), found)
    integer = load_quantized(tmp_path / "out", model=Encoded(), backend="integer")
    assert sqnr_db(found[~mask], integer(**arguments)[~mask]) > 25
    assert 20 < sqnr_db(model(**arguments)[~mask], found[~mask]) < 100
    for name in ("encoder.layers.0.linear1", "encoder.layers.0.linear2"):
        (quantizer,) = quantized.layers()[name].inputs
        quantizer.enabled = False
        assert not torch.equal(quantized(**arguments), found)
        quantizer.enabled = True


NAMED = {denoiser.name: denoiser for denoiser in DENOISERS}


def recorded(denoiser: Denoiser, model: nn.Module) -> Calls:
    return calls_of(model, **denoiser.inputs(2, torch.tensor([1000.0, 201.0])), num_train_timesteps=1000)


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "QwenImageTransformer2DModel"])
@torch.no_grad()
def test_tensors_that_no_file_holds_have_their_values_and_nothing_else_takes_memory(name: str, tmp_path: Path) -> None:
    denoiser = NAMED[name]
    model = denoiser.build()
    quantized = calibrate(model, QUICK, calls := recorded(denoiser, model))
    quantized.save_pretrained(tmp_path / "out")
    state = torch.get_rng_state()
    hollow = hollow_model(read_artifact(tmp_path / "out"))
    assert all(parameter.is_meta for parameter in hollow.parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in hollow.named_buffers())
    torch.set_rng_state(state)
    pair = calls.inputs(slice(0, 2))
    for backend in ("simulated", "integer"):
        loaded = load_quantized(tmp_path / "out", backend=backend)
        assert sqnr_db(prediction(quantized(**pair)), prediction(loaded(**pair))) > 30


def test_threads_load_at_once_and_leave_torch_as_it_was(tmp_path: Path) -> None:
    denoiser = NAMED["DiTTransformer2DModel"]
    with torch.no_grad():
        model = denoiser.build()
        quantized = calibrate(model, QUICK, calls := recorded(denoiser, model))
    quantized.save_pretrained(tmp_path / "out")
    artifact = read_artifact(tmp_path / "out")
    begin = Barrier(4)

    def load(_: int) -> list[str]:
        begin.wait()
        return [p.device.type for _ in range(4) for p in hollow_model(artifact).parameters()]

    with ThreadPoolExecutor(4) as pool:
        assert {device for found in pool.map(load, range(4)) for device in found} == {"meta"}
        assert set(pool.map(lambda _: nn.Linear(2, 2).weight.device.type, range(4))) == {"cpu"}
    with torch.no_grad():
        pair = calls.inputs(slice(0, 2))
        assert torch.equal(prediction(load_quantized(tmp_path / "out")(**pair)), prediction(quantized(**pair)))


class Named(nn.Module):
    """One layer of two names, of which the second is called, and one layer that is called twice in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.alias, self.list = self.layer, nn.ModuleList([self.again, self.again])
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = self.alias(sample) + timestep[:, None, None, None] / 1000
        for layer in self.list:
            y = layer(y.relu())
        result: Tensor = self.last(y)
        return result


@torch.no_grad()
def test_a_layer_of_several_names_is_quantized_wherever_it_is_called(tmp_path: Path) -> None:
    model = Named().eval()
    quantized = calibrate(model, QUICK, calls_of(model, **inputs(), num_train_timesteps=1000))
    assert list(quantized.layers()) == ["alias", "list.0", "list.1", "last"]
    assert quantized.notices == ("No attention products were found.",)
    quantized.save_pretrained(tmp_path / "out")
    expected = quantized(**inputs())
    assert sqnr_db(model(**inputs()), expected) > 25
    assert torch.equal(load_quantized(tmp_path / "out", model=Named())(**inputs()), expected)
    assert sqnr_db(expected, load_quantized(tmp_path / "out", model=Named(), backend="integer")(**inputs())) > 60


class Repeated(nn.Module):
    """A block of two names, with its own norm, which is called under both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        block = nn.Sequential(nn.GroupNorm(2, 8), nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)))
        self.blocks = nn.ModuleList([block, block])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = self.first(sample) + timestep[:, None, None, None] / 1000
        for block in self.blocks:
            y = y + block(y)
        result: Tensor = self.last(y)
        return result


@torch.no_grad()
def test_a_block_of_several_names_comes_back_with_intervals_of_its_own_at_each(tmp_path: Path) -> None:
    model = Repeated().eval()
    quantized = calibrate(model, QUICK, calls_of(model, **inputs(), num_train_timesteps=1000))
    assert list(quantized.layers()) == ["first", "blocks.0.1.1", "blocks.1.1.1", "last"]
    inside = [table.scale for name, table in quantized.to_artifact().tables.items() if name.startswith("blocks.")]
    assert not torch.equal(*inside)
    quantized.save_pretrained(tmp_path / "out")
    expected = quantized(**inputs())
    assert sqnr_db(model(**inputs()), expected) > 25
    assert torch.equal(load_quantized(tmp_path / "out", model=Repeated())(**inputs()), expected)
    assert sqnr_db(expected, load_quantized(tmp_path / "out", model=Repeated(), backend="integer")(**inputs())) > 60


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_mode_is_said_to_be(training: bool) -> None:
    model = Own()
    model.b = nn.Sequential(model.b, nn.Dropout(0.5), nn.Dropout(0.0))
    model.train(training)
    notices = calibrate(model, QUICK, calls_of(model, **inputs(), num_train_timesteps=1000)).notices
    assert any("in training mode, in which 'b.1' computes something else" in said for said in notices) == training


@torch.no_grad()
def test_calibration_is_the_same_whatever_torch_is_set_to() -> None:
    model = Own().eval().requires_grad_(False)
    calls = calls_of(model, **inputs(), num_train_timesteps=1000)
    config = QUICK.changed({"activation_iterations": 2, "method": "tdq-thin", "rounding": "learned"})
    expected = calibrate(model, config, calls).state_dict()
    with torch.inference_mode():
        inferred = calibrate(model, config, calls).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        cast = calibrate(model, config, calls).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        double = calibrate(model, config, calls).state_dict()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (inferred, cast, double):
        assert all(torch.equal(found[key], value) for key, value in expected.items())


class Spectral(nn.Module):
    """Multiplies by complex factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.factor = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 4]."""
        result: Tensor = self.last((self.first(sample) * self.factor * timestep[:, None] / 1000).real)
        return result


class Counting(nn.Identity):
    """Keeps something beside tensors."""

    def get_extra_state(self) -> Any:
        return {"count": 1}


class Sparse(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(4).to_sparse())


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (nn.LazyConv2d(8, 1), r"'b\.weight' of the model has no values yet"),
        (Counting(), r"a dict as 'b\._extra_state'"),
        (Sparse(), r"a torch\.sparse_coo tensor as 'b\.graph'"),
    ],
)
def test_a_state_that_no_artifact_holds_is_one_sentence(part: nn.Module, said: str, own: Any) -> None:
    other = Own()
    other.b = part
    with pytest.raises(ModelError, match=said):
        load_quantized(own[0], model=other)
    with pytest.raises(ModelError, match=said):
        model_sha256(other)


class Adapted(nn.Conv2d):
    """A layer with an adapter whose second factor is still zero, and a buffer of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + ((self.up @ self.down) @ x.flatten(2)).view(len(x), -1, *x.shape[2:])


class Saving(Own):
    """Saves its weights under other names, without those of one part."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"ema.{k}": v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("b.")}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k.removeprefix("ema."): v for k, v in state.items()}, False)


class Shifted(Own):
    """Saves its biases less one, by a pair of hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(lambda module, state, *_: self._shift(state, -1))
        self.register_load_state_dict_pre_hook(lambda module, state, *_: self._shift(state, 1))

    @staticmethod
    def _shift(state: Any, by: int) -> None:
        for key in [key for key in state if key.endswith("bias")]:
            state[key] = state[key] + by


@torch.no_grad()
@pytest.mark.parametrize("kind", [Saving, Shifted])
def test_a_class_that_saves_its_weights_in_its_own_way_comes_back_whole(kind: type[Own], tmp_path: Path) -> None:
    model = kind().eval()
    quantized = calibrate(model, QUICK, calls_of(model, **inputs(), num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    assert torch.equal(load_quantized(tmp_path / "out", model=kind())(**inputs()), quantized(**inputs()))
    integer = load_quantized(tmp_path / "out", model=kind(), backend="integer")
    assert sqnr_db(quantized(**inputs()), integer(**inputs())) > 30


@torch.no_grad()
def test_all_tensors_of_a_layer_come_back(tmp_path: Path) -> None:
    model = Own()
    model.b = Adapted(8, 8, 1)
    model.b.calls += 7
    quantized = calibrate(model.eval(), QUICK, calls_of(model, **inputs(), num_train_timesteps=1000))
    model.b.down.zero_()  # of the original alone
    quantized.save_pretrained(tmp_path / "out")
    fresh = Own()
    fresh.b = Adapted(8, 8, 1)
    loaded = load_quantized(tmp_path / "out", model=fresh)
    layer = loaded.get_submodule("model.b")
    assert isinstance(layer.down, Tensor) and bool(layer.down.all())
    assert int(layer.calls) == 7
    assert torch.equal(quantized(**inputs()), loaded(**inputs()))
    assert (
        sqnr_db(loaded(**inputs()), load_quantized(tmp_path / "out", model=fresh, backend="integer")(**inputs())) > 30
    )


@torch.no_grad()
def test_complex_parameters_come_back(tmp_path: Path) -> None:
    given = {"sample": torch.randn(4, 4), "timestep": torch.tensor([1000.0, 600.0, 200.0, 1.0])}
    quantized = calibrate(Spectral(), QUICK, calls_of(Spectral(), **given, num_train_timesteps=1000))
    quantized.save_pretrained(tmp_path / "out")
    assert torch.equal(load_quantized(tmp_path / "out", model=Spectral())(**given), quantized(**given))
