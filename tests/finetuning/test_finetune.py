"""Fine-tuning as a whole: it starts at the artifact, is better than it, and ends as an artifact like any other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import images
from small_denoiser import SmallDenoiser
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptq_tdq import Calls, FinetuneConfig, QuantizedModel, calibrate, finetune, load_quantized, preset, record
from ptq_tdq.artifacts import read_artifact
from ptq_tdq.errors import ArtifactMismatchError, CalibrationSetError, ConfigError, ModelError, NonFiniteError
from ptq_tdq.finetuning import IterationReport
from ptq_tdq.finetuning.data import RecordedCalls
from ptq_tdq.finetuning.sources import begin_sources
from ptq_tdq.finetuning.student import Student
from ptq_tdq.identity import model_sha256
from ptq_tdq.load import build_quantized

Calibrated = Callable[..., QuantizedModel]
Choose = Callable[..., FinetuneConfig]
X, T = images(6, seed=5), torch.tensor([999.0, 700.0, 500.0, 300.0, 100.0, 1.0])


def student_of(denoiser: nn.Module, quantized: QuantizedModel, calls: Calls, config: FinetuneConfig) -> Student:
    data = RecordedCalls(calls)
    model = build_quantized(quantized.to_artifact(), denoiser)
    begin_sources(model, config, data.steps, [batch.arguments for batch in data.judges()])
    return Student(model, denoiser, config)


def loss(model: nn.Module, denoiser: nn.Module) -> float:
    """On calls that nobody has seen."""
    x, t = images(64, seed=9), torch.tensor([999.0, 500.0, 1.0, 1.0]).repeat(16)
    x = x * (0.5 + t / 1000).view(-1, 1, 1, 1)
    with torch.no_grad():
        return float((model(x, t) - denoiser(x, t)).square().mean())


@pytest.mark.parametrize(
    ("quantizer", "method"),
    [
        *product(("lsq", "pact", "nipq", "duq", "qil"), ("keep", "tdq", "S_3", "step-lsq")),
        *product(("lsq", "pact", "nipq", "duq"), ("dynamic-token-tdq",)),
    ],
)
def test_it_starts_at_the_artifact(
    quantizer: str, method: str, denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    """To the bit for methods that hold a single interval, to a fraction of a step for networks of t."""
    begun = calibrated(method="dynamic-token-static" if "token" in method else "static")
    student = student_of(denoiser, begun, calls, choose(quantizer=quantizer, method=method))
    with student.judged(), torch.no_grad():
        found, expected = student(X, T)[0], begun(X, T)
    if method in ("keep", "S_3"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((found - expected).square().mean() / expected.square().mean()) < 1e-2


@pytest.mark.parametrize(
    ("quantizer", "method"),
    [("lsq", "keep"), ("lsq", "tdq-thin"), ("pact", "step-lsq"), ("nipq", "keep"), ("duq", "tdq"), ("qil", "tdq")],
)
def test_it_is_better_than_calibration_alone_and_ends_as_an_artifact(
    quantizer: str,
    method: str,
    denoiser: nn.Module,
    calls: Calls,
    calibrated: Calibrated,
    choose: Choose,
    tmp_path: Path,
) -> None:
    tuned = finetune(denoiser, calibrated(), choose(quantizer=quantizer, method=method), calls)
    assert loss(tuned, denoiser) < 0.95 * loss(calibrated(), denoiser)
    known = tuned.metrics["finetune"]["held_out"]
    assert known["after"] < known["before"]
    tuned.save_pretrained(tmp_path / "out")
    for backend in ("simulated", "integer"):
        loaded = load_quantized(tmp_path / "out", model=denoiser, backend=backend)
        torch.testing.assert_close(loaded(X, T), tuned(X, T), rtol=1e-4, atol=1e-4)
    expected, layers = "static" if method == "keep" else method, read_artifact(tmp_path / "out").layers
    assert {q.method for layer in layers for q in layer.inputs} == {expected}
    assert tuned.provenance["method"] == expected and tuned.provenance["finetune"]["choices"]["quantizer"] == quantizer


def test_an_iteration_looks_for_no_layers(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large model they take as long to find as a GPU needs for a part of the iteration."""
    begun, searches = calibrated(), list[int]()
    for name in ("layers", "quantizers"):
        search = getattr(QuantizedModel, name)
        monkeypatch.setattr(QuantizedModel, name, lambda model, search=search: searches.append(1) or search(model))
    counts = list[int]()
    for iterations in (2, 9):
        searches.clear()
        finetune(denoiser, begun, choose(iterations=iterations, freeze_from=0.5), calls)
        counts.append(len(searches))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("quantizer", "method"), [("lsq", "tdq"), ("duq", "tdq"), ("qil", "S_3"), ("qil", "dynamic-statistics")]
)
def test_the_finished_model_is_what_was_trained(
    quantizer: str, method: str, denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    student = student_of(denoiser, calibrated(), calls, choose(quantizer=quantizer, method=method))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.learned().values():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        for factor in student.extra:
            factor.add_(0.3)
    with student.judged():
        trained = student(X, T)[0]
    torch.testing.assert_close(student.finish()(X, T), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_low_precision_model_learns_in_float32_and_keeps_its_dtypes(
    dtype: torch.dtype, choose: Choose, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = SmallDenoiser().to(dtype).eval().requires_grad_(False)
    with record(model) as calls, torch.no_grad():
        for t in (999.0, 500.0, 1.0):
            model(images(64).to(dtype), torch.full((64,), t))
    few = {"rounding": "gptq", "activation_iterations": 2, "eight_bit_layers": ()}
    begun = calibrate(model, preset("default", scheme="W2A4", method="static", **few), calls)
    tuned = finetune(model, begun, choose(weight_lr=1e-4), calls)  # steps that such a weight would round away
    known = tuned.metrics["finetune"]["held_out"]
    assert known["after"] < known["before"]
    kept, expected = tuned.state_dict(), begun.state_dict()
    assert {name: x.dtype for name, x in kept.items()} == {name: x.dtype for name, x in expected.items()}
    tuned.save_pretrained(tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", model=model)
    assert torch.equal(loaded(X.to(dtype), T), tuned(X.to(dtype), T))


@pytest.mark.parametrize("method", ["dynamic", "dynamic-statistics-time", "dynamic-token", "dynamic-token-tdq"])
def test_dynamic_intervals_are_baselines_that_learn(
    method: str, denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    tuned = finetune(denoiser, calibrated(), choose(method=method), calls)
    known = tuned.metrics["finetune"]["held_out"]
    assert known["after"] < known["before"]
    again = finetune(denoiser, tuned, choose(iterations=1), calls)  # what was learned goes on
    lost = again.metrics["finetune"]["held_out"]["before"] - known["after"]  # where a network is fitted to a table
    assert abs(lost) < 0.1 * (known["before"] - known["after"])


def test_an_interval_of_dynamic_origin_becomes_a_function_of_t(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    tuned = finetune(denoiser, calibrated(method="dynamic"), choose(method="static"), calls)
    tables = tuned.to_artifact().tables.values()
    assert tables and all(table.scale is not None and len(table.scale) == 1001 for table in tables)
    assert loss(tuned, denoiser) < loss(calibrated(), denoiser)


def test_neither_the_model_nor_the_artifact_changes(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (denoiser, calibrated())]
    finetune(denoiser, calibrated(), choose(iterations=3), calls)
    for model, state in zip((denoiser, calibrated()), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_accumulated_pieces_are_the_whole_batch(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    found = [
        finetune(denoiser, calibrated(), choose(accumulation=n, iterations=5, quantizer="pact"), calls) for n in (1, 4)
    ]
    losses = [torch.tensor([x["loss"] for x in model.metrics["finetune"]["losses"]]) for model in found]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-6)


def test_a_killed_run_goes_on_with_the_same_losses(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose, tmp_path: Path
) -> None:
    """With noise and dropout, of which nothing is kept but the seed."""
    config = choose(iterations=9, checkpoint_every=4, quantizer="nipq", method="tdq")

    class Killed(Exception):
        pass

    def stop(report: IterationReport) -> None:
        if report.iteration == 6:
            raise Killed

    whole = finetune(denoiser, calibrated(), config, calls)
    with pytest.raises(Killed):
        finetune(denoiser, calibrated(), config, calls, run_directory=tmp_path, on_iteration=stop)
    seen: list[int] = []
    resumed = finetune(
        denoiser, calibrated(), config, calls, run_directory=tmp_path, on_iteration=lambda r: seen.append(r.iteration)
    )
    assert seen == [5, 6, 7, 8, 9]
    assert resumed.metrics == whole.metrics
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_a_damaged_checkpoint_costs_a_notice(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose, tmp_path: Path
) -> None:
    config, notices = choose(iterations=2), list[str]()
    finetune(denoiser, calibrated(), config, calls, run_directory=str(tmp_path))
    file = tmp_path / "finetune-0000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    finetune(denoiser, calibrated(), config, calls, run_directory=tmp_path, on_notice=notices.append)
    assert any("is damaged; what it held is done again" in text for text in notices)


def test_nan_stops_with_the_iteration_and_the_layer(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    config = choose(weight_lr=1e30, schedule="constant", warmup=0)
    with pytest.raises(NonFiniteError, match=r"At iteration 2 [\w.]+ overflows or gives NaN; lower the learning rates"):
        finetune(denoiser, calibrated(), config, calls)


def test_wrong_requests_are_one_sentence(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    with pytest.raises(ConfigError, match=r"'qil' learns where intervals lie, and those of method 'dynamic' "):
        finetune(denoiser, calibrated(), choose(quantizer="qil", method="dynamic"), calls)
    with pytest.raises(ConfigError, match="'denoising' needs images or latents"):
        finetune(denoiser, calibrated(), choose(loss="denoising"), calls)
    with pytest.raises(CalibrationSetError, match="alone does not say how it is sampled"):
        finetune(denoiser, calibrated(), choose())
    with pytest.raises(ConfigError, match="needs the model's scheduler"):
        finetune(denoiser, calibrated(), choose(), "images")
    torch.manual_seed(1)
    other = type(denoiser)().eval()
    with pytest.raises(ArtifactMismatchError, match="made from"):
        finetune(other, calibrated(), choose(), calls)
    wrong: Any = preset("default")
    with pytest.raises(ConfigError, match="config must be a FinetuneConfig"):
        finetune(denoiser, calibrated(), wrong, calls)
    with pytest.raises(ConfigError, match=r"artifact must be a folder, a hub id, or what ptq_tdq.calibrate gives"):
        finetune(denoiser, wrong, choose(), calls)
    with pytest.raises(CalibrationSetError, match=r"data must be .* Got a Config instead"):
        finetune(denoiser, calibrated(), choose(), wrong)


def test_calls_of_another_model_are_one_sentence(denoiser: nn.Module, calibrated: Calibrated, choose: Choose) -> None:
    class Other(nn.Module):
        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            return latents

    other = Other()
    with record(other) as calls, torch.no_grad():
        for t in (999.0, 1.0):
            other(images(8), torch.full((8,), t))
    with pytest.raises(ModelError, match=r"SmallDenoiser cannot be called .* unexpected keyword argument 'latents'"):
        finetune(denoiser, calibrated(), choose(), calls)


class Checkpointed(SmallDenoiser):
    """Computes its middle once more where gradients are needed, or keeps it."""

    keeps = False

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time((timestep.float() / 1000).view(-1, 1)).view(-1, 8, 1, 1)
        h = nn.functional.silu(self.first(sample) + shift)
        result: Tensor = self.last(self.inside(h) if self.keeps else checkpoint(self.inside, h, use_reentrant=False))
        return result

    def inside(self, h: Tensor) -> Tensor:
        return torch.tanh(self.middle(h))


def test_checkpoints_change_nothing(calls: Calls, choose: Choose) -> None:
    """What they compute again has the time steps of the call that it is of."""
    config, found = preset("default", scheme="W3A4", method="S_2", compute_dtype="float32"), []
    few = calls.select(torch.arange(0, len(calls), 4))
    for keeps in (True, False):
        torch.manual_seed(0)
        model = Checkpointed().eval().requires_grad_(False)
        model.keeps = keeps
        quantized = calibrate(model, config.changed({"activation_iterations": 2}), few)
        tuned = finetune(model, quantized, choose(iterations=3, method="tdq-thin"), few)
        with torch.no_grad():
            found.append(torch.stack([quantized(X, T), tuned(X, T)]))
    assert torch.equal(*found)


class Greedy(torch.autograd.Function):
    """A checkpoint that asks for the gradients of all parameters."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor, *parameters: Tensor) -> Any:
        ctx.layer, ctx.x, ctx.parameters = layer, x, parameters
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        return None, *torch.autograd.grad(y, (x, *ctx.parameters), gradients, allow_unused=True)


class OwnCheckpoints(SmallDenoiser):
    """Has checkpoints of its own."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = super().forward(sample, timestep)
        result: Tensor = Greedy.apply(self.last, self.first(y), *self.last.parameters())
        return result


class Ungraded(SmallDenoiser):
    """Turns gradients off by itself."""

    @torch.no_grad()
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample, timestep)


class Mixing(SmallDenoiser):
    """Has a product that torch leaves in the dtypes that it meets."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = super().forward(sample, timestep)
        return torch.tensordot(y, torch.eye(y.shape[-1]), dims=1)


@pytest.mark.parametrize(
    ("kind", "dtype", "said"),
    [
        (Ungraded, "float32", "no gradients to learn from"),
        (OwnCheckpoints, "float32", r"let it call torch\.utils\.checkpoint"),
        (Mixing, "bfloat16", r"does not compute in torch\.bfloat16 .* choose float32 as compute_dtype"),
    ],
)
def test_a_forward_that_cannot_learn_is_one_sentence(
    kind: type[SmallDenoiser], dtype: str, said: str, denoiser: nn.Module, calls: Calls, calibrated: Calibrated,
    choose: Choose,
) -> None:  # fmt: skip
    model = kind().eval().requires_grad_(False)
    model.load_state_dict(denoiser.state_dict())
    artifact = calibrated().to_artifact()
    artifact.config["base_model"]["sha256"] = model_sha256(model)
    with pytest.raises(ModelError, match=said):
        finetune(model, artifact, choose(iterations=1, compute_dtype=dtype), calls)


def test_a_caller_without_gradients_changes_nothing(
    denoiser: nn.Module, calls: Calls, calibrated: Calibrated, choose: Choose
) -> None:
    found = [finetune(denoiser, calibrated(), choose(iterations=2), calls).metrics]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(finetune(denoiser, calibrated(), choose(iterations=2), calls).metrics)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"quantizer": "dorefa"}, "The quantizer must be one of duq, lsq, nipq, pact, qil. Got 'dorefa'"),
        ({"method": "nothing"}, "The method must be one of"),
        ({"method": "auto"}, "The method 'auto' chooses by what calibration compares"),
        ({"method": "fixed"}, "The method 'fixed' is that of x_t alone"),
        ({"iterations": 0}, "iterations must be from 1 to"),
        ({"iterations": 2**31 - 1}, "iterations must be from 1 to 10000000"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1. Got 1.0"),
        ({"weight_lr": "nan"}, "weight_lr must be above 0 and finite. Got nan"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size must be a multiple of accumulation"),
        ({"loss": "l1"}, "loss must be one of auto, distillation, denoising"),
    ],
)
def test_a_wrong_choice_is_one_sentence(choices: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        FinetuneConfig().changed(choices)
