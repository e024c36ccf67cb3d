"""``report``: what it writes, what it says when something is missing, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pipelines import PIPELINES

QUICK = (
    *("--samples-per-step", "2", "--calibration-steps", "2", "--num-inference-steps", "2"),
    *("--set", "rounding=nearest", "--set", "activation_iterations=0", "--method", "step-table"),
    *("--set", "activation_range=minmax", "--set", "weight_range=minmax"),
    *("--scheme", "W4A8", "--evaluation-samples", "0", "--threads", "1"),
)
FLAGS = ("--samples", 3, "--num-inference-steps", 2, "--threads", 1)
CHROMIUM = shutil.which("chromium")


def data_of(page: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert match
    found: dict[str, Any] = json.loads(match[1])
    return found


@pytest.fixture(scope="session")
def report(cli: Any, calibrated: Any, conditional: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one artifact of a class-conditional model; tests must not change it."""
    folder: Path = tmp_path_factory.mktemp("reports") / "report"
    result = cli("report", calibrated(conditional), "--model", conditional, "--output-dir", folder, *FLAGS, "--json")
    facts = json.loads(result.out)
    assert (result.code, result.err) == (0, "") and facts["measured"] and facts["page"] == str(folder / "report.html")
    return folder


def test_it_writes_one_page_and_its_figures(report: Path) -> None:
    assert sorted(path.name for path in report.iterdir()) == ["figures", "report.html"]
    names = {path.name for path in (report / "figures").iterdir()}
    shown = ("intervals", "distribution", "groups", "steps", "error", "losses")
    assert names == {f"{name}.{kind}" for name in shown for kind in ("png", "svg")} | {"samples.png"}
    for path in (report / "figures").iterdir():
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            with Image.open(path) as image:
                image.load()
                assert len(image.getcolors(1 << 24) or []) > 10


def test_the_page_holds_what_calibration_measured_and_what_was_measured_now(
    report: Path, calibrated: Any, conditional: Path
) -> None:
    data, metrics = data_of(report / "report.html"), json.loads((calibrated(conditional) / "metrics.json").read_text())
    (artifact,) = data["artifacts"]
    assert artifact["stored"]["learned"]["latent_sqnr_db"] == metrics["learned"]["latent_sqnr_db"]
    assert artifact["reconstruction"] == metrics["reconstruction"]
    units = list(dict.fromkeys(layer["unit"] for layer in artifact["layers"]))
    for phase in ("weights", "activations"):
        assert [unit["unit"] for unit in metrics["reconstruction"][phase]] == units
    assert data["samples"] == 3 and data["groups"] == ["class 0", "class 1", "class 2"] and len(data["steps"]) == 2
    assert data["end"] == "samples" and artifact["coverage"] == metrics["coverage"]
    assert artifact["latent_sqnr_db"] > 0 and artifact["image_psnr_db"] > 0
    assert str(conditional) not in (report / "report.html").read_text()


def test_artifacts_that_differ_in_the_seed_are_drawn_together(
    cli: Any, small: tuple[str, ...], calibrated: Any, conditional: Path, tmp_path: Path
) -> None:
    first, second = calibrated(conditional), tmp_path / "second"
    made = cli("calibrate", "--model", conditional, "--output-dir", second, *small, "--seed", 1)
    assert made.code == 0, made.err
    result = cli("report", first, second, "--model", conditional, "--output-dir", tmp_path / "report", *FLAGS)
    assert result.code == 0, result.err
    page = tmp_path / "report" / "report.html"
    assert [artifact["choices"]["seed"] for artifact in data_of(page)["artifacts"]] == [0, 1]
    assert "Between seeds, an interval deviates by" in page.read_text()
    assert {path.name for path in (tmp_path / "report" / "figures").iterdir()} >= {"seeds.png", "seeds.svg"}
    if CHROMIUM:
        assert browse(page).count("<option") >= 2


def test_a_pipeline_is_sampled_as_it_was_for_calibration(cli: Any, tmp_path: Path) -> None:
    """Prompts, guidance and size come from the artifact; a prompt stands for a class."""
    model, artifact, prompts = tmp_path / "model", tmp_path / "artifact", tmp_path / "prompts.txt"
    next(small for small in PIPELINES if small.name == "StableDiffusionPipeline").save(model)
    prompts.write_text("A red fox asleep in fresh snow, at the first light of dawn\nA kite\n")
    sampled = ("--prompts", prompts, "--guidance-scale", 4, "--height", 16, "--width", 16)
    made = cli("calibrate", "--model", model, "--output-dir", artifact, *sampled, *QUICK)
    assert made.code == 0, made.err
    result = cli("report", artifact, "--output-dir", tmp_path / "report", *FLAGS)
    assert result.code == 0, result.err
    data = data_of(tmp_path / "report" / "report.html")
    (shown,) = data["artifacts"]
    assert data["condition"] == "prompt" and data["end"] == "latents" and shown["image_psnr_db"] > 0
    assert data["groups"] == ["A red fox asleep in fresh snow, at the\u2026", "A kite"]
    assert data["model"]["component"] == "unet" and data["model"]["class"] == "UNet2DConditionModel"
    assert {layer["kind"] for layer in shown["layers"]} == {"conv2d", "linear", "product"}
    (first,) = (layer for layer in shown["layers"] if "first" in layer["roles"])
    assert first["name"] == "conv_in"
    with Image.open(tmp_path / "report" / "figures" / "samples.png") as image:
        assert image.width > 2 * 16

    told = cli("inspect", artifact)
    assert told.code == 0 and "t = 'timestep', from 0 to 1000" in told.out
    assert "100% of the multiply-accumulates with weights" in told.out
    facts = json.loads(cli("inspect", artifact, "--json").out)
    assert facts["coverage"] == shown["coverage"] == 1 and facts["notices"] == shown["notices"]
    assert facts["time_axis"]["scale"] == 1 and facts["base_model"]["component"] == "unet"


def test_without_the_base_model_it_writes_what_the_artifact_holds(
    cli: Any, calibrated: Any, pipeline: Path, copy_of: Any, tmp_path: Path, small: tuple[str, ...]
) -> None:
    model = copy_of(pipeline)
    artifact = tmp_path / "there"
    quick = ("--set", "rounding=nearest", "--set", "activation_iterations=0", "--evaluation-samples", 0)
    assert cli("calibrate", "--model", model, "--output-dir", artifact, *small, *quick).code == 0
    shutil.rmtree(model)
    result = cli("report", artifact, "--output-dir", tmp_path / "report", *FLAGS)
    assert result.code == 0 and "pass --model" in result.err and str(tmp_path) not in result.err
    assert result.out.startswith(f"Wrote {tmp_path / 'report' / 'report.html'}")
    assert data_of(tmp_path / "report" / "report.html")["artifacts"][0]["errors"] is None
    page = (tmp_path / "report" / "report.html").read_text()
    assert "cannot be loaded from here" in page and str(tmp_path) not in page

    named = cli("report", artifact, "--model", model, "--output-dir", tmp_path / "other", *FLAGS)
    assert named.code == 1 and named.err.startswith("Error: There is no folder") and not (tmp_path / "other").exists()


def test_a_folder_of_any_name_is_reported(cli: Any, calibrated: Any, conditional: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(calibrated(conditional), tmp_path / os.fsdecode(b"a\xff\x1b"))
    result = cli("report", artifact, "--model", conditional, "--output-dir", tmp_path / "report", *FLAGS)
    assert result.code == 0, result.err
    assert data_of(tmp_path / "report" / "report.html")["artifacts"][0]["name"] == r"a\udcff\x1b"


def test_bad_requests_write_nothing(
    cli: Any, calibrated: Any, pipeline: Path, conditional: Path, tmp_path: Path
) -> None:
    out, mine = tmp_path / "report", calibrated(pipeline)
    for expected, code, args in (
        ("Missing argument 'ARTIFACT...'", 2, ()),
        ("is not a directory", 1, (tmp_path / "nowhere",)),
        ("were made from different models", 1, (mine, calibrated(conditional))),
        ("DDIMScheduler", 2, (mine, "--scheduler", "Nothing")),
    ):
        result = cli("report", *args, "--output-dir", out)
        assert result.code == code and expected in result.err and result.err.count("\n") == 1
        assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        result = cli("report", mine, "--output-dir", out, *FLAGS, *flags)
        assert result.code == 1 and (out / "thesis.tex").read_text() == "years of work"


def browse(page: Path, width: int = 1280, **flags: str) -> str:
    """The page as Chromium has it after its scripts; raises for an error of a script."""
    assert CHROMIUM
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=4000",
         *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


PROBE = """<script>
const seen = {}, input = (id, value, event) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event(event));
};
const names = () => [...document.querySelectorAll("tr.row")].map((row) => row.dataset.layer);
seen.wide = document.documentElement.scrollWidth > innerWidth;
seen.dark = getComputedStyle(document.body).backgroundColor;
seen.first = names();
document.getElementById("theme").click(); document.getElementById("theme").click();
seen.switched = getComputedStyle(document.body).backgroundColor;
input("sort", "order", "change"); seen.order = names();
document.querySelector("tr.row[data-layer=conv_out]").click();
seen.charts = [...document.querySelectorAll("tr.detail .chart svg")].map((svg) => svg.clientWidth);
const name = () => document.querySelector("tr.row[data-layer=conv_in] .name");
name().focus(); name().click();
seen.focus = [document.activeElement === name(), name().getAttribute("aria-expanded")];
name().click();
const curve = document.querySelector("#steps-chart svg");
for (const key of ["Home", "ArrowRight", "End"]) curve.dispatchEvent(new KeyboardEvent("keydown", { key }));
seen.said = curve.getAttribute("aria-valuetext");
document.querySelector("[data-mode=accumulated]").click();
const canvas = document.getElementById("map-canvas");
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const pixel = (_, i) => pixels.slice(4 * i, 4 * i + 3).join();
seen.colors = new Set(Array.from({ length: pixels.length / 4 }, pixel)).size;
input("search", "UP_blocks conv1", "input"); seen.found = names();
input("search", "no such layer", "input"); seen.none = document.getElementById("count").textContent;
document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium to open the page")
def test_the_page_works_in_a_browser_on_a_desk_and_on_a_phone(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text((report / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
    data = data_of(page)["artifacts"][0]
    layers = [layer["name"] for layer in data["layers"]]
    seen = []
    for width, scheme in ((1280, "0"), (500, "1")):
        dom = browse(page, width, blink_settings=f"preferredColorScheme={scheme}")
        match = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.S)
        assert match
        seen.append(json.loads(match[1]))
    for facts in seen:
        assert facts["wide"] is False  # nothing to scroll sideways
        assert facts["order"] == layers and sorted(facts["first"]) == sorted(layers)
        mean = {x["name"]: sum(row) / len(row) for x, row in zip(data["layers"], data["errors"]["own"], strict=True)}
        assert facts["first"] == sorted(layers, key=lambda name: mean[name])
        assert facts["found"] == [name for name in layers if "up_blocks" in name and "conv1" in name]
        assert facts["none"] == "No layer matches"
        assert facts["focus"] == [True, "true"]  # the row is drawn anew under it
        assert re.match(r"t = 1000, .*learned intervals -?[\d.]+ dB", facts["said"])
        assert len(facts["charts"]) == 4 and min(facts["charts"]) >= 220 and facts["colors"] > 5
    assert seen[0]["dark"] != seen[1]["dark"]  # the system's colours, then the reader's own
    assert seen[0]["dark"] == seen[1]["switched"]
