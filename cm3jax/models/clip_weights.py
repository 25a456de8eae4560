"""Weights of CLIP from files of OpenAI's or of Hugging Face's names, as the parameters of `models.clip.CLIP`.

A `.safetensors` file, or a PyTorch file of a state dict, which is read with `weights_only`: no code in it is run.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cm3jax.models.clip_config import CLIPConfig, TowerConfig

# take(name, shape): the array of that name, checked.
Take = Callable[[str, tuple[int, ...]], np.ndarray]

# Buffers and sizes that files hold beside the weights.
_BESIDE = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclasses.dataclass(frozen=True)
class _Names:
    """How a family names its arrays; `sign` is one that the other family does not have.

    Attributes:
      image, text: the names of the parts of each encoder; `layers` takes the layer's number.
      layer: the names within a layer.
      joint: queries, keys and values in one array; then the projections are stored [in, out], too.
    """

    sign: str
    image: dict[str, str]
    text: dict[str, str]
    layer: dict[str, str]
    joint: bool


_OPENAI = _Names(
    sign="visual.conv1.weight",
    image={
        "patches": "visual.conv1.weight",
        "class_token": "visual.class_embedding",
        "position_table": "visual.positional_embedding",
        "pre_norm": "visual.ln_pre",
        "layers": "visual.transformer.resblocks.{}.",
        "norm": "visual.ln_post",
        "projection": "visual.proj",
    },
    text={
        "embedding": "token_embedding.weight",
        "position_table": "positional_embedding",
        "layers": "transformer.resblocks.{}.",
        "norm": "ln_final",
        "projection": "text_projection",
    },
    layer={
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "out": "attn.out_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    joint=True,
)
_HUGGING_FACE = _Names(
    sign="vision_model.pre_layrnorm.weight",
    image={
        "patches": "vision_model.embeddings.patch_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "position_table": "vision_model.embeddings.position_embedding.weight",
        "pre_norm": "vision_model.pre_layrnorm",
        "layers": "vision_model.encoder.layers.{}.",
        "norm": "vision_model.post_layernorm",
        "projection": "visual_projection.weight",
    },
    text={
        "embedding": "text_model.embeddings.token_embedding.weight",
        "position_table": "text_model.embeddings.position_embedding.weight",
        "layers": "text_model.encoder.layers.{}.",
        "norm": "text_model.final_layer_norm",
        "projection": "text_projection.weight",
    },
    layer={
        "attention_norm": "layer_norm1",
        "mlp_norm": "layer_norm2",
        "out": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    joint=False,
)


def load_clip(path: str | pathlib.Path, config: CLIPConfig) -> dict[str, Any]:
    """The parameters, float32, of a file whose names tell which of the two families it is.

    Raises:
      FileNotFoundError: no such file.
      ValueError: unreadable, of neither family, or an array missing, of another shape or left over; names file, key.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"CLIP weights: no file {path}")
    tensors = _read(path)
    names = next((names for names in (_OPENAI, _HUGGING_FACE) if names.sign in tensors), None)
    if names is None:
        raise ValueError(f"{path}: neither {_OPENAI.sign!r} (OpenAI) nor {_HUGGING_FACE.sign!r} (Hugging Face)")
    left = {name for name in tensors if not name.endswith(_BESIDE)}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path}: no array {name!r}")
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {tensors[name].shape}, expected {shape}")
        left.discard(name)
        return tensors[name].astype(np.float32)

    params = {
        "image": _image(take, names, config),
        "text": _text(take, names, config),
        "logit_scale": take("logit_scale", ()),
    }
    if left:
        raise ValueError(f"{path}: {len(left)} arrays have no place in this encoder, the first is {min(left)!r}")
    return params


def _read(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        import torch  # only to read PyTorch's own files
    except ModuleNotFoundError:
        raise ValueError(f"{path}: a PyTorch file needs the extra [convert]; or give .safetensors") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # a stranger's bytes: the reader raises many types
        raise ValueError(f"{path}: not a state dict that can be read without running code ({error})") from error


def _image(take: Take, names: _Names, config: CLIPConfig) -> dict[str, Any]:
    width, side, named = config.image.d_model, config.patch_size, names.image
    return {
        "patches": take(named["patches"], (width, 3, side, side)).transpose(2, 3, 1, 0),
        "class_token": take(named["class_token"], (width,)),
        "position_table": take(named["position_table"], (config.patches + 1, width)),
        "pre_norm": _norm(take, named["pre_norm"], width),
        **_tower(take, names, named, config.image, config.embed_dim),
    }


def _text(take: Take, names: _Names, config: CLIPConfig) -> dict[str, Any]:
    width, named = config.text.d_model, names.text
    return {
        "embedding": take(named["embedding"], (config.vocab_size, width)),
        "position_table": take(named["position_table"], (config.context, width)),
        **_tower(take, names, named, config.text, config.embed_dim),
    }


def _tower(take: Take, names: _Names, named: dict[str, str], tower: TowerConfig, embed_dim: int) -> dict[str, Any]:
    """What both encoders have: layers, the norm after them, and the projection."""
    width = tower.d_model
    layers = [_layer(take, names, tower, named["layers"].format(i)) for i in range(tower.n_layers)]
    stored = (width, embed_dim) if names.joint else (embed_dim, width)
    projection = take(named["projection"], stored)
    return {
        "layers": jax.tree.map(lambda *arrays: np.stack(arrays), *layers),
        "norm": _norm(take, named["norm"], width),
        "projection": projection if names.joint else projection.T,
    }


def _layer(take: Take, names: _Names, tower: TowerConfig, prefix: str) -> dict[str, Any]:
    width, heads = tower.d_model, tower.n_heads
    by_head = (heads, width // heads)
    if names.joint:
        weights = np.split(take(f"{prefix}attn.in_proj_weight", (3 * width, width)), 3)
        biases = np.split(take(f"{prefix}attn.in_proj_bias", (3 * width,)), 3)
    else:
        weights = [take(f"{prefix}self_attn.{part}_proj.weight", (width, width)) for part in "qkv"]
        biases = [take(f"{prefix}self_attn.{part}_proj.bias", (width,)) for part in "qkv"]
    layer: dict[str, Any] = {}
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        layer[name] = weight.T.reshape(width, *by_head)
        layer[f"{name}_bias"] = bias.reshape(by_head)
    for name, inputs, outputs in (("out", width, width), ("up", width, 4 * width), ("down", 4 * width, width)):
        layer[name] = take(f"{prefix}{names.layer[name]}.weight", (outputs, inputs)).T
        layer[f"{name}_bias"] = take(f"{prefix}{names.layer[name]}.bias", (outputs,))
    layer["out"] = layer["out"].reshape(*by_head, width)
    for name in ("attention_norm", "mlp_norm"):
        layer[name] = _norm(take, f"{prefix}{names.layer[name]}", width)
    return layer


def _norm(take: Take, name: str, width: int) -> dict[str, np.ndarray]:
    return {"scale": take(f"{name}.weight", (width,)), "bias": take(f"{name}.bias", (width,))}
