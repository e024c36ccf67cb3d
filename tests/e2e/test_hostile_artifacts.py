"""Artifacts by somebody who makes all hashes right: one sentence in both backends, and the process lives on.

All of them are loaded in one process of its own with little memory to spare, since what is at stake is its life.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hostile import run_python, small_artifact, with_config, with_layer, with_tensor

from ptq_tdq.artifacts import Artifact, write_artifact
from ptq_tdq.records import QuantizerRecord

Change = Callable[[Artifact], Artifact]
CONV, SHORTCUT = "mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut"
PRODUCT, NORM = "mid_block.attentions.0.products.0", "mid_block.resnets.0.norm1.weight"


def with_codes(artifact: Artifact, codes: torch.Tensor) -> Artifact:
    """Other codes of CONV, and scales and zero points for as many outputs."""
    artifact = with_tensor(artifact, "weight_codes", CONV, codes)
    artifact = with_tensor(artifact, "weight_scale", CONV, torch.ones(len(codes), 1))
    return with_tensor(artifact, "weight_zero_point", CONV, torch.zeros(len(codes), 1, dtype=torch.int32))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def more_outputs(artifact: Artifact) -> Artifact:
    return with_tensor(with_codes(artifact, zeros(32, 16, 3, 3)), "float_state", f"{CONV}.bias", torch.zeros(32))


def fewer_inputs(artifact: Artifact) -> Artifact:
    return with_layer(with_codes(artifact, zeros(16, 8, 3, 3)), CONV, splits=(0, 8))


def without_quantizer(name: str) -> Change:
    """The last quantizer of a layer and its table left out."""

    def change(artifact: Artifact) -> Artifact:
        *rest, last = next(layer for layer in artifact.layers if layer.name == name).inputs
        return with_layer(with_tensor(artifact, "tables", last.name, None), name, inputs=tuple(rest))

    return change


def one_more_quantizer(artifact: Artifact) -> Artifact:
    (own,) = next(layer for layer in artifact.layers if layer.name == CONV).inputs
    artifact = with_tensor(artifact, "tables", "other", artifact.tables[own.name])
    return with_layer(artifact, CONV, inputs=(own, replace(own, name="other")))


def a_network_of_no_method(artifact: Artifact) -> Artifact:
    quantizer = QuantizerRecord(CONV, 8, "dynamic-magic", "mse")
    table = replace(artifact.tables[CONV], scale=None, zero_point=torch.zeros(1, dtype=torch.int32))
    table = replace(table, generator={"net": torch.ones(1)})
    return with_layer(with_tensor(artifact, "tables", CONV, table), CONV, inputs=(quantizer,))


def as_linear(artifact: Artifact) -> Artifact:
    return with_layer(with_codes(artifact, zeros(16, 16)), CONV, kind="linear")


def float_tensor(name: str, tensor: torch.Tensor | None) -> Change:
    return lambda artifact: with_tensor(artifact, "float_state", name, tensor)


def layer(name: str, /, **changes: Any) -> Change:
    return lambda artifact: with_layer(artifact, name, **changes)


def config(**changes: Any) -> Change:
    return lambda artifact: with_config(artifact, **changes)


CASES: dict[str, tuple[Change, str]] = {
    "twice the outputs": (more_outputs, rf"'{CONV}' has codes of the shape \[32, 16, 3, 3\]"),
    "half the inputs": (fewer_inputs, rf"'{CONV}' has codes of the shape \[16, 8, 3, 3\]"),
    "a smaller kernel": (lambda a: with_codes(a, zeros(16, 16, 1, 1)), rf"'{CONV}' has codes of the shape"),
    "a larger kernel": (lambda a: with_codes(a, zeros(16, 16, 5, 5)), rf"'{CONV}' has codes of the shape"),
    "codes of a linear": (as_linear, rf"'{CONV}' is of class \w*Conv2d in the model, not a linear"),
    "a range too wide": (layer(CONV, splits=(0, 17)), rf"'{CONV}' has the channel ranges \[0, 17\].* has 16 channels"),
    "a range too narrow": (layer(CONV, splits=(0, 15)), rf"'{CONV}' has the channel ranges"),
    "one quantizer for two ranges": (without_quantizer(SHORTCUT), f"'{SHORTCUT}' has 1 quantizers for 2 channel"),
    "two quantizers for one range": (one_more_quantizer, f"'{CONV}' has 2 quantizers for 1 channel range"),
    "three quantizers of a product": (without_quantizer(PRODUCT), f"'{PRODUCT}' has 3 quantizers"),
    "channels of a product": (layer(PRODUCT, splits=(0, 16)), f"'{PRODUCT}' has weights"),
    "a product with no number": (layer(PRODUCT, name="mid_block"), "'mid_block' is not product 0"),
    "a second product first": (layer(PRODUCT, name=PRODUCT[:-1] + "1"), "is not product 0 of its module"),
    "a product of no module": (layer(PRODUCT, name="attention.products.0"), "no layer 'attention.products.0'"),
    "a network of no method": (a_network_of_no_method, f"'{CONV}'.*(cannot be made|asks a network)"),
    "bias of length 1": (float_tensor(f"{CONV}.bias", torch.zeros(1)), rf"'{CONV}\.bias' is torch.float32 \[1\]"),
    "bias of two axes": (float_tensor(f"{CONV}.bias", torch.zeros(16, 1)), rf"'{CONV}\.bias' is"),
    "integer bias": (float_tensor(f"{CONV}.bias", torch.zeros(16, dtype=torch.int64)), rf"'{CONV}\.bias' is torch.int"),
    "complex norm": (float_tensor(NORM, torch.zeros(16, dtype=torch.complex64)), f"'{NORM}' is torch.complex64"),
    "short norm": (float_tensor(NORM, torch.ones(4)), f"'{NORM}' is torch.float32 \\[4\\]"),
    "no norm": (float_tensor(NORM, None), f"'{NORM}' is missing in the artifact"),
    "a tensor of no module": (float_tensor("mid_block.extra", torch.ones(4)), "extra' is missing in the model"),
    "the weight of a quantized layer": (
        float_tensor(f"{CONV}.weight", torch.ones(1)),
        "weight' is missing in the m",
    ),
    "a wide padding": (config(downsample_padding=5000), "downsamplers.0.conv' would pad its input by 5000"),
    "no class": (config(_class_name=None), "of a None, which"),
    "a class that is text no more": (config(_class_name=["UNet2DModel"]), "which this version of diffusers does not"),
    "a pipeline": (config(_class_name="DDPMPipeline"), "'DDPMPipeline', which this version"),
    "a scheduler": (config(_class_name="DDPMScheduler"), "'DDPMScheduler', which this version"),
    "a module of diffusers": (config(_class_name="utils"), "'utils', which this version"),
    "a model without time": (config(_class_name="AutoencoderKL"), "'AutoencoderKL', which takes no time step"),
    "a denoiser of another kind": (config(_class_name="UNet1DModel"), "(model_config|missing|is a)"),
    "no channels": (config(block_out_channels=[]), "model_config is none that its model takes"),
    "negative channels": (config(block_out_channels=[-8, -16]), "model_config is none that"),
    "channels in words": (config(block_out_channels=["eight", "sixteen"]), "model_config is none that"),
    "10^9 channels": (config(block_out_channels=[10**9, 10**9]), "holds a number beyond"),
    "10^7 channels": (config(block_out_channels=[10**7, 10**7]), "far larger model than its tensors"),
    "10^30 layers": (config(layers_per_block=10**30), "holds a number beyond"),
    "10^7 layers": (config(layers_per_block=10**7), "far larger model than its tensors"),
    "10^7 classes": (config(num_class_embeds=10**7), "far larger model than its tensors"),
    "another number of classes": (config(num_class_embeds=4), r"class_embedding\.weight' is torch.float32 \[3, 32\]"),
    "other blocks": (config(down_block_types=["DownBlock2D", "DownBlock2D"]), "no layer 'down_blocks.1.attentions"),
    "groups of half a channel": (config(norm_num_groups=0.5), "norm_num_groups = .0.5. is no int"),
    "a list of heads": (config(attention_head_dim=[8, 8]), "attention_head_dim = .* is no int"),
    "blocks of no kind": (config(down_block_types=["os.system", "exec"]), "model_config is none that"),
}
SCRIPT = """
import json, resource, sys
from pathlib import Path
import diffusers, torch
from ptq_tdq import load_quantized
diffusers.logging.set_verbosity_error()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for backend in ("simulated", "integer"):
        try:
            model = load_quantized(folder, backend=backend)
            model(torch.ones(2, 3, 8, 8), torch.tensor([1, 2]), class_labels=torch.tensor([0, 1]))
            said = "runs"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([folder.name, backend, said]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """What loading and running each case says, by its number and backend; "" where the process ended before."""
    folder = tmp_path_factory.mktemp("hostile")
    for index, (change, _) in enumerate([*CASES.values(), (lambda artifact: artifact, "")]):
        write_artifact(folder / f"{index:02}", change(small_artifact()))
    result = run_python(SCRIPT, folder)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {(name, backend): said for name, backend, said in found}


@pytest.mark.parametrize("backend", ["simulated", "integer"])
@pytest.mark.parametrize("case", CASES)
def test_an_artifact_that_does_not_fit_its_model_is_refused(
    case: str, backend: str, verdicts: dict[tuple[str, str], str]
) -> None:
    said = verdicts.get((f"{list(CASES).index(case):02}", backend), "the process ended")
    kind = "RuntimeUnsupportedError" if said.endswith('use backend="simulated".') else "ArtifactMismatchError"
    assert re.match(f"{kind}: .*{CASES[case][1]}", said), said


@pytest.mark.parametrize("backend", ["simulated", "integer"])
def test_the_same_artifact_without_a_change_runs(backend: str, verdicts: dict[tuple[str, str], str]) -> None:
    assert verdicts[f"{len(CASES):02}", backend] == "runs"
