"""The timesteps that a model is going to be given, and what its embedding makes of them."""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...swapping.generated import origin_of
from .modulated_model import ModulatedModel

Inputs = Sequence[Tensor | None]
"""Arguments of the embedding in the order of its parameters, None for what isn't a tensor."""


class Schedules:
    """Finds the timestep of a forward pass in the schedules that are known, and makes the
    embeddings of the steps behind it.
    """

    timesteps: Tensor | None = None
    """The timesteps that the user gave, 1-D."""

    def __init__(self, model: nn.Module, embedding: nn.Module, facts: ModulatedModel) -> None:
        self.model, self.embedding = model, embedding
        self.times, self.projection = facts.times, facts.projection
        upstream: Any = origin_of(type(embedding)) or type(embedding)
        self.inputs = tuple(inspect.signature(upstream.forward).parameters)[1:]
        self._pipelines: list[weakref.ref[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: not the pipelines, since they may belong to others."""
        return self.__dict__ | {"_pipelines": []}

    def follow(self, pipeline: Any) -> None:
        """Takes schedules from the scheduler that ``pipeline`` has at the time."""
        if all(known() is not pipeline for known in self._pipelines):
            self._pipelines = [known for known in self._pipelines if known() is not None] + [weakref.ref(pipeline)]

    def rest(self, inputs: Inputs, output: int, dtype: torch.dtype, model_dtype: torch.dtype) -> list[Tensor]:
        """The embeddings from this step of a known schedule on; none where the timestep is in no
        schedule.

        ``output``: which of the tensors that the embedding returns; ``dtype``: of that tensor;
        ``model_dtype``: of the model's activations.
        """
        given: dict[str, Any] = {name: value for name, value in zip(self.inputs, inputs, strict=True) if value is not None}
        if self.projection is not None:
            return self._rest_projected(given, output, self.projection, model_dtype)
        timestep = given.get("timestep")
        if timestep is None or not timestep.numel():
            return []
        given |= {name: dtype for name in self.inputs if name.endswith("dtype")}  # the dtype that the embedding was asked for
        value = timestep.flatten()[0]
        for timesteps in self._known():
            timesteps = timesteps.to(timestep.device)
            for form, taken in enumerate(_as_models_take_them(timesteps, timestep.dtype, self.times)):
                found = (taken == value).nonzero().flatten().tolist()
                if found:
                    now = found[0]
                    rest = [self._embedded(given, value, taken, step, output) for step in range(now, len(taken))]
                    if timestep.dtype is not model_dtype:  # as HunyuanVideo's latents, and timesteps, are from step 2 on
                        taken = _as_models_take_them(timesteps, model_dtype, self.times)[form]
                        rest += [self._embedded(given, value, taken, step, output) for step in range(now + 1, len(taken))]
                    return rest
        return []

    def _rest_projected(self, given: dict[str, Any], output: int, projection: str, model_dtype: torch.dtype) -> list[Tensor]:
        """The same where the embedding is given a projection [B, N] of the timestep, the first of
        its arguments.
        """
        name, sample = next(iter(given.items()))
        project: Any = self.model.get_submodule(projection)
        for timesteps in self._known():
            for taken in _as_models_take_them(timesteps.to(sample.device), model_dtype, self.times):
                projected = project(taken).to(sample.dtype)
                found = (projected == sample[0]).all(-1).nonzero().flatten().tolist()
                if found:
                    rest = (torch.where((sample == sample[0]).all(-1, keepdim=True), step, sample) for step in projected[found[0] :])
                    return [self._output(given | {name: step}, output) for step in rest]
        return []

    def _known(self) -> Iterator[Tensor]:
        if self.timesteps is not None:
            yield self.timesteps
        for pipeline in self._pipelines:
            timesteps = getattr(getattr(pipeline(), "scheduler", None), "timesteps", None)
            if isinstance(timesteps, Tensor) and timesteps.ndim == 1:
                yield timesteps

    def _embedded(self, given: dict[str, Any], now: Tensor, taken: Tensor, step: int, output: int) -> Tensor:
        """What the embedding makes of ``given`` with the timestep of another step. Other values
        beside it, a 0 for instance, stay.
        """
        timestep = given["timestep"]
        changed = {"timestep": torch.where(timestep == now, taken[step], timestep.to(taken.dtype))}
        if "timestep_r" in given:  # the timestep of the next step, and 0 at the end
            changed["timestep_r"] = (
                torch.zeros_like(changed["timestep"]) + taken[step + 1] if step + 1 < len(taken) else changed["timestep"] * 0
            )
        return self._output(given | changed, output)

    def _output(self, arguments: dict[str, Any], output: int) -> Tensor:
        upstream: Any = origin_of(type(self.embedding))
        embedded = upstream.forward(self.embedding, **arguments)
        return embedded[output] if isinstance(embedded, tuple) else embedded


def _as_models_take_them(timesteps: Tensor, dtype: torch.dtype, times: int) -> list[Tensor]:
    """What pipelines make of the timesteps of a scheduler before a model gets them, in each way
    that there is, ``times`` what the model makes of that.
    """
    if not dtype.is_floating_point:
        return [timesteps.to(dtype) * times]
    forms = [timesteps.to(dtype), timesteps.to(dtype) / 1000, (timesteps / 1000).to(dtype)]
    return forms if times == 1 else [form * times for form in forms]
