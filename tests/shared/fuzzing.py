"""Files by somebody who means ill: changed at random, under right hashes, read in a process that may crash.

As a script: ``fuzzing.py FOLDER FIRST CASES`` tries cases of the subjects that :func:`make_subjects` puts into FOLDER
and prints a line for each that ends in anything but a result or a typed error, and one with the counts at the end.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from recorded import calls_of, images
from safetensors.torch import load, save

from ptq_tdq import Calls, FinetuneConfig, calibrate, finetune, load_quantized, preset
from ptq_tdq.artifacts import encode_artifact, read_artifact, summarize
from ptq_tdq.artifacts.document import CONFIG_FILE, sign
from ptq_tdq.artifacts.store import METRICS_FILE, TABLES_FILE, WEIGHTS_FILE
from ptq_tdq.calls import file as calls_file
from ptq_tdq.cli.inspect import _facts as lines
from ptq_tdq.cli.original import _as_in_calibration as as_in_calibration
from ptq_tdq.cli.sample import _title as title
from ptq_tdq.errors import ConfigError, PtqTdqError, printable
from ptq_tdq.finetuning import IterationReport
from ptq_tdq.plan import make_plan
from ptq_tdq.report.data import report_data
from ptq_tdq.report.page import render_page
from ptq_tdq.report.survey import Subject, Survey

SECONDS, MEMORY = 5, 1 << 30  # of a case: processor time, and bytes beyond what the process had at first
STEPS = 10
CONFIG = preset(
    "default",
    method="static",
    eight_bit_layers=(),
    rounding="nearest",
    round_again=False,
    activation_iterations=0,
    weight_range="minmax",
    activation_range="minmax",
    compute_dtype="float32",
)
LEARNING = FinetuneConfig(iterations=2, batch_size=2, warmup=0, checkpoint_every=1, compute_dtype="float32")
PLAIN = (None, True, False, -1, 0, 1, 2, 3, 7, 255, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, "", "x")
NESTED: tuple[Any, ...] = ([], {}, [[]], [None], [0] * 1000, {"": None}, "x" * 10_000, "../x", "os.system", "a\0b")
ODD: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    "UNet1DModel",
    "AutoencoderKL",
    "DDPMPipeline",
    [[[0]]],
    {"value": 1},
    {"dict": {}},
)
VALUES = (0.0, 1.0, -1.0, 15.0, 16.0, 255.0, 2.0**31, -(2.0**31), 1e38, -1e38, 1e-45, float("nan"), float("inf"))
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
Files = dict[str, bytes]


def model() -> UNet2DModel:
    """One block of four channels on each side, attention, classes."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=4,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        attention_head_dim=2,
        num_class_embeds=3,
        add_attention=False,
    ).eval().requires_grad_(False)  # fmt: skip


def calls_to_make() -> Calls:
    t, labels = torch.tensor([0.0, 3.0, 6.0, 9.0]), torch.arange(4) % 3
    return calls_of(model(), images(4, size=4), t, class_labels=labels, num_train_timesteps=STEPS)


def make_subjects(folder: Path) -> None:
    """Write an artifact, a calibration set and the folders of two unfinished runs that nobody has changed yet."""
    calls = calls_to_make()
    calibrate(model(), CONFIG, calls, run_directory=folder / "run").save_pretrained(folder / "artifact")
    (folder / "calls").mkdir()
    calls.save(folder / "calls" / "calls.safetensors")
    with suppress(_Stopped):
        finetune(model(), folder / "artifact", LEARNING, calls, run_directory=folder / "tuning", on_iteration=_stop)


class _Stopped(Exception):
    """In the middle of fine-tuning."""


def _stop(report: IterationReport) -> None:
    if report.iteration == 2:
        raise _Stopped


# What is changed.


def changed_json(value: Any, rng: random.Random) -> Any:
    """The same document with one entry changed, removed, moved or doubled, anywhere in it."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        kind = rng.choice(("change", "change", "change", "change", "remove", "swap", "double"))
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        if kind == "change":
            changed[key] = changed_json(value[key], rng)
        elif kind == "remove":
            del changed[key]
        elif kind == "swap":
            other = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
            changed[key], changed[other] = changed[other], changed[key]
        elif isinstance(changed, list):
            changed.insert(key, value[key])
        else:
            changed[f"{key}{rng.choice(('', '.', '_', '.weight', '2'))}"] = value[key]
        return changed
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 10**6))
    return rng.choice(rng.choice((PLAIN, NESTED, ODD)))


def changed_tensor(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same tensor with other values, another shape or another dtype."""
    kind = rng.choice(("value", "value", "value", "all", "dtype", "shape", "shorter", "longer", "empty", "scalar"))
    if kind in ("value", "all"):
        odd = torch.tensor(rng.choice(VALUES)).to(x.dtype)
        x = x.clone()
        x.view(-1)[slice(None) if kind == "all" or not x.numel() else rng.randrange(x.numel())] = odd
        return x
    if kind == "dtype":
        return x.to(rng.choice(DTYPES))
    if kind == "shape":
        return rng.choice((x.reshape(-1), x[None], x[..., None], x.transpose(0, -1) if x.ndim else x)).contiguous()
    if kind == "scalar" or not x.ndim:
        return x.reshape(-1)[:1].sum()
    axis = rng.randrange(x.ndim)
    sizes = {"shorter": x.shape[axis] // 2, "longer": 2 * x.shape[axis], "empty": 0}
    index = torch.arange(sizes[kind]) % max(1, x.shape[axis])
    return x.index_select(axis, index) if x.shape[axis] else x


def changed_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """The same tensors with one changed, removed, renamed or doubled."""
    name, tensors = rng.choice(sorted(tensors)), dict(tensors)
    kind = rng.choice(("change", "change", "change", "change", "remove", "rename", "double", "swap"))
    if kind == "change":
        tensors[name] = changed_tensor(tensors[name], rng)
    elif kind == "swap":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        value = tensors[name] if kind == "double" else tensors.pop(name)
        if kind != "remove":
            tensors[name + rng.choice(("2", ".", ".weight", "x" * 300))] = value.clone()
    return tensors


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """The same bytes with some flipped, cut off, doubled or in front of a header of another length."""
    kind, at, new = rng.choice(("flip", "flip", "cut", "double", "header")), rng.randrange(len(data)), bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 8))):
            new[min(rng.randrange(len(data)), rng.choice((8, 200, len(data) - 1)))] = rng.randrange(256)
    elif kind == "cut":
        del new[at:]
    elif kind == "double":
        new[at:at] = data[at : at + rng.randrange(1, 100)]
    else:
        new[:8] = rng.choice((0, 1, len(data), 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(new)


# What is changed in each subject, how it is signed, and what is done with it.


def artifact(files: Files, rng: random.Random) -> Files:
    name, files = rng.choice((CONFIG_FILE, CONFIG_FILE, TABLES_FILE, WEIGHTS_FILE, METRICS_FILE)), dict(files)
    document = json.loads(files[CONFIG_FILE])
    if name == CONFIG_FILE:
        part = rng.choice(("", "", "model_config", "layers"))
        document = {**document, part: changed_json(document[part], rng)} if part else changed_json(document, rng)
    elif name == METRICS_FILE:
        files[name] = json.dumps(changed_json(json.loads(files[name]), rng)).encode()
    elif rng.random() < 0.8:
        files[name] = save({k: v.contiguous() for k, v in changed_tensors(load(files[name]), rng).items()})
    else:
        files[name] = changed_bytes(files[name], rng)
    if isinstance(document, dict):
        if isinstance(hashes := document.get("files"), dict) and name != CONFIG_FILE:
            hashes[name] = sha256(files[name]).hexdigest()
        document = signed(document)
    files[CONFIG_FILE] = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"
    return files if rng.random() < 0.95 else {**files, CONFIG_FILE: changed_bytes(files[CONFIG_FILE], rng)}


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """The document under its hash, where JSON has its numbers; otherwise it is refused before."""
    with suppress(ConfigError):
        return sign(document)
    return document


def use_artifact(folder: Path, rng: random.Random) -> None:
    loaded = load_quantized(folder, backend=rng.choice(("simulated", "integer")))
    with torch.no_grad():
        loaded(images(2, size=4), torch.tensor([1, 9]), class_labels=torch.tensor([0, 2]))
    if rng.random() < 0.5:  # it takes longer than all else
        show_artifact(folder)


def show_artifact(folder: Path) -> None:
    """What ``inspect``, ``sample`` and ``report`` do with an artifact before anything is sampled."""
    stored = read_artifact(folder)
    summary = summarize(stored)
    lines(printable(summary))
    title(stored)
    as_in_calibration(stored, {})
    render_page(report_data(Survey((Subject("one", folder, stored),))), {})


def calls(files: Files, rng: random.Random) -> Files:
    ((name, data),) = files.items()
    if rng.random() < 0.1:
        return {name: changed_bytes(data, rng)}
    key, length = calls_file._METADATA_KEY, int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][key])
    tensors = load(data)
    header.pop("sha256")
    if rng.random() < 0.5:
        header = changed_json(header, rng)
    else:
        tensors = {k: v.contiguous() for k, v in changed_tensors(tensors, rng).items()}
    if isinstance(header, dict):
        header = {**header, "sha256": calls_file.digest(header, tensors)}
    return {name: save(tensors, metadata={key: json.dumps(header)})}


def use_calls(folder: Path, rng: random.Random) -> None:
    found = Calls.load(folder / "calls.safetensors")
    make_plan(model(), CONFIG, found)


def run(files: Files, rng: random.Random) -> Files:
    name, files = rng.choice(sorted(files)), dict(files)
    if name == "run.json":
        changed = changed_json({k: v for k, v in json.loads(files[name]).items() if k != "sha256"}, rng)
        if isinstance(changed, dict):
            changed["sha256"] = sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        return {**files, name: json.dumps(changed).encode()}
    if rng.random() < 0.1:
        return {**files, name: changed_bytes(files[name], rng)}
    identity = json.loads(files["run.json"])
    identity.pop("sha256")
    length = int.from_bytes(files[name][:8], "little")
    losses = json.loads(files[name][8 : 8 + length])["__metadata__"]["losses"]
    tensors, (phase, _, index) = load(files[name]), name.removesuffix(".safetensors").partition("-")
    if rng.random() < 0.9:
        tensors = {k: v.contiguous() for k, v in changed_tensors(tensors, rng).items()}
    else:
        losses = json.dumps(changed_json(json.loads(losses), rng))
    about = [json.dumps(identity, sort_keys=True), phase, int(index), losses]
    signature = sha256(json.dumps(about).encode() + save(tensors)).hexdigest()
    return {**files, name: save(tensors, metadata={"losses": losses, "sha256": signature})}


def use_run(folder: Path, rng: random.Random) -> None:
    encode_artifact(calibrate(model(), CONFIG, calls_to_make(), run_directory=folder).to_artifact())


def use_tuning(folder: Path, rng: random.Random) -> None:
    artifact = folder.parent / "artifact"
    encode_artifact(finetune(model(), artifact, LEARNING, calls_to_make(), run_directory=folder).to_artifact())


SUBJECTS: dict[str, tuple[Callable[[Files, random.Random], Files], Callable[[Path, random.Random], None]]] = {
    "artifact": (artifact, use_artifact),
    "calls": (calls, use_calls),
    "run": (run, use_run),
    "tuning": (run, use_tuning),
}
SHARES = (180, 56, 1, 1)  # of the cases; a run takes as long as a hundred others


# How a case is tried.


def try_case(subjects: Path, index: int) -> str:
    """ "result", or the name of the typed error; raises anything else."""
    rng = random.Random(index)
    (name,) = rng.choices(list(SUBJECTS), SHARES)
    change, use = SUBJECTS[name]
    files = {path.name: path.read_bytes() for path in (subjects / name).iterdir()}
    with tempfile.TemporaryDirectory(dir=subjects) as folder:
        for file, data in change(files, rng).items():
            (Path(folder) / file).write_bytes(data)
        try:
            use(Path(folder), rng)
        except PtqTdqError as error:
            assert len(str(error).splitlines()) == 1, f"not one sentence: {error}"
            return f"{name}: {type(error).__name__}"
    return f"{name}: result"


FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class")


def serve(subjects: Path, first: int, cases: int) -> None:
    for seed in (0, 1):  # libraries are built and imported, for both backends, before anything is forbidden
        for name, (_, use) in SUBJECTS.items():
            use(subjects / name, random.Random(seed))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(_refuse)
    signal.signal(signal.SIGVTALRM, _too_long)
    outcomes = Counter[str]()
    for index in range(first, first + cases):
        print(json.dumps({"begins": index}), flush=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            outcomes[try_case(subjects, index)] += 1
        except BaseException:
            print(json.dumps({"case": index, "wrong": traceback.format_exc()[-3000:]}), flush=True)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    print(json.dumps({"outcomes": outcomes}), flush=True)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(FORBIDDEN):
        raise BaseException(f"code was run: {event} {args}")


def _too_long(*_: Any) -> None:
    raise BaseException(f"a case took more than {SECONDS} s")


def fuzz(subjects: Path, first: int, cases: int) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Try cases in processes of their own; how they ended, and those that ended wrongly, crashes among them."""
    outcomes, wrong, end = Counter[str](), list[dict[str, Any]](), first + cases
    while first < end:
        command = [sys.executable, __file__, str(subjects), str(first), str(end - first)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        wrong += [line for line in lines if "wrong" in line]
        begun = [line["begins"] for line in lines if "begins" in line]
        if process.returncode == 0:
            outcomes.update(lines[-1]["outcomes"])
            break
        assert begun, process.stderr
        wrong.append({"case": begun[-1], "wrong": f"exit code {process.returncode}: {process.stderr[-3000:]}"})
        first = begun[-1] + 1
    return outcomes, wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
