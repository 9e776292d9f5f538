"""The truth: the same updates for real, with every allocation that torch's allocator makes."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lowrank_cli import console, optim
from lowrank_cli.config import RunConfig, resolve
from lowrank_cli.models import load as models
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.train import audit, plan
from lowrank_cli.train.dry import Description
from lowrank_cli.train.objective import objective
from lowrank_cli.train.setup import apply_methods

UPDATES = 3  # the first, an ordinary one, and one in which every basis is due again

TRAINING = "training begins"


@pytest.fixture(autouse=True)
def quiet():
    """No tables of targets between the tests' own lines."""
    console.set_level(console.QUIET)
    yield
    console.set_level(console.NORMAL)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A folder with weights to fine-tune: two layers of llama-9m with a vocabulary of 2,048."""
    path = tmp_path_factory.mktemp("base") / "model"
    config = resolve("pretrain", {"model": "llama-9m"}, {})
    architecture = models.build_config(config.model, vocab_size=2048, max_length=256)
    architecture.pad_token_id, architecture.num_hidden_layers = 0, 2
    filled(models.meta(architecture)).save_pretrained(path)
    return str(path)


@pytest.fixture
def pretraining():
    """Resolve the settings of `lowrank pretrain`; those of a method as a dictionary under its name."""
    return lambda **settings: configured("pretrain", settings | {"device": "cpu"})


@pytest.fixture
def finetuning(base):
    """Resolve the settings of `lowrank finetune`."""
    return lambda **settings: configured("finetune", {"model": base, "device": "cpu"} | settings)


def configured(command: str, settings: dict) -> RunConfig:
    """The configuration of flat settings."""
    own = {key: value for key, value in settings.items() if isinstance(value, dict)}
    return resolve(command, {key: value for key, value in settings.items() if key not in own}, own)


@pytest.fixture
def measured():
    """The most bytes that torch's CPU allocator gave out at one time, over the updates of a run."""
    return measure


def measure(description: Description) -> int:
    """Three updates of a description's run for real; the peak of allocated bytes, weights and all."""
    config = description.config
    # before the profiler, which loses count of what threads read and free
    before = quantized_model(description) if config.task is not None and config.task.quantize else None
    # what earlier tests left in reference cycles would be freed, and counted, in the middle of the measurement
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = before or random_model(description)
        parts, groups = apply_methods(config, model)
        optimizer = optim.build(replace(config.optim, kernel="torch"), groups)
        gradients = Gradients(model, optimizer, per_layer=config.optim.per_layer, clipping=config.optim.grad_clipping)
        learned = objective(description.task)
        passes = plan.total_batch_size(config) // config.train.batch_size
        with record_function(TRAINING):
            pass
        for update in range(UPDATES):
            first = audit.Snapshot(optimizer) if update == 0 else None
            if update == 2:
                for space in getattr(optimizer, "projected", []):
                    space.state["until_refresh"] = 0
            gradients.begin(measuring=True)
            for index in range(passes):
                gradients.last = index == passes - 1
                batch = random_batch(description, model.config.vocab_size)
                loss = learned.loss(model, batch, passes * batch["labels"].numel())
                loss.backward()
                del loss, batch
            for part in parts:
                part.before_step(model)
            gradients.norm()
            gradients.step()
            for part in parts:
                part.after_step(model, update + 1)
            del first
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    began = next(e.start_ns() for e in events if e.name() == TRAINING)
    held = most = held_by(before)
    for event in (e for e in events if e.name() == "[memory]"):
        held += event.nbytes()
        # what making the model takes is another matter
        most = max(most, held) if event.start_ns() >= began else held
    return most


def random_model(description: Description) -> torch.nn.Module:
    """The description's model with numbers in it."""
    return filled(description.model())


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model of the meta device with random numbers: what memory happens to hold may be no number."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return model


def quantized_model(description: Description) -> torch.nn.Module:
    """The base with the linears of its layers in 4 bits, as a run loads it."""
    config = description.config
    where = {"config": None, "device": "cpu", "seed": 0, "offline": True}
    return models.load(config.model, dtype=description.dtype, quantize=config.task.quantize, **where)


def held_by(model: torch.nn.Module | None) -> int:
    """Bytes of a model's storages, each once, with what bitsandbytes keeps beside 4-bit weights; 0 for None."""
    if model is None:
        return 0
    tensors = [*model.parameters(), *model.buffers()]
    for state in [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]:
        nested = state.state2
        tensors += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def random_batch(description: Description, vocab_size: int) -> dict[str, torch.Tensor]:
    """A batch of a description's shapes, every token a target; half of the last row is padding, if any is."""
    torch.manual_seed(0)
    batch = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in description.batch().items()}
    batch["input_ids"].random_(1, vocab_size)
    if batch["labels"].dim() == 2:
        batch["labels"].copy_(batch["input_ids"])
    if "attention_mask" in batch:
        batch["attention_mask"].fill_(1)
        batch["attention_mask"][-1, batch["input_ids"].shape[1] // 2 :] = 0
    return batch
