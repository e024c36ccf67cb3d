"""Each bad input ends in one clear line, the right exit code and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hostile import small_artifact, with_config
from recorded import calls_of, images
from torch import Tensor, nn

from ptq_tdq import Calls, calibrate, load_quantized, preset, record
from ptq_tdq.artifacts import Artifact, write_artifact
from ptq_tdq.errors import (
    ArtifactCorruptError,
    CalibrationSetError,
    ConfigError,
    ModelError,
    NonFiniteError,
)
from ptq_tdq.structure import diffusers_class
from ptq_tdq.timeaxis import TimeAxis

WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = ("--method", "static", "--set", "activation_iterations=0", "--set", "rounding=nearest", "--set")


def check_refusal(result: Any, code: int, *said: str) -> None:
    assert result.code == code, result
    assert result.out == ""
    assert len(result.err.splitlines()) == 1 and result.err.startswith("Error: ") and "Traceback" not in result.err
    for text in said:
        assert text in result.err


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no file above ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def saved(unet: Callable[..., UNet2DModel], tmp_path: Path) -> Callable[[Callable[[UNet2DModel], None]], Path]:
    """A model folder with changed weights."""

    def save(change: Callable[[UNet2DModel], None]) -> Path:
        model = unet()
        change(model)
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        DDPMScheduler().save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights_name_their_layer(value: float, cli: Any, saved: Any, tmp_path: Path) -> None:
    model = saved(lambda u: u.mid_block.resnets[0].conv1.weight.view(-1)[3].fill_(value))
    result = cli("calibrate", "--model", model, "--output-dir", tmp_path / "out")
    check_refusal(result, 1, "mid_block.resnets.0.conv1", "NaN or Inf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_activations_that_overflow_name_layer_and_t(
    cli: Any, saved: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    model = saved(lambda u: u.conv_in.weight.fill_(3e38))
    result = cli("calibrate", "--model", model, "--output-dir", tmp_path / "out", *small)
    check_refusal(result, 1, "timestep = 750", "first in conv_in")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def small_set(model: nn.Module, labels: Tensor | None = None) -> Calls:
    conditions = {} if labels is None else {"class_labels": labels}
    t = torch.tensor([0.0, 0.0, 7.0, 7.0])
    return calls_of(model, images(4, model.config.in_channels), t, num_train_timesteps=10, **conditions)


def test_activations_that_overflow_in_calibration_name_layer_and_t(unet: Callable[..., UNet2DModel]) -> None:
    model = unet()
    calls = small_set(model)
    model.up_blocks[0].resnets[0].conv1.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"up_blocks\.0\.resnets\.0.* NaN or Inf at t = 0"):
        calibrate(model, preset("default", weight_iterations=0), calls)


def test_an_empty_calibration_set(cli: Any, pipeline: Path, tmp_path: Path) -> None:
    flags = ("--model", pipeline, "--output-dir", tmp_path / "out", "--samples-per-step", "0")
    check_refusal(cli("calibrate", *flags), 2, "samples_per_step must be from 1 to 1048575. Got 0 instead.")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CalibrationSetError, match="empty"):
        calibrate(nn.Linear(1, 1), preset("default"), Calls(TimeAxis("timestep")))


class NoTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(sample)


@pytest.mark.parametrize("model", [NoTime(), nn.Identity()])
def test_a_model_without_a_timestep_argument(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no argument that is known to hold a time step"), record(model):
        pass


def test_a_module_alone_does_not_say_how_it_is_sampled(unet: Callable[..., UNet2DModel]) -> None:
    with pytest.raises(CalibrationSetError, match="record calls of it"):
        calibrate(unet(), preset("default"))


def test_calls_of_another_kind_of_model(unet: Callable[..., UNet2DModel]) -> None:
    config, labels = preset("default"), torch.zeros(4, dtype=torch.int64)
    plain, classes, four = unet(), unet(num_class_embeds=3), unet(in_channels=4)
    for model, other in ((classes, small_set(plain)), (four, small_set(plain)), (plain, small_set(four))):
        with pytest.raises(ModelError, match=r"cannot be called with .* the recorded calls"):
            calibrate(model, config, other)
    assert len(small_set(classes, labels)) == 4


def test_no_layer_left_and_a_pattern_that_matches_nothing(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
    check_refusal(cli(*run, "--skip", "*"), 1, "0 layers of the model match")
    check_refusal(cli(*run, "--skip", "conv_middle"), 1, "The skip pattern 'conv_middle' matches no layer")
    assert list(tmp_path.iterdir()) == []


def test_choices_that_do_not_fit_the_model_are_refused_before_the_sampler_runs(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ_TDQ_CACHE", str(tmp_path / "cache"))
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
    check_refusal(cli(*run, "--skip", "conv_middle"), 1, "matches no layer")
    study = ("benchmark", "--model", pipeline, "--results", tmp_path / "r.jsonl", "--set", "skip=conv_middle")
    check_refusal(cli(*study, "--methods", "static", "--seeds", "0"), 1, "matches no layer")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_document_can_hold_is_refused_before_the_first_unit(unet: Callable[..., UNet2DModel]) -> None:
    def stop(report: object) -> None:
        raise AssertionError(report)

    for name in ("\udcff", 5):
        found: Any = name
        with pytest.raises(ConfigError):
            calibrate(unet(), preset("default"), small_set(unet()), model_id=found, on_unit=stop)


def test_a_lower_case_scheme_and_fewer_steps_end_in_an_artifact(cli: Any, pipeline: Path, tmp_path: Path) -> None:
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out")
    shown = json.loads(cli(*run, "--num-inference-steps", "10", "--scheme", " w4a8 ", "--show-config").out)
    steps = shown["calibration"]
    assert (shown["scheme"], steps["num_inference_steps"], steps["calibration_steps"]) == ("W4A8", 10, 10)
    quick = (
        "--samples-per-step",
        "2",
        "--evaluation-samples",
        "0",
        "--threads",
        "1",
        *QUICK,
        "activation_range=minmax",
    )
    result = cli(*run, "--scheme", " w4a8 ", "--num-inference-steps", "2", *quick)
    assert result.code == 0, result.err
    choices = json.loads((tmp_path / "out" / "ptq_tdq_config.json").read_text())["choices"]
    assert (choices["scheme"], choices["calibration"]["calibration_steps"]) == ("W4A8", 2)


def test_a_model_of_zeros_is_calibrated_and_measured(
    cli: Any, saved: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    model = saved(lambda unet: [parameter.zero_() for parameter in unet.parameters()])
    result = cli("calibrate", "--model", model, "--output-dir", tmp_path / "out", *small, "--json")
    assert (result.code, result.err) == (0, "")
    assert load_quantized(tmp_path / "out").metrics["learned"]["latent_sqnr_db"] is None  # equal, so infinite


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--scheme", "W1A99"), "for example W4A8. Got 'W1A99' instead."),
        (("--method", "magic"), "The method must be one of"),
        (("--preset", "best"), "'best' is not one of 'default', 'qdiff', 'paper'"),
        (("--colour", "red"), "No such option"),
        (("--threads", "0"), "0 is not in the range 1<=x<=1024"),
        (("--calibration-steps", "9", "--num-inference-steps", "8"), "calibration_steps must not exceed"),
        (("--num-inference-steps", "5000"), "cannot run 5000 inference steps"),
        (("--num-inference-steps", "0"), "num_inference_steps must be from 1 to"),
        (("--num-inference-steps", "10", "--set", "calibration_steps=11"), "Got 11 instead."),
        (("--scheme", "W٤A٨"), "for example W4A8. Got 'W٤A٨' instead."),
        (("--method", "TDQ"), "tdq-thin. Got 'TDQ' instead."),
        (("--seed", "٣"), "seed must be of type int. Got '٣' instead."),
        (("--scheduler", ""), "no scheduler named ''"),
        (("--set", "damping=1e400"), "damping must be above 0 and finite. Got inf instead."),
        (("--device", "privateuseone"), "The device 'privateuseone' cannot be used here"),
        (("--set", "skip=\udcff"), "skip must be of type str. Got '\\udcff' instead."),
    ],
)
def test_usage_errors(flags: tuple[str, ...], said: str, cli: Any, pipeline: Path, tmp_path: Path) -> None:
    check_refusal(cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *flags), 2, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["NoScheduler", "UNet2DModel", "os.path", "FlowMatchEulerDiscreteScheduler"])
def test_an_unknown_or_unfit_scheduler(name: str, cli: Any, calibrated: Any, pipeline: Path, tmp_path: Path) -> None:
    check_refusal(cli("sample", calibrated(pipeline), "--output", tmp_path / "x.png", "--scheduler", name), 2, name)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_of_another_model(
    cli: Any, calibrated: Any, pipeline: Path, conditional: Path, tmp_path: Path
) -> None:
    flags = ("--model", conditional, "--output", tmp_path / "x.png")
    check_refusal(cli("sample", calibrated(pipeline), *flags), 1, "The artifact was made from")
    assert list(tmp_path.iterdir()) == []


def exchanged_artifact() -> Artifact:
    artifact = small_artifact()
    return replace(artifact, config={**artifact.config, "exchanged_modules": {"conv_act": "GELU"}})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: with_config(small_artifact(), _class_name="Net"),
            "is of a 'Net', which diffusers does not have; use it",
        ),
        (
            exchanged_artifact,
            "is of a model whose module 'conv_act' was of class GELU, which its configuration does not",
        ),
    ],
    ids=["class", "module"],
)
def test_an_artifact_of_a_model_that_commands_cannot_build(
    make: Callable[[], Artifact], said: str, cli: Any, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "own", make())
    export = [("export", "--format", kind, "--output", tmp_path / "x") for kind in ("onnx", "diffusers")]
    sample = ("sample", "--output", tmp_path / "x.png")
    for command in (sample, (*sample, "--model", tmp_path), ("evaluate",), ("inspect", "--runtime"), *export):
        result = cli(command[0], tmp_path / "own", *command[1:])
        assert result.code != 0
        assert said in result.err
    result = cli("report", tmp_path / "own", "--output-dir", tmp_path / "report")  # of what the artifact holds
    assert result.code == 0
    assert f"missing from the page. The artifact {said}" in result.err
    assert "--model" not in result.err


def test_samples_that_are_no_images(
    cli: Any, small: tuple[str, ...], unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    model = tmp_path / "latent"
    unet(in_channels=4, out_channels=4).save_pretrained(model)
    DDPMScheduler().save_pretrained(model)
    out = tmp_path / "out"
    assert cli("calibrate", "--model", model, "--output-dir", out, *small, *QUICK, "activation_range=minmax").code == 0
    result = cli("sample", out, "--output", tmp_path / "x.png", "--num-images", 2, "--num-inference-steps", 2)
    assert result.code == 0 and "latents that the model has no VAE" in result.out and "dB SQNR" in result.out
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("option", ["--output-dir", "--prompts", "--config"])
def test_a_link_to_itself_is_no_path(option: str, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "out"):
        result = cli("calibrate", "--model", "nowhere", option, path)
        check_refusal(result, 2, "cannot be a path here (Too many levels of symbolic links)")


def test_output_paths_that_cannot_be_written_are_refused_before_the_work(
    cli: Any, calibrated: Any, contents: Any, pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    before = contents(tmp_path)
    for out, code, *said in (
        (tmp_path / "file", 1, "is a file, not a folder"),
        (tmp_path / "file" / "out", 1, "a part of its path is a file"),
        (tmp_path / "file" / "a" / "out", 1, "a part of its path is a file"),
        (tmp_path / "full", 1, "is not empty"),
        ("/", 1, "mount point"),
    ):
        check_refusal(cli("calibrate", "--model", "nowhere", "--output-dir", out), code, *said)
    long = tmp_path / ("n" * 250)  # too long with the ending of an unfinished run
    check_refusal(
        cli("calibrate", "--model", "nowhere", "--output-dir", long), 1, "cannot be made (File name too long)"
    )
    overwrite = ("--output-dir", tmp_path / "full", "--overwrite")
    check_refusal(cli("calibrate", "--model", "nowhere", *overwrite), 1, "holds 'letter.txt', which is no part")
    check_refusal(cli("export", calibrated(pipeline), "--output", tmp_path / "file" / "t.csv"), 1, "cannot be written")
    sample = ("--output", tmp_path / "file" / "x.png", "--num-images", "1", "--num-inference-steps", "1")
    check_refusal(cli("sample", calibrated(pipeline), *sample), 1, "cannot be written")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("export ARTIFACT --format json --output ARTIFACT/weights.safetensors", "lies in the artifact"),
        ("export ARTIFACT --output ARTIFACT/tables.csv", "lies in the artifact"),
        ("finetune ARTIFACT --output-dir ARTIFACT/tuned", "lies in the artifact"),
        ("sample ARTIFACT --output ARTIFACT/x.png", "lies in the artifact"),
        ("evaluate ARTIFACT --output-dir ARTIFACT/found", "lies in the artifact"),
        ("report ARTIFACT --output-dir ARTIFACT/report", "lies in the artifact"),
        ("export ARTIFACT --format json --output letter.png", "not an interval table"),
        ("export ARTIFACT --format onnx --calls calls --output calls", "not a graph of ptq-tdq"),
        ("export ARTIFACT --format onnx-float --output letter.onnx", "'letter.csv' is there and is not"),
        ("sample ARTIFACT --output letter.png", "not a PNG image"),
        ("benchmark --render lines --output lines", "would replace what is read from there"),
        ("benchmark --results new --output new", "would replace what is read from there"),
        ("benchmark --render lines --output letter.csv", "not a table of a study"),
        ("benchmark --render lines --output -", "'-' is no file here"),
    ],
)
def test_an_output_replaces_nothing_but_its_own_kind(
    command: str, said: str, cli: Any, calibrated: Any, contents: Any, pipeline: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    artifact, before = calibrated(pipeline), contents(calibrated(pipeline))
    monkeypatch.chdir(tmp_path)
    for name in ("calls", "lines", "letter.csv", "letter.png"):
        Path(name).write_text("mine")
    result = cli(*command.replace("ARTIFACT", str(artifact)).split())
    check_refusal(result, 2 if said.startswith(("'-'", "lies")) else 1, said)
    assert contents(artifact) == before and {path.read_text() for path in Path().iterdir()} == {"mine"}


def test_an_existing_artifact_is_replaced_only_on_request(
    cli: Any, small: tuple[str, ...], contents: Any, calibrated: Any, copy_of: Any, pipeline: Path
) -> None:
    out = copy_of(calibrated(pipeline))
    before = contents(out)
    run = ("calibrate", "--model", pipeline, "--output-dir", out, *small, *QUICK, "activation_range=minmax", "-q")
    check_refusal(cli(*run), 1, "is not empty; choose another folder, empty it, or ask to overwrite it")
    assert contents(out) == before
    assert cli(*run, "--overwrite").code == 0
    assert contents(out) != before and set(contents(out)) == set(before)


def test_a_full_disk_leaves_only_what_the_next_run_needs(
    cli: Any, small: tuple[str, ...], contents: Any, calibrated: Any, pipeline: Path, tmp_path: Path
) -> None:
    reference = contents(calibrated(pipeline))
    run = ("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
    with largest_file(max(map(len, reference.values())) - 1):  # units fit, the artifact's largest file does not
        result = cli(*run)
    check_refusal(result, 1, "cannot be written (File too large): free some space or choose another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial").glob(".*"))
    assert cli(*run).code == 0
    assert contents(tmp_path) == {f"out/{name}": data for name, data in reference.items()}
    with largest_file(100):
        check_refusal(cli("export", tmp_path / "out", "--output", tmp_path / "t.csv"), 1, "free some space")
    with largest_file(60_000):  # which its configuration fits into
        component = ("--format", "diffusers", "--output", tmp_path / "component")
        check_refusal(cli("export", tmp_path / "out", *component), 1, "free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_truncated_model(cli: Any, saved: Any, tmp_path: Path) -> None:
    model = saved(lambda u: None)
    weights = model / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = cli("calibrate", "--model", model, "--output-dir", tmp_path / "out")
    check_refusal(result, 1, str(model), "truncated or of another model, so copy or download them again")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_whose_configuration_asks_for_far_more_than_its_weights(cli: Any, saved: Any, tmp_path: Path) -> None:
    config = saved(lambda u: None) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 10**7}))
    result = cli("calibrate", "--model", config.parent, "--output-dir", tmp_path / "out")
    check_refusal(result, 1, str(config.parent), "asks for a far larger model than its weights are")


def fill_memory(path: Path) -> None:
    torch.empty(1 << 60)


def take_it_for_damage(path: Path) -> None:
    try:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    except OSError as error:
        raise ModelError("The model cannot be loaded; its files are truncated.") from error


@pytest.mark.parametrize("read", [fill_memory, take_it_for_damage])
def test_too_little_memory_is_one_sentence(
    read: Callable[[Path], None], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq_tdq.cli.inspect.read_artifact", read)
    check_refusal(cli("inspect", tmp_path), 1, "too little memory")


def test_a_class_that_memory_lacks_for_is_not_taken_for_an_unknown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Failed to import") from ImportError("x.so: failed to map segment from shared object")

    monkeypatch.setitem(sys.modules, "diffusers", Full())
    with pytest.raises(MemoryError):
        diffusers_class("UNet2DModel")


@pytest.mark.parametrize("name", ["weights.safetensors", "interval_tables.safetensors", "ptq_tdq_config.json"])
def test_a_truncated_artifact(
    name: str, cli: Any, calibrated: Any, copy_of: Any, pipeline: Path, tmp_path: Path
) -> None:
    artifact = copy_of(calibrated(pipeline))
    (artifact / name).write_bytes((artifact / name).read_bytes()[:-100])
    for command in (
        ("inspect",),
        ("export", "--output", tmp_path / "t.csv"),
        ("sample", "--output", tmp_path / "x.png"),
    ):
        check_refusal(cli(command[0], artifact, *command[1:]), 1, name, "copy or make the artifact again")
    with pytest.raises(ArtifactCorruptError, match=name):
        load_quantized(artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_artifact_at_all(cli: Any, pipeline: Path, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "missing", "is not a directory"), (pipeline, "has no ptq_tdq_config.json")):
        check_refusal(cli("inspect", path), 1, said, "give the path of a ptq-tdq artifact")


def test_a_cache_that_cannot_be_used(
    cli: Any, small: tuple[str, ...], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("PTQ_TDQ_CACHE", str(tmp_path / "cache"))
    result = cli("calibrate", "--model", pipeline, "--output-dir", tmp_path / "out", *small)
    check_refusal(result, 1, str(tmp_path / "cache"), "a part of its path is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_a_traceback_only_on_request(flag: str, cli: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (("inspect", missing), ("export", missing, "--output", tmp_path / "t.csv"), ("sample", missing)):
        check_refusal(cli(*command), 1)
        told = cli(*command, flag)
        assert told.code == 1 and "Traceback (most recent call last)" in told.err
        assert told.err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("option", [["--calls", "x"], ["--height", "7"], ["--model", "y"], ["--device", "cpu"]])
def test_a_table_takes_nothing_that_says_how_a_model_is_called(option: list[str], cli: Any, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    option = [str(tmp_path / "x") if value == "x" else value for value in option]
    result = cli("export", tmp_path, "--format", "csv", "--output", tmp_path / "t.csv", *option)
    check_refusal(result, 2, f"--format csv calls no model; leave out {option[0]}")


def test_samples_are_a_png(cli: Any, tmp_path: Path) -> None:
    check_refusal(cli("sample", tmp_path, "--output", "s.jpg"), 2, "a name that ends in .png")
