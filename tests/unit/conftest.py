"""A decoder of random weights with its tokenizers, as several tests of generation use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.commands.generate import main
from cm3jax.data.image_tokenizer import ImageTokenizer
from cm3jax.generate.generator import Generator
from cm3jax.generate.text_image import TextImageModel
from cm3jax.models.config import cm3leon
from cm3jax.models.transformer import Transformer
from cm3jax.models.vqgan import VQGAN, VQGANConfig
from cm3jax.tokens.image import encode_png
from cm3jax.tokens.text import train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_size=8, sentinels=4, size=320)
IMAGES = VQGANConfig(
    resolution=16,
    channels=8,
    channel_multipliers=(1, 2, 2),
    codes=8,
    res_blocks=1,
    attention_resolutions=(),
    z_channels=4,
    embed_dim=4,
    norm_groups=4,
)


def random_params(build):
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@pytest.fixture(scope="session")
def generator(tmp_path_factory) -> Generator:
    """Of random weights: images of 16 codes."""
    lines = ["a red dog on the grass"] * 9
    text = train_text_tokenizer(lines, 300, tmp_path_factory.mktemp("text") / "text.model")
    images = ImageTokenizer(IMAGES, random_params(lambda: VQGAN(IMAGES, nnx.Rngs(0))), "random", batch_size=2)
    config = cm3leon(16, 1, 2, VOCABULARY.size, 128)
    params = random_params(lambda: Transformer(config, nnx.Rngs(0)))
    return Generator(TextImageModel(config, params, VOCABULARY, text, images))


@pytest.fixture(scope="session")
def picture(generator):
    return generator.image(np.random.default_rng(3).integers(0, 255, (16, 16, 3)).astype(np.uint8))


@pytest.fixture
def cm3(generator, picture, monkeypatch, tmp_path):
    """Runs the command in a folder with a picture `dog.png` and its mask `tail.png`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextImageModel, "load", lambda run, step: generator.model)
    (tmp_path / "dog.png").write_bytes(encode_png(picture.pixels))
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[6:9] = 255
    (tmp_path / "tail.png").write_bytes(encode_png(mask))
    return lambda *words: main(["--workdir", "run", "--max-text", "5", *map(str, words)])
