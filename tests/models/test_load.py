"""Weights: drawn from a seed, or from folders, runs and the hub's cache; devices, dtypes, and the errors."""

import json
import time

import pytest
import torch

from lowrank_cli.errors import LowrankError, MissingError, UsageError
from lowrank_cli.models import load as loading
from lowrank_cli.models.load import (
    build_config,
    check_vocabulary,
    config_of,
    device_of,
    dtype_of,
    load,
    meta,
    tokenizer_of,
)
from lowrank_cli.settings.training import ModelConfig

TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    path.write_text(json.dumps({"model_type": "llama", **sizes}))
    return build_config(ModelConfig(model_config=str(path)), **TOKENS, max_length=32)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """`runs/latest` is looked for in the working folder; the hub's cache is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def draw(config, seed=0, dtype=torch.float32, model=ModelConfig()):  # noqa: B008
    return load(model, config=config, dtype=dtype, device="cpu", seed=seed, offline=True)


def read(dtype=torch.float32, **model):
    return load(ModelConfig(**model), config=None, dtype=dtype, device="cpu", seed=0, offline=True)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def a_run(folder, config, *, model=None, steps=()):
    """A run folder with weights of these seeds."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    if model is not None:
        draw(config, model).save_pretrained(folder / "model")
    for step in steps:
        draw(config, step).save_pretrained(folder / f"checkpoints/step-{step:06d}")
    return folder


def test_same_seed_same_weights_and_the_callers_random_state_is_kept(config):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = draw(config, 3)
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(first, draw(config, 3))
    assert not same_weights(first, draw(config, 4))


def test_bfloat16_weights_are_the_float32_ones_rounded(config):
    full, half = draw(config), draw(config, dtype=torch.bfloat16)
    for a, b in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert half.config.dtype == torch.bfloat16
    # rotary frequencies stay exact
    assert {name: buffer.dtype for name, buffer in half.named_buffers()} == {
        name: buffer.dtype for name, buffer in full.named_buffers()
    }


def test_tied_embeddings_stay_tied_in_bfloat16(config):
    config.tie_word_embeddings = True
    model = draw(config, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ready_to_train(config):
    model = draw(config)
    assert model.training
    assert not model.config.use_cache
    assert model.config._attn_implementation == "sdpa"
    assert not model.model.layers[0].gradient_checkpointing
    recomputing = draw(config, model=ModelConfig(activation_checkpointing=True))
    assert all(layer.gradient_checkpointing for layer in recomputing.model.layers)


def test_folder(config, tmp_path):
    draw(config, 5).save_pretrained(tmp_path / "hf")
    for model in (read(name=str(tmp_path / "hf")), read(continue_from=str(tmp_path / "hf"))):
        assert same_weights(model, draw(config, 5))
        assert model.training
        assert not model.config.use_cache
        assert model.config._attn_implementation == "sdpa"
    half = read(torch.bfloat16, name=str(tmp_path / "hf"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_run_folder_is_its_model_or_its_newest_checkpoint(config, tmp_path):
    run = a_run(tmp_path / "runs/a", config, model=1, steps=(2,))
    assert same_weights(read(name=str(run)), draw(config, 1))
    run = a_run(tmp_path / "runs/b", config, steps=(90, 100, 1000000))
    (run / "checkpoints/step-2000000.tmp").mkdir()
    assert same_weights(read(name=str(run)), draw(config, 1000000))
    assert same_weights(read(name=str(run / "checkpoints/step-000090")), draw(config, 90))


def test_without_a_name_it_is_the_newest_run(config, tmp_path):
    a_run(tmp_path / "work/runs/a", config, model=1)
    (tmp_path / "work/runs/latest").symlink_to("a")
    assert same_weights(read(), draw(config, 1))
    assert same_weights(read(name="runs/latest"), draw(config, 1))


def test_config_of_reads_no_weights(config, tmp_path):
    run = a_run(tmp_path / "runs/a", config, model=1)
    (run / "model/model.safetensors").unlink()
    assert config_of(ModelConfig(name=str(run)), offline=True).hidden_size == 16


def test_tokenizer_of(config, tmp_path):
    run = a_run(tmp_path / "runs/a", config, model=1)
    assert tokenizer_of(ModelConfig(name=str(run))) is None
    (run / "model/tokenizer.json").write_text("{}")
    assert tokenizer_of(ModelConfig(name=str(run))) == str(run / "model")
    assert tokenizer_of(ModelConfig(continue_from=str(run))) == str(run / "model")
    assert tokenizer_of(ModelConfig(name="llama-9m")) is None
    assert tokenizer_of(ModelConfig(model_config="x.json")) is None
    assert tokenizer_of(ModelConfig()) is None
    assert tokenizer_of(ModelConfig(name="org/model")) == "org/model"


def errors(tmp_path, config):
    """Each way to ask for a model that is not there: kind, message, hint, and the setting."""
    (tmp_path / "file.bin").write_text("")
    (tmp_path / "empty").mkdir()
    a_run(tmp_path / "runs/new", config)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    return {
        "file": (
            UsageError,
            "file.bin is a file",
            "give a .gguf file, or the folder",
            {"name": str(tmp_path / "file.bin")},
        ),
        "empty": (UsageError, "empty holds no model", "Hugging Face folder", {"name": str(tmp_path / "empty")}),
        "adapter": (
            UsageError,
            "has no base_model_name_or_path",
            "base_model_name_or_path",
            {"name": str(tmp_path / "adapter")},
        ),
        "new run": (MissingError, "no model and no checkpoint yet", "wait", {"name": str(tmp_path / "runs/new")}),
        "no folder": (MissingError, "no folder ./nope", "runs/latest", {"name": "./nope"}),
        "no run": (MissingError, "no folder runs/nope", "runs/latest", {"continue_from": "runs/nope"}),
        "bad id": (MissingError, "no folder a b", "hub id", {"name": "a b"}),
        "deep path": (MissingError, "no folder a/b/c", "hub id", {"name": "a/b/c"}),
        "nothing": (MissingError, "no model given", "lowrank pretrain --method galore", {}),
        "preset": (UsageError, "a shape without weights", "lowrank pretrain --model llama-9m", {"name": "llama-9m"}),
        "typo": (UsageError, "no folder and no preset 'lama-9m'", "did you mean 'llama-9m'?", {"name": "lama-9m"}),
        "both": (UsageError, "both name a model", "leave one", {"name": "a", "continue_from": "b"}),
        "offline": (MissingError, "not in the cache", "hf download org/model", {"name": "org/model"}),
        "like a preset": (MissingError, "not in the cache", "hf download", {"name": "org/llama-7b"}),
    }


def test_errors_of_places(config, tmp_path):
    for kind, message, hint, model in errors(tmp_path, config).values():
        with pytest.raises(kind) as error:
            read(**model)
        assert type(error.value) is kind
        assert message in error.value.message
        assert hint in error.value.hint


def test_offline_asks_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a request was made")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(MissingError):
        read(name="org/model")


def test_hub_model_in_the_cache_loads_offline(config, tmp_path):
    repo = tmp_path / "cache/models--org--model"
    draw(config, 5).save_pretrained(repo / "snapshots/abc")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    assert same_weights(read(name="org/model"), draw(config, 5))


def test_hub_that_does_not_answer(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(MissingError) as error:
        load(ModelConfig(name="org/model"), config=None, dtype=torch.float32, device="cpu", seed=0, offline=False)
    assert error.value.message == (
        "org/model is no folder here, and the hub did not give it: We couldn't connect to the hub"
    )
    assert "hf download org/model" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "lacks 9 of the tensors of a llama model, such as model.layers.2."),
        ({"vocab_size": 41}, "has another shape for 2 of the tensors of a llama model, such as lm_head.weight"),
        ({"model_type": "lama"}, "is not a causal language model that Transformers can load"),
        ({"model_type": "t5"}, "is an encoder-decoder (t5), which no command of lowrank supports"),
        ({"hidden_size": "x"}, "is not a causal language model that Transformers can load"),
    ],
)
def test_weights_that_do_not_fit_their_configuration(config, tmp_path, changes, message, capfd):
    draw(config).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    capfd.readouterr()
    with pytest.raises(UsageError) as error:
        read(name=str(tmp_path / "hf"))
    assert message in error.value.message
    assert "\n" not in error.value.message
    assert capfd.readouterr().err == ""


def test_damaged_and_missing_weights(config, tmp_path):
    draw(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").write_bytes(b"garbage")
    with pytest.raises(LowrankError, match="model.safetensors is damaged: "):
        read(name=str(tmp_path / "hf"))
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"hf does not load: .*no file named model\.safetensors"):
        read(name=str(tmp_path / "hf"))
    (tmp_path / "hf/config.json").write_text("{,}")
    with pytest.raises(UsageError, match="config.json: not JSON"):
        read(name=str(tmp_path / "hf"))


def test_configuration_and_weights_are_a_programmers_mistake(config):
    with pytest.raises(ValueError, match="weights to continue from: x"):
        draw(config, model=ModelConfig(continue_from="x"))


def test_vocabulary_of_another_tokenizer(config):
    model = meta(config)
    check_vocabulary(model, range(40))
    for entries in (41, 32):
        with pytest.raises(UsageError) as error:
            check_vocabulary(model, range(entries))
        assert error.value.message == f"the model has a vocabulary of 40 and the tokenizer one of {entries}"
        assert "--tokenizer" in error.value.hint


def test_vocabulary_rounded_up_as_in_published_checkpoints(config):
    config.vocab_size = 151_936  # Qwen2, whose tokenizer has 151,665
    check_vocabulary(meta(config), range(151_665))


def test_meta_7b_is_quick_and_empty():
    config = build_config(ModelConfig(name="llama-7b"), **(TOKENS | {"vocab_size": 32000}), max_length=2048)
    start = time.perf_counter()
    model = meta(config, torch.bfloat16)
    assert time.perf_counter() - start < 3
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_dtype_of(monkeypatch):
    assert dtype_of("auto", "cpu") == torch.float32
    assert dtype_of("float32", "cuda:0") == torch.float32
    assert dtype_of("bfloat16", "cpu") == torch.bfloat16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        assert dtype_of("auto", torch.device("cuda:1")) == dtype
    with pytest.raises(UsageError, match="unknown dtype 'float23' in --dtype"):
        dtype_of("float23", "cpu")


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_device_of(monkeypatch):
    gpus(monkeypatch, 0)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    gpus(monkeypatch, 2)
    assert device_of("auto") == torch.device("cuda")
    assert device_of("cuda:1") == torch.device("cuda:1")
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "message", "hint"),
    [
        (0, "cuda", "there is no device cuda on this machine", "here: cpu, no GPU that PyTorch"),
        (2, "cuda:2", "there is no device cuda:2 on this machine", "here: cpu, cuda:0, cuda:1; --device auto"),
        (2, "gpu", "--device is 'gpu'", "it takes auto, cpu, cuda or cuda:1"),
        (2, "meta", "--device is 'meta'", "it takes auto, cpu, cuda or cuda:1"),
        (2, "cuda:x", "--device is 'cuda:x'", "it takes auto, cpu, cuda or cuda:1"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, count, name, message, hint):
    gpus(monkeypatch, count)
    with pytest.raises(UsageError) as error:
        device_of(name)
    assert error.value.message == message
    assert hint in error.value.hint
