"""Where each choice of a run comes from: preset, config file, flag, --set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptq_tdq.choices import described
from ptq_tdq.config import PRESETS, Config, preset
from ptq_tdq.finetuning import FinetuneConfig


def choices(cli: Any, *flags: object) -> dict[str, Any]:
    result = cli("calibrate", "--show-config", *flags)
    assert (result.code, result.err) == (0, "")
    found: dict[str, Any] = json.loads(result.out)
    assert not Path("unused").exists()
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_what_it_says(name: str, cli: Any) -> None:
    assert choices(cli, "--preset", name) == preset(name).to_dict()
    assert choices(cli) == preset("default").to_dict()
    assert choices(cli, "--preset", name)["weights"]["weight_symmetric"] == ("8-bit" if name == "default" else "never")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("choices.toml", 'preset = "qdiff"\nscheme = "W3A5"\nseed = 7\n[layers]\nskip = ["conv_*", "mid_block.*"]\n'),
        ("choices.json", '{"preset": "qdiff", "scheme": "W3A5", "seed": 7, "skip": ["conv_*", "mid_block.*"]}'),
    ],
)
def test_flags_go_before_the_file_and_set_before_flags(name: str, text: str, cli: Any, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert (
        choices(cli, "--config", file)
        == preset("qdiff", scheme="W3A5", seed=7, skip=("conv_*", "mid_block.*")).to_dict()
    )
    seeds = ("--seed", "1", "--set", "seed=3", "--set", "seed=2")
    found = choices(cli, "--config", file, "--scheme", "W2A8", *seeds, "--skip", "conv_in")
    assert (found["scheme"], found["seed"], found["layers"]["skip"]) == ("W2A8", 2, ["conv_in"])
    assert found["calibration"] == preset("qdiff").calibration.to_dict()
    assert choices(cli, "--config", file, "--preset", "paper")["preset"] == "paper"


def test_what_show_config_prints_is_a_config_file(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    first = choices(cli, "--preset", "paper", "--set", "time-encoding=fourier", "--set", "attention=true")
    file.write_text(json.dumps(first))
    assert choices(cli, "--config", file) == first
    assert (first["intervals"]["time_encoding"], first["layers"]["attention"]) == ("fourier", True)


def test_choices_lists_what_may_be_set(cli: Any) -> None:
    every, tuning = cli("choices", "--json"), cli("choices", "--finetune", "--json")
    assert {about["name"] for about in json.loads(every.out)} == set(described(Config))
    assert {about["name"] for about in json.loads(tuning.out)} == set(described(FinetuneConfig))
    (rounding,) = json.loads(cli("choices", "rounding", "--json").out)
    assert (rounding["group"], rounding["default"]) == ("weights", "learned") and len(rounding["alternatives"]) == 4
    text = " ".join(cli("choices", "weight-lr", "calibration").out.split())
    assert "[default: 0.003; qdiff: 0.001; paper: 0.001]" in text and "thinning" in text and "rotate" not in text
    assert "from 2 to 8" in " ".join(cli("choices", "softmax-bits").out.split())
    assert " relu, silu, tanh. " in " ".join(cli("choices", "thin-activation").out.split())  # as --set takes them
    wrong = cli("choices", "roundin")
    assert (wrong.code, wrong.out) == (2, "") and "did you mean rounding, round_again" in wrong.err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("colour=red", "There is no choice named 'colour'"),
        ("weight_iterations=many", "weight_iterations must be of type int. Got 'many' instead."),
        ("weight_iterations=2.5", "weight_iterations must be of type int. Got '2.5' instead."),
        ("weight_iterations=-1", "weight_iterations must be from 0 to 2147483647. Got -1 instead."),
        ("weight_lr=0", "weight_lr must be above 0 and finite. Got 0.0 instead."),
        ("weight_lr=nan", "weight_lr must be above 0 and finite. Got nan instead."),
        ("attention=maybe", "attention must be of type bool. Got 'maybe' instead."),
        ("rounding=up", "rounding must be one of learned, gptq, adaround, nearest. Got 'up' instead."),
        ("weight_symmetric=true", "weight_symmetric must be one of never, 8-bit, always. Got 'true' instead."),
        ("softmax_bits=99", "softmax_bits must be from 2 to 8. Got 99 instead."),
        ("seed=-1", "seed must be from 0 to 4294967295. Got -1 instead."),
        ("method=fixed", "The method 'fixed' is that of the layers that fixed_layers names; choose another."),
        ("seed", "--set takes KEY=VALUE. Got 'seed' instead."),
        (f"rounding={'x' * 5000}", "rounding must be one of learned, gptq, adaround, nearest. Got 'xxx"),
        ("eight_bit_layers=first,middle", "eight_bit_layers must be one of first, last"),
        ("preset=paper", "The preset is named by --preset."),
    ],
)
def test_a_wrong_choice_is_a_usage_error(setting: str, said: str, cli: Any, tmp_path: Path) -> None:
    result = cli("calibrate", "--output-dir", tmp_path / "out", "--set", setting)
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1
    assert result.err.startswith(f"Error: {said}") and len(result.err) < 1100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "scheme = 4", "scheme must be of type str. Got 4 instead."),
        ("a.toml", "method = 3", "method must be of type str. Got 3 instead."),
        ("a.toml", "skip = 3", "skip must be a list. Got 3 instead."),
        ("a.toml", "seed = true", "seed must be of type int. Got True instead."),
        ("a.toml", "seed 3", "cannot be read ("),
        ("a.json", "[1]", "must hold a table of choices."),
        ("a.json", '{"shade": 1}', "There is no choice named 'shade'; `ptq-tdq choices` lists them"),
        ("a.json", '{"preset": "best"}', "The preset must be one of default, qdiff, paper. Got 'best' instead."),
        ("a.json", '{"preset": ["paper"]}', "The preset must be one of default, qdiff, paper."),
        ("a.json", "\xff", "cannot be read ("),
    ],
)
def test_a_wrong_config_file_is_a_usage_error(name: str, text: str, said: str, cli: Any, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode("latin-1"))
    result = cli("calibrate", "--output-dir", tmp_path / "out", "--config", file)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and said in result.err
    missing = cli("calibrate", "--output-dir", tmp_path / "out", "--config", tmp_path / "missing.toml")
    assert missing.code == 2 and "cannot be read" in missing.err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--threads", "9" * 20), 2, "is not in the range 1<=x<=1024"),
        (("--evaluation-samples", "9" * 20), 2, "is not in the range"),
        (("--scheduler", ""), 2, "diffusers has no scheduler named ''"),
        (("--model", ""), 1, "There is no folder ''"),
        (("--model", "a\0b"), 1, "There is no folder"),
        (("--model", "x" * 5000), 1, "There is no folder"),
        (("--output-dir", "a\0b"), 2, "cannot be a path here"),
        (("--output-dir", "x" * 300), 2, "cannot be a path here (File name too long)"),
        (("--output-dir", ""), 2, "the path is empty"),
        (("--config", ""), 2, "the path is empty"),
        (("--config", "/dev/zero"), 2, "it is not a regular file"),
        (("--prompts", "/dev/zero"), 2, "it is not a regular file"),
        (("--device", ""), 2, "The device '' cannot be used here"),
    ],
)
def test_a_flag_s_odd_value_is_one_sentence(
    flags: tuple[str, ...], code: int, said: str, cli: Any, tmp_path: Path
) -> None:
    result = cli("calibrate", "--output-dir", tmp_path / "out", *flags)
    assert result.code == code and result.out == "" and len(result.err.splitlines()) == 1 and said in result.err
    assert not list(tmp_path.iterdir())


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = cli("calibrate", "--output-dir=~/out", "--config=~/missing.toml")
    assert result.code == 2 and f"{tmp_path}/missing.toml cannot be read" in result.err
