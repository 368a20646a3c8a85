"""Answers of whole models, by id those of transformers' `generate`: 100 prompts of ten models."""

import dataclasses

import jax
import numpy as np
import pytest

from dialog.generator import Generator
from dialog.models.convert import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SEQ2SEQ = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "max_position_embeddings": 64,
}
MODELS = {
    "blenderbot": lambda: transformers.BlenderbotForConditionalGeneration(
        transformers.BlenderbotConfig(**SEQ2SEQ, scale_embedding=True)
    ),
    "blenderbot-small": lambda: transformers.BlenderbotSmallForConditionalGeneration(
        transformers.BlenderbotSmallConfig(**SEQ2SEQ, scale_embedding=True)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ)),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
        )
    ),
}
# What the checkpoints of each family say, by our names and by theirs; one token is the start's.
BLENDERBOT = {
    "num_beams": 10,
    "max_length": 60,
    "min_length": 20,
    "length_penalty": 0.65,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "forced_eos_token_id": 2,
}
CNN = {
    "num_beams": 4,
    "max_length": 30,
    "min_length": 11,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
}
CASES = [
    ("blenderbot", BLENDERBOT),
    ("blenderbot", {"max_length": 30}),
    ("blenderbot-small", BLENDERBOT),
    ("bart", CNN),
    ("bart", {"max_length": 30, "num_beams": 10}),
    ("llama", {"max_new_tokens": 30}),
    ("llama", {"max_new_tokens": 30, "num_beams": 10}),
]
NAMES = {
    "no_repeat_ngram_size": "no_repeat_ngram",
    "encoder_no_repeat_ngram_size": "encoder_no_repeat_ngram",
    "forced_bos_token_id": "forced_bos_id",
    "forced_eos_token_id": "forced_eos_id",
}


def ours_of(theirs, saved):
    """Our options, from theirs and what the checkpoint says."""
    lengths = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
    found = {NAMES.get(k, k): v for k, v in theirs.items() if k not in lengths}
    found |= {lengths[k]: v - 1 for k, v in theirs.items() if k in lengths}
    return dataclasses.replace(saved, **found)


def perturb(model, seed):
    """Random weights that make a few tokens likely, the end among them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("final_logits_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        elif tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), CASES)
def test_answers_are_the_same(family, options, tmp_path):
    model, rng, ends = MODELS[family]().eval(), np.random.default_rng(0), 0
    for seed in range(10):
        with torch.no_grad():
            perturb(model, seed)
        model.save_pretrained(tmp_path)
        found = load_pretrained(tmp_path)
        generator = Generator(found.family.model(found.config), jax.device_put(found.params))
        length = int(rng.integers(1, 40))
        prompts = rng.integers(3, 61, (10, length))
        mine = generator.generate(prompts.tolist(), ours_of(options, found.generation))
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            other = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
            )
        skipped = length if family == "llama" else 1
        for answer, row in zip(mine, other[:, skipped:].tolist(), strict=True):
            # A padding token is a token like others before the end.
            wanted = row[: row.index(2)] if 2 in row else row
            assert answer == wanted
            ends += 2 in row
    assert ends  # or the test would be easier than it looks
