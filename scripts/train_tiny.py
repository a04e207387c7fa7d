"""Trains the tiny pipelines of ``examples/digits`` by flow matching, with the patched models, and
writes them there.

    python scripts/train_tiny.py [--families NAME ...] [--steps N] [--batch N] [--out DIR]
    [--checkpoints DIR]

Runs on the GPU if PyTorch sees one. Interrupted, it resumes from the last checkpoint when started
again, and ends with the same weights.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import matplotlib
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from digits import dataset
from digits.families import FAMILIES, FOLDER, Family, prompt_table, save, share_read
from pipelines.loading import load
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEED = 0
LEARNING_RATE, WARMUP = 1e-3, 100  # steps of warm-up; then half a cosine down to 0
AVERAGE = 0.999  # decay of the average of the weights, which is what is saved
CHECKPOINT_EVERY = 500  # steps


@dataclass
class Training:
    """One family's model, its average and its optimiser after ``len(losses)`` steps."""

    family: Family
    steps: int
    batch: int
    device: torch.device
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        self.pipe: DiffusionPipeline = self.family.build()
        self.model = ditnorm.patch_model(self.pipe.transformer.to(self.device).train(), strict=True)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.generator = torch.Generator(self.device).manual_seed(SEED)
        latents, labels = self.family.latents()
        self.latents, self.labels = latents.to(self.device), labels.to(self.device)
        scheduler = self.pipe.scheduler
        self.timesteps, self.sigmas = scheduler.timesteps.to(self.device), scheduler.sigmas.to(self.device)
        self.prompts = {name: table.to(self.device) for name, table in prompt_table().items()}

    def _rate(self, step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def step(self) -> Tensor:
        """One step of the optimiser; returns the loss."""
        chosen = torch.randint(len(self.latents), (self.batch,), generator=self.generator, device=self.device)
        clean, labels = self.latents[chosen], self.labels[chosen]
        noise = torch.randn(clean.shape, generator=self.generator, device=self.device)
        index = torch.randint(len(self.sigmas), (self.batch,), generator=self.generator, device=self.device)
        timestep, sigma = self.timesteps[index], self.sigmas[index].view(-1, 1, 1, 1, 1)
        # As FlowMatchEulerDiscreteScheduler.scale_noise.
        noisy = sigma * noise + (1 - sigma) * clean
        velocity = self.family.velocity(self.model, noisy, timestep, {name: table[labels] for name, table in self.prompts.items()})
        loss = F.mse_loss(velocity, noise - clean)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    def run(self, checkpoint: Path) -> None:
        """Trains to the end, from the checkpoint if there is one."""
        if checkpoint.exists():
            self._resume(checkpoint)
        pending: list[Tensor] = []
        with tqdm(total=self.steps, initial=len(self.losses), desc=self.family.name, unit="step") as progress:
            while len(self.losses) + len(pending) < self.steps:
                pending.append(self.step())
                progress.update()
                done = len(self.losses) + len(pending)
                checkpointed = done % CHECKPOINT_EVERY == 0 or done == self.steps
                if done % 50 == 0 or checkpointed:  # asking for a loss waits for the GPU
                    self.losses += torch.stack(pending).tolist()
                    pending.clear()
                    progress.set_postfix(loss=f"{sum(self.losses[-50:]) / len(self.losses[-50:]):.4f}")
                if checkpointed:
                    self._save(checkpoint)

    def _save(self, checkpoint: Path) -> None:
        state = {
            "settings": (self.steps, self.batch),
            "losses": self.losses,
            "generator": self.generator.get_state(),
            **{name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer", "schedule")},
        }
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location=self.device)
        if state["settings"] != (self.steps, self.batch):
            steps, batch = state["settings"]
            raise SystemExit(f"{checkpoint} is of a training with --steps {steps} --batch {batch}: go on with these, or remove it")
        for name in ("model", "average", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.losses = state["losses"]

    def trained(self) -> DiffusionPipeline:
        """The pipeline with the averaged weights, unpatched, in float32 on the CPU."""
        self.model.load_state_dict(self.average.module.state_dict())
        ditnorm.unpatch_model(self.model)
        return self.pipe.to("cpu")


def loss_curve(losses: Sequence[float], path: Path, title: str) -> None:
    """Draws the loss of every step and its running mean."""
    window = max(1, min(100, len(losses) // 10))
    mean = torch.tensor(losses).unfold(0, window, 1).mean(1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, linewidth=0.5, alpha=0.4, label="a step")
    axes.plot(range(window - 1, len(losses)), mean, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="flow-matching loss (MSE of the velocity)", yscale="log", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train the tiny pipelines that draw handwritten digits.")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="(default: all)")
    parser.add_argument("--steps", type=int, default=4000, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="samples a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="for a folder a family (default: examples/digits)")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/train"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)

    diffusers.logging.set_verbosity_error()  # of the text encoders, which there are none of
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in options.families:
        training = Training(FAMILIES[name], options.steps, options.batch, device)
        training.run(options.checkpoints / f"{name}.pt")
        folder = options.out / name
        save(training.trained(), folder)
        loss_curve(training.losses, folder / "loss.png", f"{name}, batch {options.batch}")
        record = {
            "command": f"python scripts/train_tiny.py --families {name} --steps {options.steps} --batch {options.batch}",
            "data": f"scikit-learn load_digits, {len(dataset.images()[0])} pictures",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "last_loss": sum(training.losses[-100:]) / len(training.losses[-100:]),
            "share_read": share_read(FAMILIES[name], folder, load(str(folder), torch.float32).to(device)),
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(f"{name}: loss {record['last_loss']:.4f}, {record['share_read']:.0%} of the digits read, written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
