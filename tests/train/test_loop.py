"""What the loop promises: exact accumulation, exact counts, evaluation over tokens, and an end when numbers break."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.errors import UsageError
from lowrank_cli.optim import schedule


def metrics(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "model", "model.safetensors"))


def test_activation_checkpointing_changes_nothing(lowrank, tiny_flags):
    for out, flag in (("plain", "--no-activation-checkpointing"), ("recomputed", "--activation-checkpointing")):
        code, _, err = lowrank(f"pretrain --max-steps 5 {flag} --out {out}", *tiny_flags)
        assert code == 0, err
    plain, recomputed = weights("plain"), weights("recomputed")
    assert all(plain[key].equal(recomputed[key]) for key in plain)


def test_perplexity_is_the_mean_over_tokens(lowrank, tiny_flags, news):
    # documents of different lengths, padded: an average of batch averages is another number
    line = "pretrain --packing padded --max-steps 3 --out run --json"
    code, out, err = lowrank(line, *tiny_flags, "--eval-tokens", 700)
    assert code == 0, err
    result = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained("run/model").double().eval()
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    held_out = [json.loads(line)["text"] for i, line in enumerate(news.read_text().splitlines()) if i % 20 == 1]
    total = count = 0
    with torch.no_grad():
        for text in held_out:
            ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt").input_ids
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            for loss in losses.tolist():
                if count < result["validation_tokens"]:
                    total, count = total + loss, count + 1
    assert count == result["validation_tokens"]
    assert result["validation_loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["validation_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_length_in_tokens_and_epochs_is_exact(lowrank, tiny_flags):
    code, out, err = lowrank("pretrain --max-train-tokens 2.5K --json --out tokens", *tiny_flags)
    assert code == 0, err
    # 256 tokens an update: the tenth passes 2,500
    assert json.loads(out)["steps"] == 10
    code, out, err = lowrank("pretrain --epochs 0.1 --json --out epochs", *tiny_flags)
    assert code == 0, err
    assert json.loads(out)["steps"] == metrics("epochs")[-1]["step"] > 1


def test_bfloat16_weights_with_float32_moments(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --method galore --dtype bfloat16 --max-steps 8 --out run", *tiny_flags)
    assert code == 0, err
    state = load_file("run/checkpoints/step-000008/optimizer.safetensors")
    assert {t.dtype for k, t in state.items() if k.endswith("exp_avg")} == {torch.float32}
    assert {t.dtype for t in weights("run").values()} == {torch.bfloat16}
    losses = [m["loss"] for m in metrics("run") if "loss" in m]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["full", "galore"])
def test_bfloat16_at_a_rate_that_rounds_away_trains_on_and_says_so(method, lowrank, tiny_flags):
    line = f"pretrain --method {method} --dtype bfloat16 --max-steps 4 --warmup-steps 4 --lr 4e-4 --out run"
    code, _, err = lowrank(line, *tiny_flags)
    assert code == 0, err
    assert "tensors did not change in the first update" in err
    state = load_file("run/checkpoints/step-000004/optimizer.safetensors")
    assert {t.dtype for k, t in state.items() if "exp_avg" in k} == {torch.float32}


def test_clipping_bounds_the_gradient_that_is_used(lowrank, tiny_flags, monkeypatch):
    used = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        used.append(float(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    code, _, err = lowrank("pretrain --max-steps 4 --grad-clipping 0.1 --out run", *tiny_flags)
    assert code == 0, err
    assert max(used) <= 0.1 * (1 + 1e-5)
    assert metrics("run")[1]["grad_norm"] > 0.1


@pytest.mark.parametrize("when", [1, 6])
def test_a_loss_that_is_not_finite_stops_the_run(when, lowrank, tiny_flags, monkeypatch):
    from lowrank_cli.train import objective

    calls = iter(range(1, 99))
    original = objective.causal_lm_loss

    def broken(model, batch, targets):
        if next(calls) == when:
            model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("inf")
        return original(model, batch, targets)

    monkeypatch.setattr(objective, "causal_lm_loss", broken)
    code, _, err = lowrank("pretrain --max-steps 9 --out run", *tiny_flags, "--save-every", 4)
    assert code == 1
    assert f"the loss is nan at step {when}" in err
    assert "the weight model.layers.1.mlp.up_proj.weight" in err
    assert ("run/checkpoints/step-000004 is good" in err) == (when == 6)
    record = json.loads(Path("run/run.json").read_text())
    assert record["status"] == "failed"
    assert record["exit_code"] == 1
    assert not Path("run/model").exists()


def test_a_tensor_that_does_not_train_is_found_after_the_first_update(lowrank, tiny_flags, monkeypatch):
    original = torch.optim.AdamW.step

    def forgetful(self, *args, **kwargs):
        p = self.param_groups[0]["params"][3]
        before = p.detach().clone()
        result = original(self, *args, **kwargs)
        p.data.copy_(before)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", forgetful)
    code, _, err = lowrank("pretrain --max-steps 9 --out run", *tiny_flags)
    assert code == 1
    assert "model.layers.0.self_attn.v_proj.weight has a gradient but did not change in the first update" in err


def test_finished_model_loads_and_writes_text(lowrank, tiny_flags):
    code, out, err = lowrank("pretrain --method galore --max-steps 5 --json --out run", *tiny_flags)
    assert code == 0, err
    model, tokenizer = AutoModelForCausalLM.from_pretrained("run/model"), AutoTokenizer.from_pretrained("run/model")
    ids = tokenizer("The", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    assert model.config.use_cache
    assert json.loads(out)["sample"]
    checkpoint = AutoModelForCausalLM.from_pretrained("run/checkpoints/step-000005")
    for p, q in zip(model.parameters(), checkpoint.parameters(), strict=True):
        assert torch.equal(p, q)


def test_config_yaml_repeats_the_run(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --method galore --max-steps 6 --out first", *tiny_flags)
    assert code == 0, err
    code, _, err = lowrank("pretrain --config first/config.yaml --out second")
    assert code == 0, err
    first, second = weights("first"), weights("second")
    assert all(first[k].equal(second[k]) for k in first)


def test_other_seeds_give_other_runs(lowrank, tiny_flags):
    for seed in (0, 1):
        assert lowrank(f"pretrain --max-steps 2 --seed {seed} --out s{seed}", *tiny_flags)[0] == 0
    a, b = (weights(out)["lm_head.weight"] for out in ("s0", "s1"))
    assert float((a - b).norm() / b.norm()) > 0.1


def test_tensorboard_log(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --max-steps 3 --log tensorboard --out run", *tiny_flags)
    assert code == 0, err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run/tensorboard")
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert events.Scalars("loss")[2].value == pytest.approx(
        [m["loss"] for m in metrics("run") if "loss" in m][2], rel=1e-6
    )


def test_plots_are_written(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 3 --out run", *tiny_flags, "--plots")[0] == 0
    names = {p.name for p in Path("run/plots").iterdir()}
    assert names == {"loss.png", "perplexity.png", "learning_rate.png", "throughput.png", "memory.png"}
    assert all(p.stat().st_size > 5000 for p in Path("run/plots").iterdir())


def test_continues_a_published_model_from_its_published_loss(lowrank, published_data):
    stories = published_data / "models" / "stories260K"
    start, end = continued(lowrank, stories, (stories / "tinystories_sample.txt").read_text(encoding="utf-8"))
    # the value in the README of the data: each story from <s>, its first 512 tokens
    assert start == pytest.approx(1.2664, abs=5e-4)
    assert end < start


def test_continues_a_model_from_the_loss_that_it_has(lowrank, stories):
    text = (stories / "sample.txt").read_text(encoding="utf-8")
    start, end = continued(lowrank, stories, text.replace("\n\n", "<|endoftext|>"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories).double(), AutoTokenizer.from_pretrained(stories)
    total = count = 0
    for story in filter(None, text.strip().split("\n\n")):
        ids = torch.tensor([tokenizer(story).input_ids[:512]])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert start == pytest.approx(total / count, rel=1e-4)
    assert end < start


def continued(lowrank, model: Path, text: str) -> tuple[float, float]:
    """Return the losses on stories before and after three updates on them."""
    texts = [t.strip() for t in text.split("<|endoftext|>")]
    Path("stories.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts if t))
    line = "pretrain --method galore --dataset stories.jsonl --validation-dataset stories.jsonl --packing padded"
    line += " --max-length 512 --max-steps 3 --batch-size 2 --lr 1e-4 --json --out run --continue-from"
    code, out, err = lowrank(line, model)
    assert code == 0, err
    start = metrics("run")[0]
    assert start["step"] == 0
    return start["eval_loss"], json.loads(out)["validation_loss"]


class TestSchedule:
    @pytest.mark.parametrize("name", ["linear", "cosine", "cosine_restarts"])
    def test_rises_to_the_peak_and_falls_to_the_floor(self, name):
        factor = schedule.build(name, warmup_steps=10, total_steps=100, min_lr_ratio=0.1, num_cycles=3)
        assert factor(1) == pytest.approx(0.1)
        assert factor(10) == pytest.approx(1.0)
        assert factor(11) == pytest.approx(1.0)
        assert factor(101) == pytest.approx(0.1)
        assert all(0 < factor(s) <= 1 for s in range(1, 102))

    @pytest.mark.parametrize("name", ["linear", "cosine", "cosine_restarts", "constant"])
    @pytest.mark.parametrize("steps", [1, 2, 17])
    def test_no_update_is_wasted_at_a_rate_of_zero(self, name, steps):
        factor = schedule.build(name, warmup_steps=0, total_steps=steps, min_lr_ratio=0.0, num_cycles=1)
        assert factor(1) == 1
        assert all(factor(s) > 0 for s in range(1, steps + 1))

    @pytest.mark.parametrize("warmup", [0, 7])
    def test_formulas_are_those_of_transformers(self, warmup):
        from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = {
            "linear": get_linear_schedule_with_warmup(unused, warmup, 50).lr_lambdas[0],
            "cosine": get_cosine_with_min_lr_schedule_with_warmup(unused, warmup, 50, min_lr_rate=0.1).lr_lambdas[0],
        }
        for name, floor in (("linear", 0.0), ("cosine", 0.1)):
            ours = schedule.build(name, warmup_steps=warmup, total_steps=50, min_lr_ratio=floor, num_cycles=1)
            for step in range(1, 51):
                # theirs counts the updates before this one; while the rate rises, ours counts this one too
                counted = step if step <= warmup else step - 1
                assert ours(step) == pytest.approx(theirs[name](counted), rel=1e-12, abs=1e-15)

    def test_cosine_is_the_papers(self):
        factor = schedule.build("cosine", warmup_steps=10, total_steps=110, min_lr_ratio=0.1, num_cycles=1)
        for done in range(10, 110):
            expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (done - 10) / 100))
            assert factor(done + 1) == pytest.approx(expected, rel=1e-12)

    def test_restarts_go_back_to_the_peak(self):
        factor = schedule.build("cosine_restarts", warmup_steps=0, total_steps=90, min_lr_ratio=0.0, num_cycles=3)
        assert [factor(31), factor(61)] == pytest.approx([1.0, 1.0])
        assert factor(30) < 0.01

    def test_no_warmup_starts_at_the_peak(self):
        for name in ("linear", "constant", "cosine_restarts"):
            assert schedule.build(name, warmup_steps=0, total_steps=9, min_lr_ratio=0.1, num_cycles=1)(1) > 0.8


def test_a_length_given_twice_is_an_error():
    from lowrank_cli import config
    from lowrank_cli.train import plan

    resolved = config.resolve("pretrain", {"max_steps": 3, "epochs": 1}, {})
    with pytest.raises(UsageError, match="the length is given twice: --max-steps and --epochs"):
        plan.make(resolved, 10)


@pytest.mark.parametrize("method", ["full", "galore", "galore+velora"])
def test_what_is_outside_the_layers_linears_may_have_a_rate_of_its_own(method, lowrank, tiny_flags):
    starts = {}
    for rate in ("", "--lr-other 0.003"):
        code, _, err = lowrank(
            f"pretrain --method {method} --lr 0.03 {rate} --max-steps 1 --out run{len(starts)}", *tiny_flags
        )
        assert code == 0, err
        starts[rate] = load_file(f"run{len(starts)}/model/model.safetensors")
    one, two = starts.values()
    same = {name for name in one if one[name].equal(two[name])}
    # after one update that which has its rate ends where it did, and the rest a tenth as far from where it began
    inside = {name for name in one if name.endswith("_proj.weight")}
    assert same == inside
