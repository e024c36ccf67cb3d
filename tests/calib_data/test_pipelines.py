"""Real pipelines, made small: their own prompts, classes, guidance and schedulers around the denoiser."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FluxFillPipeline,
    KandinskyV22CombinedPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
)
from pipelines import PIPELINES, SmallPipeline, kandinsky, unclip
from unets import tiny_unet

from ptq_tdq.calib_data import (
    LoadedModel,
    LoopSampler,
    PipelineSampler,
    collect,
    find_original,
    from_pipeline,
    load_model,
    new_schedule,
    read_prompts,
    sample_generator,
    with_scheduler,
)
from ptq_tdq.calib_data.collect import drawn
from ptq_tdq.calls import prediction
from ptq_tdq.errors import ConfigError, MissingExtraError, ModelError

if TYPE_CHECKING:
    import ftfy  # type: ignore[import-not-found]

Saved = Callable[[str], tuple[SmallPipeline, Path]]
NAMES = [entry.name for entry in PIPELINES]
FEW: dict[str, Any] = {"samples_per_step": 3, "calibration_steps": 2, "num_inference_steps": 2}


def load(saved: Saved, name: str, **options: Any) -> LoadedModel:
    entry, folder = saved(name)
    own = ("num_inference_steps", "output_type")
    call = {key: value for key, value in entry.call.items() if key not in own} if entry.condition else None
    component = "transformer" if name == "WanPipeline" else None
    return load_model(str(folder), component=component, call=call, **options)


def generators(count: int) -> list[torch.Generator]:
    return [sample_generator("evaluation", 0, i) for i in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_those_of_the_pipeline_and_cover_its_schedule(saved_pipeline: Saved, name: str) -> None:
    model = load(saved_pipeline, name)
    calls = collect(model, **FEW)
    assert set(calls.trajectory.tolist()) == {0, 1, 2}
    steps = [float(t) for t in calls.t.unique()]
    assert 0 <= min(steps) <= max(steps) <= 1000
    assert len(steps) == (1 if name == "WanPipeline" else 2)  # its other denoiser does the step of low noise
    schedule = new_schedule(model.sampler)
    conditions = model.sampler.conditions(2)
    sampled = model.sampler.run(model.denoiser, conditions, generators(2), 2, schedule)
    if schedule.timesteps.min() >= 0 and name != "StableAudioPipeline":  # whose model sees logarithms of sigma
        assert all(min(abs(t - float(s)) for s in schedule.timesteps) < 1 for t in steps)
    with torch.no_grad():  # what was recorded is what the denoiser takes
        assert bool(torch.isfinite(prediction(model.denoiser(**calls.inputs(slice(0, 2))))).all())
    assert len(sampled.latents) == 2 and bool(torch.isfinite(sampled.latents).all())
    if name == "StableAudioPipeline":
        assert sampled.images is None
    else:
        assert sampled.images is not None and sampled.images.shape[:2] == (2, 3)
        assert sampled.images.abs().max() <= 1


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_samples_are_those_of_the_pipeline_itself(saved_pipeline: Saved, name: str) -> None:
    entry, folder = saved_pipeline(name)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(prompt=["A red fox"], generator=generators(1), **{**entry.call, "output_type": "np"})[0]
    model = load(saved_pipeline, name, prompts=["A red fox"])
    found = model.sampler.run(model.denoiser, ["A red fox"], generators(1), 2, new_schedule(model.sampler)).images
    assert found is not None
    assert torch.allclose(torch.as_tensor(expected).permute(0, 3, 1, 2) * 2 - 1, found, atol=1e-5)


def test_guidance_calls_the_denoiser_with_and_without_the_prompt(saved_pipeline: Saved) -> None:
    model = load(saved_pipeline, "StableDiffusionPipeline")
    calls = collect(model, **FEW)
    unguided = load_model(
        str(saved_pipeline("StableDiffusionPipeline")[1]), call={"guidance_scale": 1.0, "height": 16, "width": 16}
    )
    assert len(calls) == 2 * len(collect(unguided, **FEW))
    text = calls.groups[0].leaf("encoder_hidden_states")
    without, with_prompt = text[(calls.t == calls.t.max()) & (calls.trajectory == 0)][:2]
    assert not torch.equal(without, with_prompt)


def test_each_sample_has_its_own_prompt_and_noise_whatever_the_batch(saved_pipeline: Saved) -> None:
    model = load(saved_pipeline, "PixArtSigmaPipeline", prompts=["A red fox", "A boat", "Snow"])
    together, apart = (collect(model, **FEW, batch_size=size) for size in (3, 1))
    order = [c.trajectory.argsort(stable=True) for c in (together, apart)]
    x = [c.groups[0].leaf("hidden_states")[o] for c, o in zip((together, apart), order, strict=True)]
    # guidance: a batch holds all samples without their prompts, then all with them; each alone, the same two rows
    assert torch.allclose(x[0], x[1], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("StableDiffusionPipeline", {"negative_prompt": "blurry"}),
        ("StableDiffusionXLPipeline", {"negative_prompt_2": "blurry", "prompt_2": "A photo"}),
        ("FluxPipeline", {"negative_prompt": "blurry", "true_cfg_scale": 4.0}),
        ("StableDiffusionXLPipeline", {"original_size": [64, 48], "crops_coords_top_left": [0, 8]}),
    ],
)
def test_an_argument_of_the_call_holds_for_each_prompt(saved_pipeline: Saved, name: str, call: dict[str, Any]) -> None:
    model = load(saved_pipeline, name)
    model.sampler.call |= call  # type: ignore[attr-defined]
    conditions, steps = model.sampler.conditions(2), new_schedule(model.sampler)
    together = model.sampler.run(model.denoiser, conditions, generators(2), 2, steps).latents
    first = model.sampler.run(model.denoiser, conditions[:1], generators(1), 2, new_schedule(model.sampler)).latents
    assert torch.allclose(together[:1], first, atol=1e-4)


def test_free_noise_takes_one_prompt_at_a_time(saved_pipeline: Saved) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1], local_files_only=True)
    called = []

    class FreeNoise(StableDiffusionPipeline):
        free_noise_enabled = True

        def __call__(  # type: ignore[override]
            self,
            prompt: Any,
            negative_prompt: Any = None,
            output_type: str = "",
            num_inference_steps: int = 2,
            **more: Any,
        ) -> Any:
            called.append((prompt, negative_prompt, type(more["generator"])))
            more |= {"output_type": output_type, "num_inference_steps": num_inference_steps}
            return super().__call__(prompt, negative_prompt=negative_prompt, height=16, width=16, **more)

    components = {**pipe.components, "requires_safety_checker": False}
    model = from_pipeline(FreeNoise(**components), prompts=["A fox", "A boat"], call={"negative_prompt": "blurry"})
    collect(model, **FEW)
    assert set(called) == {(prompt, "blurry", torch.Generator) for prompt in ("A fox", "A boat")} and len(called) == 3


def test_a_pipeline_that_refuses_lists_of_prompts_takes_one_at_a_time(saved_pipeline: Saved) -> None:
    class One(StableDiffusionPipeline):
        def __call__(self, prompt: Any = None, negative_prompt: Any = None, generator: Any = None, **more: Any) -> Any:  # type: ignore[override]
            if not all(isinstance(each, str) for each in (prompt, negative_prompt)) or isinstance(generator, list):
                raise ValueError("Passing a list is not yet supported.")
            more |= {"num_inference_steps": 2, "output_type": "np"}
            return super().__call__(prompt, negative_prompt=negative_prompt, generator=generator, **more)

    pipe = One.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    model = from_pipeline(pipe, prompts=["A fox", "A boat"], call={"negative_prompt": "blurry"})
    assert model.sampler.batch == 1
    model.sampler.call |= {"height": 16, "width": 16}  # type: ignore[attr-defined]
    assert set(collect(model, **FEW).trajectory.tolist()) == {0, 1, 2}


def test_a_pipeline_that_computes_attention_by_hand_is_told_at_its_first_step(
    saved_pipeline: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    pipe = StableDiffusionSAGPipeline(**pipe.components, requires_safety_checker=False)
    before = {name: type(each) for name, each in pipe.unet.attn_processors.items()}
    collect(from_pipeline(pipe, call={"height": 16, "width": 16}), **FEW)
    assert "computes attention of its unet by hand (CrossAttnStoreProcessor)" in caplog.text
    assert {name: type(each) for name, each in pipe.unet.attn_processors.items()} == before


def test_pictures_that_a_pipeline_lacks_are_named(saved_pipeline: Saved) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("FluxPipeline")[1])
    given = {name: each for name, each in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    model = from_pipeline(FluxFillPipeline(**given), call={"height": 16, "width": 16, "max_sequence_length": 64})
    with pytest.raises(
        ModelError, match=r"cannot sample so, without image, mask_image .* record calls of its denoiser"
    ):
        collect(model, **FEW)


def test_a_pipeline_may_take_classes_that_its_model_has_not() -> None:
    pipe = ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler())
    calls = collect(from_pipeline(pipe), **FEW)
    assert set(calls.trajectory.tolist()) == {0, 1, 2}
    with pytest.raises(ConfigError, match="takes no classes"):
        from_pipeline(pipe, classes=[0])


def test_a_pipeline_that_counts_its_batch_draws_each_class() -> None:
    pipe = ConsistencyModelPipeline(tiny_unet(num_class_embeds=4), CMStochasticIterativeScheduler())
    model = from_pipeline(pipe, classes=[3, 1])
    calls = collect(model, **FEW)
    labels = calls.groups[0].leaf("class_labels").tolist()
    assert set(zip(calls.trajectory.tolist(), labels, strict=True)) == set(enumerate(drawn(model.sampler, 3, seed=0)))


KANDINSKY, UNCLIP = (KandinskyV22CombinedPipeline, kandinsky), (UnCLIPPipeline, unclip)


@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated")
@pytest.mark.parametrize(
    ("kind", "component", "scheduler", "steps", "t"),
    [
        (KANDINSKY, "unet", DDPMScheduler, "num_inference_steps", [0, 333, 666]),
        (KANDINSKY, "prior_prior", UnCLIPScheduler, "prior_num_inference_steps", [0, 500, 999]),
        (UNCLIP, "prior", UnCLIPScheduler, "prior_num_inference_steps", [0, 500, 999]),
        (UNCLIP, "decoder", UnCLIPScheduler, "decoder_num_inference_steps", [0, 500, 999]),
        (UNCLIP, "super_res_first", UnCLIPScheduler, "super_res_num_inference_steps", [500, 999]),
        (UNCLIP, "super_res_last", UnCLIPScheduler, "super_res_num_inference_steps", [0]),
    ],
)
def test_each_denoiser_runs_by_its_own_scheduler_and_steps(
    kind: tuple[Any, Any], component: str, scheduler: type, steps: str, t: list[float]
) -> None:
    cls, components = kind
    pipe = cls(**components())
    size = {"height": 64, "width": 64} if cls is KandinskyV22CombinedPipeline else {}
    others = [key for key in inspect.signature(cls.__call__).parameters if key.endswith("num_inference_steps")]
    call = {**size, **dict.fromkeys(others, 2)}
    del call[steps]
    model = from_pipeline(pipe, component=component, call=call)
    assert type(model.scheduler) is scheduler
    calls = collect(model, samples_per_step=2, calibration_steps=3, num_inference_steps=3)
    assert calls.t.unique().tolist() == t
    other, called = copy.deepcopy(model.denoiser), []
    other.register_forward_pre_hook(lambda *_: called.append(1))
    sampled = model.sampler.run(other, model.sampler.conditions(1), generators(1), 3, new_schedule(model.sampler))
    assert len(called) == len(t) and bool(sampled.latents.isfinite().all())
    with pytest.raises(ConfigError, match=f"takes no argument '{steps}' here"):
        from_pipeline(pipe, component=component, call={**call, steps: 2})


@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated")
def test_a_run_that_never_calls_the_denoiser_is_one_sentence() -> None:
    pipe = KandinskyV22CombinedPipeline(**kandinsky())
    pipe.unet = copy.deepcopy(pipe.unet)  # its decoder's pipeline keeps the other
    call = {"height": 64, "width": 64, "prior_num_inference_steps": 2}
    model = from_pipeline(pipe, component="unet", call=call)
    with pytest.raises(ModelError, match=r"KandinskyV22CombinedPipeline never called its unet, so .* or give the"):
        collect(model, **FEW)


def test_a_pipeline_without_a_scheduler_is_one_sentence() -> None:
    class Bare(DiffusionPipeline):
        def __init__(self, unet: Any) -> None:
            self.register_modules(unet=unet)

        def __call__(self, generator: Any = None) -> None: ...

    with pytest.raises(ModelError, match=r"^Bare has no scheduler of its unet; record calls of it\.$"):
        from_pipeline(Bare(tiny_unet()))


def test_a_pipeline_that_names_nothing_of_its_sampling_is_one_sentence(saved_pipeline: Saved) -> None:
    class Blocks(StableDiffusionPipeline):
        def __call__(self, state: Any = None, **inputs: Any) -> None: ...  # type: ignore[override]

    pipe = Blocks.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    for told in ({}, {"prompts": "A red fox"}, {"call": {"height": 16}}):
        with pytest.raises(ModelError, match=r"Blocks names neither .* record calls of its unet"):
            from_pipeline(pipe, **told)


def test_a_pipeline_in_memory_is_as_good_as_its_folder(saved_pipeline: Saved) -> None:
    _, folder = saved_pipeline("DiTPipeline")
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    there, here = load_model(str(folder)), from_pipeline(pipe)
    assert here.component == there.component == "transformer"
    assert collect(here, **FEW).sha256 == collect(there, **FEW).sha256


def test_a_pipeline_in_memory_is_called_what_it_was_loaded_from(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("StableDiffusionPipeline")[1]
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert from_pipeline(pipe).id == str(folder) == load_model(str(folder)).id
    assert from_pipeline(StableDiffusionPipeline(**pipe.components)).id == "unet"  # of nowhere: the denoiser's own


def test_one_prompt_may_be_given_as_text(saved_pipeline: Saved) -> None:
    folder = saved_pipeline("StableDiffusionPipeline")[1]
    assert load_model(str(folder), prompts="A red fox").sampler.conditions(2) == ["A red fox"] * 2


TOLD: dict[str, Any] = {"component": "unet", "prompts": "A red fox", "classes": [1], "call": {"guidance_scale": 1.0}}


@pytest.mark.parametrize("key", TOLD)
@pytest.mark.parametrize("given", ["loaded", "module", "pipeline"])
def test_what_would_have_no_effect_is_refused(saved_pipeline: Saved, given: str, key: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    model = {"loaded": lambda: from_pipeline(pipe), "module": lambda: pipe.unet, "pipeline": lambda: pipe}[given]()
    if (given, key) == ("pipeline", "component"):
        assert find_original(model, recorded=True, component="unet").denoiser is pipe.unet
        return
    with pytest.raises(ConfigError, match=f"^{key} would have no effect: "):
        find_original(model, recorded=True, **{key: TOLD[key]})


def test_recorded_calls_serve_a_pipeline_that_needs_more_than_a_prompt(saved_pipeline: Saved) -> None:
    class Needing(StableDiffusionPipeline):
        def __call__(self, image: Any) -> None: ...  # type: ignore[override]

    pipe = Needing.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    assert find_original(pipe, recorded=True).denoiser is pipe.unet


def test_an_unconditional_pipeline_runs_in_the_plain_loop(saved_pipeline: Saved) -> None:
    assert isinstance(load(saved_pipeline, "DDPMPipeline").sampler, LoopSampler)
    assert isinstance(load(saved_pipeline, "DiTPipeline").sampler, PipelineSampler)


def test_another_scheduler_takes_the_place_of_the_pipelines_own(saved_pipeline: Saved) -> None:
    model = with_scheduler(load(saved_pipeline, "StableDiffusionPipeline"), "EulerDiscreteScheduler")
    assert collect(model, **FEW).t.unique().tolist() == [1.0, 501.0]  # its spacing is "leading", its offset 1
    assert type(model.scheduler).__name__ == "EulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("DiTPipeline", {"prompts": ["A fox"]}, "takes no prompts"),
        ("DiTPipeline", {"classes": [1000]}, "numbers from 0 to 999"),
        ("StableDiffusionPipeline", {"classes": [1]}, "takes no classes"),
        ("StableDiffusionPipeline", {"prompts": []}, "no prompt"),
        ("StableDiffusionPipeline", {"call": {"heigth": 16}}, "takes no argument 'heigth' here; it takes"),
        (
            "StableDiffusionPipeline",
            {"call": {"latents": torch.zeros(1)}},
            r"'latents' is tensor\(.*, which no recipe",
        ),
        ("StableDiffusionPipeline", {"call": {"guidance_scale": math.nan}}, "'guidance_scale' is nan, which no recipe"),
        ("StableDiffusionPipeline", {"component": "text_encoder"}, "no denoiser named 'text_encoder'; it has unet"),
        ("WanPipeline", {}, r"several denoisers \(transformer, transformer_2\); name one as component"),
        ("DDPMPipeline", {"prompts": ["A fox"]}, "takes no prompts"),
        ("DDPMPipeline", {"call": {"height": 16}}, "height or width, only eta"),
        ("DDPMPipeline", {"classes": [0]}, "takes no classes"),
    ],
)
def test_what_a_model_does_not_take_is_one_sentence(
    saved_pipeline: Saved, name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=said):
        load_model(str(saved_pipeline(name)[1]), **options)


def test_a_shape_that_the_pipeline_refuses_is_one_sentence(saved_pipeline: Saved) -> None:
    model = load_model(str(saved_pipeline("StableDiffusionPipeline")[1]), call={"height": 17, "width": 16})
    with pytest.raises(ModelError, match=r"StableDiffusionPipeline cannot sample so .*17"):
        collect(model, **FEW)


def test_of_several_things_the_first_is_taken(saved_pipeline: Saved) -> None:
    class WithDepth(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            picture, flag = super().__call__(*args, **kwargs)
            return (picture, picture[..., 0]), flag

        __call__.__signature__ = inspect.signature(StableDiffusionPipeline.__call__)  # type: ignore[attr-defined]

    pipe = WithDepth.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    model = from_pipeline(pipe, call={"height": 16, "width": 16})
    made = model.sampler.run(model.denoiser, ["A fox"], generators(1), 2, new_schedule(model.sampler))
    assert made.images is not None and made.images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("ftfy", MissingExtraError, r"Lacking needs a package that is not installed \(name 'ftfy' is not"),
        ("promt", ModelError, r"Lacking cannot sample so \(name 'promt' is not"),
    ],
)
def test_a_package_that_a_pipeline_lacks_is_one_sentence(
    saved_pipeline: Saved, name: str, kind: Any, said: str
) -> None:
    class Lacking(StableDiffusionPipeline):
        def __call__(self, prompt: Any = None, generator: Any = None, **more: Any) -> Any:  # type: ignore[override]
            return ftfy.fix_text(prompt) if name == "ftfy" else promt  # type: ignore[name-defined]  # noqa: F821

    pipe = Lacking.from_pretrained(saved_pipeline("StableDiffusionPipeline")[1])
    with pytest.raises(kind, match=said):
        collect(from_pipeline(pipe), **FEW)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_prompt_file_is_read_line_by_line(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("  A red fox \n\nEin Bär\n", encoding=encoding)
    assert read_prompts(file) == ["A red fox", "Ein Bär"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_prompt_file_without_prompts_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ConfigError, match="prompt"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path)
