"""What the two trainings share: the host, the time budget, the averaged weights, files and curves."""
import copy
import csv
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

MODELS = Path(__file__).resolve().parent / "models"
# Processors without instructions for bf16 imitate it, seven times slower than fp32.
DTYPE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def use_host():
    """Makes the host's `comfy` importable from COMFYUI_DIR and keeps it on the CPU."""
    directory = os.environ.get("COMFYUI_DIR")
    if not directory or not (Path(directory) / "comfy").is_dir():
        raise ValueError(f"COMFYUI_DIR should name a ComfyUI folder (one that holds comfy/), got {directory!r}")
    sys.path.insert(0, directory)
    from comfy.cli_args import args
    args.cpu = True
    args.use_pytorch_cross_attention = True


def reduced_precision():
    """The context in which a training computes: bf16 where the processor has it, else nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=DTYPE == torch.bfloat16)


def join_workers():
    """This process's place among those that `torchrun --nproc-per-node N` started; 0 without it.

    Several processes of one thread each lose less on a busy machine than one process of several threads.
    """
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
        return distributed.get_rank()
    return 0


def agree(value, operation):
    """A tensor reduced over all workers, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(value, operation)
    return value


class Budget:
    """Learning-rate factor over a time budget: short warmup, then a cosine to a hundredth."""

    def __init__(self, minutes, warmup_steps):
        self.start, self.seconds, self.warmup_steps = time.monotonic(), minutes * 60, warmup_steps
        self.step, self.progress = 0, 0.0

    def advance(self):
        """Counts a step; true while there is time for it, on all workers alike."""
        self.step += 1
        elapsed = torch.tensor((time.monotonic() - self.start) / self.seconds)
        self.progress = agree(elapsed, distributed.ReduceOp.MAX).item()
        return self.progress < 1

    def factor(self):
        return (0.505 + 0.495 * math.cos(math.pi * self.progress)) * min(1.0, self.step / self.warmup_steps)

    def minutes(self):
        return (time.monotonic() - self.start) / 60


class Averaged:
    """An exponential moving average of a module's weights, with a short memory at first."""

    def __init__(self, module, decay=0.999):
        self.module, self.decay, self.step = copy.deepcopy(module).requires_grad_(False).eval(), decay, 0

    @torch.no_grad()
    def update(self, module):
        self.step += 1
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


def learn(model, next_loss, budget, tell, *, averaged, optimizers, learning_rate, first_report, report_every):
    """Take steps on next_loss(step) until the budget is used up, and average the weights.

    tell: is given a row of the curve, minutes, step and mean loss, at some minutes and at the end; None for silent workers.
    """
    losses, next_report = [], first_report
    while budget.advance():
        losses.append(take_step(next_loss(budget.step), optimizers, budget.factor(), learning_rate))
        averaged.update(model)
        if tell is not None and budget.minutes() > next_report:
            tell({"minutes": budget.minutes(), "step": budget.step, "loss": sum(losses) / len(losses)})
            losses, next_report = [], budget.minutes() + report_every
    if tell is not None and losses:
        tell({"minutes": budget.minutes(), "step": budget.step, "loss": sum(losses) / len(losses)})


def add_arguments(parser, name, *, seed, learning_rate):
    """The arguments that both trainings take; name: of the model."""
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--resume", type=Path, help="weights of an earlier run")
    parser.add_argument("--out", type=Path, default=MODELS / f"{name}.safetensors")
    parser.add_argument("--curve", type=Path, default=MODELS.parent / f"{name}_curve.csv")


def orthogonalised(matrices):
    """A batch of matrices with their singular values brought near 1 by five quintic Newton-Schulz steps."""
    x = matrices.to(DTYPE)
    x = x.mT if tall(matrices) else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall(matrices) else x).to(matrices.dtype)


def tall(matrices):
    return matrices.shape[-2] > matrices.shape[-1]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is orthogonalised (Jordan et al. 2024), scaled to the size of Adam's.

    Convolutions count as out x (in * height * width).
    """

    def __init__(self, parameters, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, dict(lr=0.0, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self.step_together(parameters, group)

    def step_together(self, parameters, group):
        updates = []
        for parameter in parameters:
            average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(average, group["momentum"]).flatten(1))
        updates = orthogonalised(torch.stack(updates)) * (0.2 * max(updates[0].shape) ** 0.5)
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(parameter), alpha=group["lr"])


def optimizers_for(named_parameters, adam_only):
    """Muon for the weights between layers, Adam for vectors and for layers whose name begins with one of `adam_only`."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if parameter.ndim > 1 and not name.startswith(adam_only)]
    others = [parameter for name, parameter in trained if parameter.ndim < 2 or name.startswith(adam_only)]
    return [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0, fused=True)]


def take_step(loss, optimizers, factor, learning_rate):
    """One clipped step of every optimizer; returns the loss as a number."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = learning_rate * factor
        for parameter in group["params"]:
            parameter.grad = None
    loss.backward()
    gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]
    if distributed.is_initialized():
        mean = agree(torch.cat([gradient.flatten() for gradient in gradients]), distributed.ReduceOp.SUM) / distributed.get_world_size()
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
    torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def save_half(state, path):
    """Weights to a safetensors file in fp16, replaced in one go so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.detach().to(torch.float16).contiguous() for key, value in state.items()}, partial)
    partial.replace(path)


def load_weights(path):
    return {key: value.float() for key, value in load_file(path).items()}


def append_row(path, row):
    """One line of a training log; the header comes with the first line."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as log:
        writer = csv.DictWriter(log, row.keys())
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def draw_curves(log_path, picture_path):
    """A log of one or more runs over the minutes: each run's loss on a logarithmic axis, and all that is in dB."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with log_path.open() as log:
        rows = list(csv.DictReader(log))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), dpi=80)

    def draw(axis, rows, column, label):
        axis.plot([float(row["minutes"]) for row in rows], [float(row[column]) for row in rows], label=label)

    for run in dict.fromkeys(row["run"] for row in rows):
        draw(left, [row for row in rows if row["run"] == run], "loss", run)
    for column in [name for name in rows[0] if name not in ("run", "minutes", "step", "loss")]:
        draw(right, rows, column, column)
    for axis in (left, right):
        axis.set_xlabel("minutes")
        axis.legend()
    left.set_yscale("log")
    left.set_ylabel("loss")
    right.set_ylabel("dB, held-out photos")
    figure.tight_layout()
    figure.savefig(picture_path)
