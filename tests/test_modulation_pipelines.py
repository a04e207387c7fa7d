"""Precomputed modulations in pipelines: the schedule is made in the first step, and the latents are
those of the unpatched pipeline.
"""

import copy
import pickle
import threading
from typing import Any

import diffusers
import pytest
import torch
from compatibility import pipelines
from compatibility.pipelines import generate, prompt
from support import model_checks, tiny
from torch import Tensor

import ditnorm
from ditnorm.patching.restoring import tables

FAMILIES = ["Qwen-Image", "FLUX.1", "HunyuanVideo"]


def table_of(pipe: Any) -> Any:
    (table,) = tables(pipe.transformer)
    return table


def counts(pipe: Any) -> tuple[int, int, int]:
    table = table_of(pipe)
    return table.hits, table.schedules, table.misses


def precomputed(family: str) -> Any:
    return ditnorm.precompute_modulation(pipelines.pipeline(family))


def other_prompt(family: str) -> dict[str, Any]:
    return {k: v.flip(-1) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in prompt(family).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_makes_the_schedule_and_the_same_schedule_again_makes_nothing(family: str) -> None:
    expected, pipe = generate(pipelines.pipeline(family), family, steps=20), precomputed(family)
    assert torch.equal(generate(pipe, family, steps=20), expected)
    assert counts(pipe) == (19, 1, 0)
    assert torch.equal(generate(pipe, family, steps=20), expected)
    assert counts(pipe) == (39, 1, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_prompt_and_another_number_of_steps(family: str) -> None:
    unpatched, pipe = pipelines.pipeline(family), precomputed(family)
    for steps in (4, 7, 4):
        for more in ({}, other_prompt(family)):
            assert torch.equal(generate(pipe, family, steps=steps, **more), generate(unpatched, family, steps=steps, **more))
    assert table_of(pipe).misses == 0
    assert table_of(pipe).schedules == (2 if family == "Qwen-Image" else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_true_guidance_calls_twice_a_step(family: str) -> None:
    negative = {f"negative_{k}": v for k, v in other_prompt(family).items() if "scale" not in k} | {"true_cfg_scale": 3.0}
    expected, pipe = generate(pipelines.pipeline(family), family, steps=5, **negative), precomputed(family)
    assert torch.equal(generate(pipe, family, steps=5, **negative), expected)
    assert counts(pipe) == ((9, 1, 0) if family == "Qwen-Image" else (8, 2, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_several_results_a_prompt_share_rows(family: str) -> None:
    number = {"num_videos_per_prompt" if family == "HunyuanVideo" else "num_images_per_prompt": 3}
    expected, pipe = generate(pipelines.pipeline(family), family, steps=4, **number), precomputed(family)
    assert torch.equal(generate(pipe, family, steps=4, **number), expected)
    assert counts(pipe) == (3, 1, 0)
    assert table_of(pipe).row_count == (5 if family == "HunyuanVideo" else 4)  # and both dtypes of its latents


@pytest.mark.parametrize("family", FAMILIES)
def test_another_scheduler_with_stochastic_steps_or_repeated_timesteps(family: str) -> None:
    unpatched, pipe = pipelines.pipeline(family), precomputed(family)
    for make in (_stochastic, _second_order):
        for p in (unpatched, pipe):
            p.scheduler = make(p.scheduler)
        torch.manual_seed(0)
        expected = generate(unpatched, family, steps=4)
        torch.manual_seed(0)
        assert torch.equal(generate(pipe, family, steps=4), expected)
    assert table_of(pipe).misses == 0


def _stochastic(scheduler: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=True)


def _second_order(scheduler: Any) -> Any:
    class Repeating(diffusers.FlowMatchEulerDiscreteScheduler):
        """Each timestep twice, as second-order schedulers have it."""

        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None, timesteps: Any = None
        ) -> None:
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
            self.timesteps = self.timesteps.repeat_interleave(2)
            self.sigmas = torch.cat([self.sigmas[:-1].repeat_interleave(2), self.sigmas[-1:]])

    return Repeating.from_config(scheduler.config)


def test_part_of_a_schedule_as_image_to_image_takes_it() -> None:
    unpatched = pipelines.pipeline("Qwen-Image")
    pipe = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    arguments = model_checks.moved(tiny.inputs("qwen-image", 1, torch.bfloat16), str(pipe.device))
    for p in (unpatched, pipe):
        p.scheduler.set_timesteps(8, mu=0.7)
    for t in unpatched.scheduler.timesteps[5:]:
        given = arguments | {"timestep": t.expand(1).to(pipe.device, torch.bfloat16) / 1000}
        assert torch.equal(tiny.run(pipe.transformer, given), tiny.run(unpatched.transformer, given))
    assert counts(pipe) == (2, 1, 0)
    assert table_of(pipe).row_count == 3


def test_pipelines_that_share_a_transformer_take_turns() -> None:
    unpatched, pipe = pipelines.pipeline("Qwen-Image"), precomputed("Qwen-Image")
    other = diffusers.QwenImagePipeline(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    ditnorm.precompute_modulation(other)
    for p, steps in ((pipe, 4), (other, 6), (pipe, 4), (other, 6)):
        assert torch.equal(generate(p, "Qwen-Image", steps=steps), generate(unpatched, "Qwen-Image", steps=steps))
    assert counts(pipe) == (18, 2, 0)


def test_threads_share_a_table_that_has_no_room_for_all_their_schedules() -> None:
    unpatched, pipe = pipelines.pipeline("Qwen-Image"), precomputed("Qwen-Image")
    numbers = table_of(pipe).numbers
    numbers.fixed = True
    numbers._free = numbers._free[:12]
    others = [pipe, *(diffusers.QwenImagePipeline(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}) for _ in range(2))]
    for other in others[1:]:
        other.set_progress_bar_config(disable=True)
        ditnorm.precompute_modulation(other)
    expected = [generate(unpatched, "Qwen-Image", steps=5 + i) for i in range(3)]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = generate(others[i], "Qwen-Image", steps=5 + i)
            if not torch.equal(found[i], expected[i]):
                break

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [i for i in range(3) if not torch.equal(found[i], expected[i])] == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_start_a_table_of_their_own(copied: Any) -> None:
    model = ditnorm.precompute_modulation(tiny.load("hunyuan-video", torch.bfloat16))
    arguments = tiny.inputs("hunyuan-video", 2, torch.bfloat16)
    expected = tiny.run(model, arguments)
    twin = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(tiny.run(twin, arguments), expected)
    assert torch.equal(tiny.run(ditnorm.unpatch_model(twin), arguments), expected)


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video-token-replace"])
def test_timesteps_for_a_model_without_a_pipeline(name: str) -> None:
    unpatched, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 1, torch.bfloat16)
    timesteps = torch.tensor([900.0, 700.0, 300.0]) / (1000 if name == "qwen-image" else 1)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched), timesteps=timesteps)
    for t in timesteps:
        given = arguments | {"timestep": t[None].to(arguments["timestep"].dtype)}
        assert torch.equal(tiny.run(model, given), tiny.run(unpatched, given))
    (table,) = tables(model)
    assert (table.schedules, table.misses) == (1 if name == "qwen-image" else 2, 0)
    given = arguments | {"timestep": torch.tensor([0.123 if name == "qwen-image" else 123]).to(arguments["timestep"].dtype)}
    assert torch.equal(tiny.run(model, given), tiny.run(unpatched, given))
    assert table.misses == 1
