"""`cm3 generate`: a picture from a caption, or a caption from a picture."""

import argparse
from pathlib import Path

import numpy as np

from cm3jax.commands import HelpFormatter
from cm3jax.files import write_atomic
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.text_image import TextImageModel
from cm3jax.tokens.image import decode_image, encode_png, fit

EPILOG = """examples:
  cm3 generate --workdir runs/quickstart/decoder --prompt "one red dog on the grass at night" --out dog.png
  cm3 generate --workdir runs/quickstart/decoder --image dog.png --caption
"""


def main(argv: list[str]) -> int:
    """`cm3 generate`; `argv` without the command's own name."""
    parser = argparse.ArgumentParser("cm3 generate", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="an lm run")
    parser.add_argument("--step", type=int, help="checkpoint; the newest if not given")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="caption to draw; needs --out")
    what.add_argument("--image", type=Path, help="picture to describe; needs --caption")
    parser.add_argument("--out", type=Path, help="PNG file to write")
    parser.add_argument("--caption", action="store_true", help="print a caption of --image")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance weight; 1 is none")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=0.9, help="share of the probability that is sampled from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if (options.prompt is not None) != (options.out is not None) or (options.image is not None) != options.caption:
        parser.error("give --prompt with --out, or --image with --caption")
    sampling = SamplingConfig(options.temperature, top_p=options.top_p)
    model = TextImageModel.load(options.workdir, options.step)
    if options.prompt is not None:
        picture = model.images([options.prompt], sampling, options.guidance, [options.seed])[0]
        write_atomic(options.out, encode_png(picture))
        print(options.out)
        return 0
    pixels = fit(_read(options.image), model.image_tokenizer.config.resolution)
    codes = model.image_tokenizer.encode(pixels[None])
    print(model.captions(codes, sampling, [options.seed])[0])
    return 0


def _read(path: Path) -> np.ndarray:
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
