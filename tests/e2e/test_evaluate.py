"""``ptq-tdq evaluate``: what it prints, writes and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ptq_tdq import calibrate, preset
from ptq_tdq.calib_data import collect, load_model

FLAGS = ("--samples", "8", "--num-inference-steps", "2", "--threads", "1")


def test_a_model_without_classifier_gets_the_distances_to_full_precision_and_is_told_so(
    cli: Any, calibrated: Any, pipeline: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    result = cli("evaluate", calibrated(pipeline), *FLAGS, "--output-dir", out)
    assert (result.code, result.err) == (0, "")
    assert "final latents, SQNR (dB) ↑" in result.out and "no classifier" in result.out and "C10" not in result.out
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.md", "samples.png"]
    document = json.loads((out / "evaluation.json").read_text())
    assert document["full_precision"] == {} and document["quantized"]["latent_sqnr_db"] > 0
    assert set(document["quantized"]["noise_sqnr_db"]) == {"500", "0"}
    assert f"| {document['quantized']['latent_sqnr_db']:.2f} |" in (out / "evaluation.md").read_text()
    with Image.open(out / "samples.png") as picture:
        picture.load()
    again = cli("evaluate", calibrated(pipeline), *FLAGS, "--output-dir", out)
    assert again.code == 1 and again.err.count("\n") == 1 and "is not empty" in again.err
    replaced = cli("evaluate", calibrated(pipeline), *FLAGS, "--output-dir", out, "--overwrite", "--json")
    assert json.loads(replaced.out) == document
    (out / "thesis.tex").write_text("years of work")
    refused = cli("evaluate", calibrated(pipeline), *FLAGS, "--output-dir", out, "--overwrite")
    assert refused.code == 1 and "holds 'thesis.tex', which is no part of an evaluation" in refused.err


def test_the_seed_decides(cli: Any, calibrated: Any, conditional: Path) -> None:
    first, again, other = (
        json.loads(cli("evaluate", calibrated(conditional), *FLAGS, "--seed", seed, "--json").out)["quantized"]
        for seed in (0, 0, 1)
    )
    assert first == again and first["latent_sqnr_db"] != other["latent_sqnr_db"]


def test_the_backend_and_the_correction_are_named_beside_what_they_change(
    cli: Any, calibrated: Any, pipeline: Path
) -> None:
    found = {
        flags: json.loads(cli("evaluate", calibrated(pipeline), *FLAGS, *flags, "--json").out)
        for flags in ((), ("--correction", "ptqd"), ("--backend", "integer"))
    }
    named = [(d["backend"], d["correction"]) for d in found.values()]
    assert named == [("simulated", "none"), ("simulated", "ptqd"), ("integer", "none")]
    plain, mended, integer = (d["quantized"]["mean_noise_sqnr_db"] for d in found.values())
    assert len({plain, mended, integer}) == 3 and abs(plain - integer) < 1


def test_what_is_sampled_is_as_in_calibration_unless_it_is_named(
    cli: Any, conditional: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    made = cli("calibrate", "--model", conditional, "--classes", "2", "--output-dir", tmp_path / "out", *small)
    assert made.code == 0, made.err
    first, same, other = (
        json.loads(cli("evaluate", tmp_path / "out", *FLAGS, *flags, "--json").out)
        for flags in ((), ("--classes", "2"), ("--classes", "0,1"))
    )
    assert [document["sampling"]["classes"] for document in (first, same, other)] == [[2], [2], [0, 1]]
    assert first["quantized"] == same["quantized"] != other["quantized"]
    found = cli("evaluate", tmp_path / "out", *FLAGS, "--classes", "0,1", "--correction", "ptqd")
    assert found.code == 2 and "cannot be sampled again here (it differs in classes)" in found.err


def test_a_correction_is_estimated_on_the_set_of_calibration_or_not_at_all(
    cli: Any, pipeline: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    given = ("--scheduler", "EulerDiscreteScheduler", "--output-dir", tmp_path / "other")
    assert cli("calibrate", "--model", pipeline, *given, *small).code == 0
    assert cli("evaluate", tmp_path / "other", *FLAGS, "--correction", "ptqd").code == 0
    model, config = load_model(str(pipeline)), preset("default", scheme="W8A8", activation_iterations=0, seed=0)
    calls = replace(collect(model, samples_per_step=2, calibration_steps=2, num_inference_steps=2), recipe={})
    calibrate(model, config, calls).save_pretrained(tmp_path / "recorded")
    found = cli("evaluate", tmp_path / "recorded", *FLAGS, "--correction", "ptqd")
    assert found.code == 2 and "cannot be sampled again here (its calls were recorded)" in found.err


def test_bad_requests_are_one_line(
    cli: Any, calibrated: Any, pipeline: Path, conditional: Path, tmp_path: Path
) -> None:
    artifact = calibrated(pipeline)
    for code, words, flags in (
        (2, "--samples", (artifact, "--samples", "2")),
        (2, "guidance_scale", (artifact, "--guidance-scale", "2")),
        (1, "absent", (tmp_path / "absent",)),
        (1, "load the artifact with the model", (artifact, "--model", conditional)),
        (1, "torch-fidelity", (artifact, "--data", tmp_path)),
        (1, "is a file, not a folder", (artifact, "--output-dir", __file__)),
    ):
        result = cli("evaluate", *flags)
        assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result.err
        assert words in result.err
