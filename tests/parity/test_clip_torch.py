"""CLIP against transformers' CLIPModel: the same random weights, from files of both families' names."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cm3jax.models.clip import DEVIATION, MEAN, with_params
from cm3jax.models.clip_config import PRESETS, CLIPConfig, TowerConfig
from cm3jax.models.clip_weights import load_clip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest magnitude in the array; fp32 on both sides

TINY = CLIPConfig(
    8, TowerConfig(16, 2, 4), TowerConfig(24, 3, 2), image_size=32, patch_size=16, vocab_size=40, context=10, end_id=39
)


def their_model(config: CLIPConfig):
    """Random weights, every one of them (norms and biases, too) unlike its neighbours."""
    torch.manual_seed(0)

    def tower(of):
        heads = {"num_attention_heads": of.n_heads, "num_hidden_layers": of.n_layers}
        return {"hidden_size": of.d_model, "intermediate_size": 4 * of.d_model, **heads}

    text = {"vocab_size": config.vocab_size, "max_position_embeddings": config.context, "eos_token_id": config.end_id}
    image = {"image_size": config.image_size, "patch_size": config.patch_size}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=tower(config.text) | text,
            vision_config=tower(config.image) | image,
            projection_dim=config.embed_dim,
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def arrays(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def openai_arrays(theirs):
    """The same weights by OpenAI's names."""
    renamed = {}
    for encoder, prefix in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        count = 1 + max(int(n.split(".")[3]) for n in theirs if n.startswith(f"{encoder}.encoder.layers"))
        for i in range(count):
            old, new = f"{encoder}.encoder.layers.{i}", f"{prefix}.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [theirs[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{new}.attn.in_proj_{kind}"] = np.concatenate(parts)
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                ):
                    renamed[f"{new}.{b}.{kind}"] = theirs[f"{old}.{a}.{kind}"]
    for kind in ("weight", "bias"):
        renamed[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = theirs[f"vision_model.post_layernorm.{kind}"]
        renamed[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
    return renamed | {
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T,
        "logit_scale": theirs["logit_scale"],
        "input_resolution": np.array(32),
    }


def assert_features_agree(config, model, params):
    ours = with_params(config, params)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, config.image_size, config.image_size, 3)).astype(np.float32)
    rows = rng.integers(1, config.end_id, (3, config.context)).astype(np.int32)
    for row, length in zip(rows, (2, 5, config.context), strict=True):
        row[length - 1] = config.end_id
    pixels = torch.tensor(((images + 1) / 2 - MEAN) / DEVIATION).permute(0, 3, 1, 2)
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output).numpy()
        read = model.text_projection(model.text_model(torch.tensor(rows, dtype=torch.long)).pooler_output).numpy()
    for found, expected in ((ours.encode_images(jnp.asarray(images)), seen), (ours.encode_texts(rows), read)):
        assert np.std(expected, axis=0).min() > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    assert float(ours.logit_scale[...]) == pytest.approx(model.logit_scale.item())


@pytest.fixture(scope="module")
def tiny():
    return their_model(TINY)


@pytest.mark.parametrize("family", ["openai", "hugging_face"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_features_of_a_tiny_encoder_are_theirs(tiny, tmp_path, family, suffix):
    theirs = arrays(tiny)
    named = theirs if family == "hugging_face" else openai_arrays(theirs)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({name: torch.tensor(array) for name, array in named.items()}, path)
    else:
        save_file({name: np.array(array, order="C") for name, array in named.items()}, path)
    assert_features_agree(TINY, tiny, load_clip(path, TINY))


@pytest.mark.slow
def test_features_of_vit_b_32_are_theirs(tmp_path):
    model = their_model(PRESETS["vit-b-32"])
    save_file(arrays(model), tmp_path / "weights.safetensors")
    assert_features_agree(PRESETS["vit-b-32"], model, load_clip(tmp_path / "weights.safetensors", PRESETS["vit-b-32"]))


def test_files_that_do_not_fit_are_refused_by_name(tiny, tmp_path):
    theirs, path = arrays(tiny), tmp_path / "weights.safetensors"

    def refused(changed, message):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_clip(path, TINY)

    refused({n: a for n, a in theirs.items() if n != "logit_scale"}, "no array 'logit_scale'")
    refused(
        theirs | {"visual_projection.weight": np.zeros((8, 15), np.float32)}, r"has shape \(8, 15\), expected \(8, 16\)"
    )
    refused(theirs | {"more.weight": np.zeros(1, np.float32)}, "1 arrays have no place in this encoder.*'more.weight'")
    refused({"other": np.zeros(1, np.float32)}, "neither 'visual.conv1.weight'")
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_clip(path, TINY)
    torch.save({"evil": print}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a state dict that can be read without running code"):
        load_clip(tmp_path / "weights.pt", TINY)
    with pytest.raises(FileNotFoundError, match="CLIP weights: no file"):
        load_clip(tmp_path / "none.pt", TINY)
