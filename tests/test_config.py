"""Choices: what is read is what is saved, and everything else is one sentence at once."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from torch import nn

from ptq_tdq import calibrate
from ptq_tdq.artifacts import schema
from ptq_tdq.choices import Choices, described, groups, ungrouped
from ptq_tdq.config import PRESETS, Config, preset, read_config_file
from ptq_tdq.errors import ConfigError, PtqTdqError, UsageError
from ptq_tdq.finetuning import FinetuneConfig


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("scheme", "w4a8", "W4A8"),
        ("scheme", " W3A6\n", "W3A6"),
        ("method", "tdq ", "tdq"),
        ("method", "S_9999", "S_9999"),
        ("seed", " 7", 7),
        ("seed", 5.0, 5),
        ("damping", "1e-3", 1e-3),
        ("damping", 1, 1.0),
        ("round_again", "False", False),
        ("skip", "", ()),
        ("skip", "a.*, b", ("a.*", "b")),
        ("eight_bit_layers", "first,last,first", ("first", "last")),
        ("eight_bit_layers", ["last", "last"], ("last",)),
    ],
)
def test_a_choice_is_stored_in_its_one_form(name: str, value: Any, stored: Any) -> None:
    config = Config().changed({name: value})
    group = described(Config)[name].group
    found = getattr(getattr(config, group) if group else config, name)
    assert found == stored and type(found) is type(stored)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scheme", value) for value in (None, 48, "", "W٤A٨", "W4A8\0")),
        *(("method", value) for value in ("", "TDQ", "s_4", "S_04", "S_0", "S_٤", "S_10000", "S_", "tdq\0", 5)),
        *(
            ("seed", value)
            for value in (
                "",
                "\N{FULLWIDTH DIGIT ONE}",
                "٣",
                "1_0",
                "1e3",
                "0x1",
                -1,
                1 << 32,
                0.5,
                math.nan,
                math.inf,
                True,
            )
        ),
        *(("seed", value) for value in (None, [1], {}, "9" * 5000)),
        *(("damping", value) for value in ("nan", "inf", "1e400", "1e-400", 0, -1, 10**400, "", None, [])),
        *(("loss_power", value) for value in (0.5, "1e400")),
        *(("batch_size", value) for value in (0, 1 << 20, 10**30)),
        *(("samples_per_step", value) for value in (0, 10**12)),
        *(("round_again", value) for value in ("", "yes", 1, None, [])),
        *(("skip", value) for value in (None, 5, [5], [None], [["a"]], {"a": 1}, ["\udcff"])),
        *(("eight_bit_layers", value) for value in ("FIRST", "[first]", ["first", 1], "first;last")),
        *(("compute_dtype", value) for value in ("", "float16", None, 32)),
        *(("preset", value) for value in ("", "mine", None)),
        ("colour", "red"),
    ],
)
def test_anything_else_is_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Config().changed({name: value})
    assert len(str(caught.value).splitlines()) == 1 and name.split("_")[0] in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_calibration_steps_follow_fewer_inference_steps(name: str) -> None:
    own = preset(name).calibration.calibration_steps
    for steps in (1, 10, "10", own, 1000):
        expected = min(own, int(steps))
        assert preset(name, num_inference_steps=steps).calibration.calibration_steps == expected
        assert preset(name).changed({"num_inference_steps": steps}).calibration.calibration_steps == expected
    assert preset(name, num_inference_steps=10, calibration_steps=3).calibration.calibration_steps == 3
    with pytest.raises(ConfigError, match=r"calibration_steps must not exceed num_inference_steps \(10\)\. Got 11"):
        preset(name, num_inference_steps=10, calibration_steps=11)
    for nonsense in (0, -5, "x", math.nan):
        with pytest.raises(ConfigError, match="num_inference_steps must be"):
            preset(name, num_inference_steps=nonsense)


@pytest.mark.parametrize("name", PRESETS)
def test_the_choices_of_a_preset_survive_json(name: str) -> None:
    choices = json.loads(json.dumps(preset(name).to_dict()))
    assert preset(choices.pop("preset"), **choices) == preset(name)
    assert schema()["properties"]["choices"]["type"] == "object"
    assert preset(**ungrouped({"name": name, **choices})) == preset(name)


@pytest.mark.parametrize("name", ["qdiff", "paper"])
def test_a_preset_without_its_choices_is_refused(name: str) -> None:
    """A record with the choices of another preset under this name would be told of wrongly ever after."""
    for make in (lambda: Config(preset=name), lambda: Config().changed({"preset": name})):
        with pytest.raises(ConfigError, match=rf"call preset\('{name}'\)"):
            make()


@pytest.mark.parametrize("record", [Config, FinetuneConfig])
def test_every_choice_is_declared_in_full_under_a_name_of_its_own(record: type[Choices]) -> None:
    known = described(record)
    assert len(known) == sum(len(ungrouped({name: value})) for name, value in record().to_dict().items())
    assert not set(known) & set(groups(record)) and all(group.__doc__ for group in groups(record).values())
    for about in known.values():
        assert about.meaning.endswith("."), about.name
        assert about.checked(about.default) == about.default
        if get_origin(about.kind) is Literal and about.alternatives:
            assert tuple(about.alternatives) == get_args(about.kind), about.name
        assert (about.bounds is not None) == (about.kind in (int, float)), about.name


def test_what_both_records_share_is_declared_once() -> None:
    assert groups(FinetuneConfig)["intervals"] is groups(Config)["intervals"]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"roundin": "gptq"}, "There is no choice named 'roundin'; did you mean rounding, round_again"),
        ({"colour": "red"}, "There is no choice named 'colour'; `ptq-tdq choices` lists them"),
        ({"weight": {"rounding": "gptq"}}, "There is no choice named 'weight'; did you mean weights, "),
        ({"weights": 3}, "weights is a group of choices; give a table of them"),
        ({"weights": {"roundin": "gptq"}}, "There is no choice named 'roundin'; did you mean rounding"),
        ({"weights": {"skip": "a"}}, "skip is a choice of layers, not of weights."),
        ({"weights": {"seed": 1}}, "seed is a choice of no group, not of weights."),
        ({"weights": {"rounding": "gptq"}, "rounding": "gptq"}, "rounding is there twice, in its group and outside."),
        ({"weigths": {"rounding": "gptq"}}, "There is no choice named 'weigths'"),
        ({"weights.rounding": "gptq"}, "There is no choice named 'weights.rounding'"),
    ],
)
def test_a_choice_is_known_by_its_name_and_in_its_group(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        Config().changed(choices)
    with pytest.raises(ConfigError, match="weights is a group of choices"):
        Config(weights={"rounding": "gptq"})  # type: ignore[arg-type]
    grouped = {"seed": 1, "weights": {"rounding": "gptq"}, "learning": {"batch_size": 4}}
    assert Config().changed(grouped) == preset("default", seed=1, rounding="gptq", batch_size=4)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.json", ""),
        ("a.json", "[1]"),
        ("a.json", "[" * 100_000),
        ("a.json", '{"seed": 1, "seed": 2}'),
        ("a.toml", "x"),
        ("a.toml", "skip = " + "[" * 100_000),
    ],
)
def test_a_file_that_is_no_table_of_choices(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="The config file"):
        read_config_file(tmp_path / file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(tmp_path)


@pytest.mark.parametrize(("file", "text"), [("a.json", '{"seed": 1}'), ("a.toml", "seed = 1")])
def test_a_mark_of_a_file_s_bytes_does_no_harm(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("\ufeff" + text, encoding="utf-8")
    assert read_config_file(tmp_path / file) == {"seed": 1}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (("default",), "preset gives"),
        (([[0.0] * 1000],), "preset gives"),
        ((preset("default"), [[0.0] * 1000]), "record gives"),
    ],
)
def test_calibrate_says_what_it_takes(given: tuple[Any, ...], error: str) -> None:
    with pytest.raises(PtqTdqError, match=error) as found:
        calibrate(nn.Linear(1, 1), *given)
    assert len(str(found.value)) < 100  # names what was given and does not print it


def test_the_preset_is_default_where_none_is_named() -> None:
    assert preset() == preset("default")
