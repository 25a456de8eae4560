"""Decoding speed: on CPUs against the Chameleon class of transformers, on a GPU against its memory's bandwidth.

On two CPU cores both sides have the same random weights in fp32 and the same greedy ids are demanded. The warm-up runs
our engine once and transformers once with each of its caches, static and dynamic; the faster of the two then alternates
with ours in one process. A ratio is the median over pairs of runs, its spread the lowest and the highest.

    python benchmarks/decode.py [--sizes tiny 100m] [--batches 1 16] [--repeats 3]
    python benchmarks/decode.py --gpu

Needs `pip install -e '.[convert]'` for transformers. Writes benchmarks/results/decode-DATE.json and .md (with `--gpu`
decode_gpu-DATE).
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from report import header, run_under_flags, table, write

from cm3jax.generate.engine import Engine, EngineConfig
from cm3jax.generate.guidance import Guidance, classifier_free
from cm3jax.generate.request import Request
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.models.config import PRESETS, TransformerConfig, chameleon
from cm3jax.models.transformer import Transformer
from cm3jax.tokens.vocabulary import Vocabulary

CORES = 2
PROMPT, NEW = 32, 256
SIZES = {
    "tiny": chameleon(128, 4, 4, 4, 352, 4096, 512),
    "100m": chameleon(768, 12, 12, 12, 2048, 16_384, 512),
}
MARKS = 32  # ids at either end that no one draws

Ids = list[list[int]]


def codes_only(size: int) -> Vocabulary:
    """Nearly all ids are image codes: an image is then a fixed number of draws among all ids."""
    return Vocabulary(text_size=MARKS, image_size=size - 2 * MARKS, sentinels=4, size=size)


def random_params(config: TransformerConfig, dtype: Any = np.float32) -> tuple[nnx.GraphDef, Any]:
    """Weights of a model that does not repeat itself at once, drawn on the device."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [_drawn(key, x.shape, config, dtype) for key, x in zip(keys, leaves, strict=True)]
    return graphdef, jax.tree.unflatten(tree, drawn)


def _drawn(key: jax.Array, shape: tuple[int, ...], config: TransformerConfig, dtype: Any) -> jax.Array:
    """Ones for the scales of norms, which are the only vectors of the model's width."""
    if shape in ((config.d_model,), (config.n_layers, config.d_model)):
        return jnp.ones(shape, dtype)
    return 0.05 * jax.random.normal(key, shape, dtype)


def prompts_of(batch: int, size: int) -> Ids:
    rng = np.random.default_rng(1)
    return rng.integers(MARKS, size - MARKS, (batch, PROMPT)).tolist()


def ours(config: TransformerConfig, batch: int) -> tuple[Callable[[], Ids], Any]:
    """A run of this project's engine, and the weights."""
    graphdef, params = random_params(config)
    vocabulary = codes_only(config.vocab_size)
    engine = Engine(graphdef, params, vocabulary, NEW, config=EngineConfig(rows=batch))
    greedy = SamplingConfig(0.0)
    requests = [Request((tuple(p),), "image", image=greedy) for p in prompts_of(batch, config.vocab_size)]
    return lambda: [done.ids for done in engine.run(requests)], params


def theirs(config: TransformerConfig, params: Any, batch: int, cache: str) -> Callable[[], Ids]:
    """A run of `ChameleonForConditionalGeneration.generate` with the same weights."""
    import torch
    import transformers

    torch.set_num_threads(CORES)
    model = transformers.ChameleonForConditionalGeneration(_their_config(config)).eval()
    missing = model.load_state_dict(_their_state(config, params), strict=False).missing_keys
    assert all("vqmodel" in name for name in missing), missing
    ids = torch.tensor(prompts_of(batch, config.vocab_size))
    never = [*range(MARKS), *range(config.vocab_size - MARKS, config.vocab_size)]

    def run() -> Ids:
        with torch.inference_mode():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                suppress_tokens=never,
                cache_implementation=cache,
            )
        return whole[:, PROMPT:].tolist()

    return run


def _their_config(config: TransformerConfig) -> Any:
    import transformers

    # Its image codes, which it never draws, lie among the ids that nobody draws.
    names = {f"IMGIMG{chr(65 + i)}Z": config.vocab_size - 1 - i for i in range(8)}
    tokenizer = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 4, "resolution": 16, "base_channels": 32}
    return transformers.ChameleonConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_len,
        rms_norm_eps=config.norm_eps,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
        vocabulary_map={"<image>": config.vocab_size - 9, **names},
        vq_config={**tokenizer, "channel_multiplier": [1], "num_res_blocks": 1},
    )


def _their_state(config: TransformerConfig, params: Any) -> dict[str, Any]:
    import torch

    def tensor(x: Any) -> Any:
        return torch.tensor(np.asarray(x))

    blocks = jax.tree.map(np.asarray, params["blocks"])
    attention, mlp = blocks["attention"], blocks["mlp"]
    state = {
        "model.embed_tokens.weight": tensor(params["embedding"]),
        "model.norm.weight": tensor(params["norm"]["scale"]),
        "lm_head.weight": tensor(params["head"]),
    }
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
            weight = attention[name][i]
            state[f"{layer}self_attn.{short}_proj.weight"] = tensor(weight.reshape(len(weight), -1).T.copy())
        for name, short in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            state[f"{layer}self_attn.{short}.weight"] = tensor(attention[name]["scale"][i])
            state[f"{layer}self_attn.{short}.bias"] = tensor(attention[name]["bias"][i])
        out = attention["out"][i]
        state[f"{layer}self_attn.o_proj.weight"] = tensor(out.reshape(-1, out.shape[-1]).T.copy())
        for name in ("gate", "up", "down"):
            state[f"{layer}mlp.{name}_proj.weight"] = tensor(mlp[name][i].T.copy())
        state[f"{layer}input_layernorm.weight"] = tensor(blocks["attention_norm"]["scale"][i])
        state[f"{layer}post_attention_layernorm.weight"] = tensor(blocks["mlp_norm"]["scale"][i])
    return state


def compare(size: str, batch: int, repeats: int) -> dict[str, Any]:
    """One line of the result: seconds of both sides in turn, and how many leading ids all runs agree on."""
    config = SIZES[size]
    mine, params = ours(config, batch)
    caches = {cache: theirs(config, params, batch, cache) for cache in ("dynamic", "static")}
    ids, _ = _timed(mine)
    warm = {cache: _timed(run) for cache, run in caches.items()}
    cache = min(warm, key=lambda name: warm[name][1])
    pairs = [(_timed(mine)[1], _timed(caches[cache])[1]) for _ in range(repeats)]
    ratios = [b / a for a, b in pairs]
    return {
        "model": size,
        "batch": batch,
        # Of the input embedding a step reads one row alone.
        "weights_gb": (sum(x.nbytes for x in jax.tree.leaves(params)) - params["embedding"].nbytes) / 1e9,
        "ours": [a for a, _ in pairs],
        "transformers": [b for _, b in pairs],
        "cache": cache,
        "warm_up": {name: seconds for name, (_, seconds) in warm.items()},
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "equal_ids": min(_common(a, b) for other, _ in warm.values() for a, b in zip(ids, other, strict=True)),
    }


def _timed(run: Callable[[], Ids]) -> tuple[Ids, float]:
    start = time.perf_counter()
    ids = run()
    return ids, time.perf_counter() - start


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def on_cpus(sizes: Sequence[str], batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """The result on two cores."""
    import torch
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "lines": []}
    for size in sizes:
        for batch in batches:
            found["lines"].append(compare(size, batch, repeats))
            print(*_row(found["lines"][-1]), sep="  ", flush=True)
    return found


def _row(found: dict[str, Any]) -> list[str]:
    speeds = [found["batch"] * NEW / statistics.median(found[side]) for side in ("ours", "transformers")]
    low, high = found["ratio_spread"]
    read = found["weights_gb"] * NEW / statistics.median(found["ours"])
    return [
        found["model"],
        str(found["batch"]),
        f"{speeds[0]:.0f}",
        f"{speeds[1]:.0f} ({found['cache']})",
        f"{found['ratio']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{read:.1f}",
        f"{found['equal_ids']} of {NEW}",
    ]


def on_gpu(counts: Sequence[int]) -> dict[str, Any]:
    """7B at batch 1, and 760M images with guidance, so many at a time."""
    limit = _copy_bandwidth()
    lines = [f"Copies run at {limit / 1e9:.0f} GB/s."]
    seven = dataclasses.replace(PRESETS["cm3leon-7b"], dtype="bfloat16")
    seconds, steps = _images(seven, requests=1, guided=False, smallest_cache=1152)
    read = _bytes_per_step(seven, rows=1)
    speed = steps / seconds
    lines.append(f"- 7B shape, batch 1, 1,024 codes: {speed:.0f} tokens/s, {read * speed / limit:.0%} of the bandwidth")
    middle = dataclasses.replace(PRESETS["cm3leon-760m"], dtype="bfloat16")
    for count in counts:
        seconds, steps = _images(middle, requests=count, guided=True, smallest_cache=384)
        read = _bytes_per_step(middle, rows=2 * count)
        share = read * steps / seconds / limit
        lines.append(f"- 760M with guidance, {count} images at a time: {count / seconds:.1f} images/s, {share:.0%}")
    return {"copy_bytes_per_second": limit, "lines": lines}


def _images(config: TransformerConfig, requests: int, guided: bool, smallest_cache: int) -> tuple[float, int]:
    """Seconds of one batch of images of 1,024 codes after 64 ids, compiled before; and its steps."""
    started = time.perf_counter()
    tokens, vocabulary = 1024, Vocabulary()
    graphdef, params = random_params(config)
    engine = Engine(
        graphdef, params, vocabulary, tokens, config=EngineConfig(rows=requests, smallest_cache=smallest_cache)
    )
    del params
    prompt, masked = tuple(range(4, 67)), (vocabulary.eos, vocabulary.sentinel(0), vocabulary.break_id)
    streams = ((*prompt, vocabulary.break_id), *((masked,) if guided else ()))
    guidance = classifier_free(3.0) if guided else Guidance()
    sampling = SamplingConfig(top_p=0.9)
    asked = [Request(streams, "image", seed, image=sampling, guidance=guidance) for seed in range(requests)]
    engine.run(asked)
    start = time.perf_counter()
    engine.run(asked)
    seconds = time.perf_counter() - start
    shape = f"{requests} images, {config.n_layers} layers x {config.d_model}"
    print(f"{shape}: {start - started:.0f} s with compiling, then {seconds:.2f} s", file=sys.stderr, flush=True)
    return seconds, tokens


def _bytes_per_step(config: TransformerConfig, rows: int) -> float:
    """Weights once, and the keys and values of half an image for each row, in bf16."""
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))))
    weights = sum(x.size for x in jax.tree.leaves(shapes["blocks"])) + Vocabulary().image_size * config.d_model
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * (64 + 512)
    return 2.0 * (weights + rows * cache)


def _copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GB."""
    x = jnp.zeros(1 << 30, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(20):
        x = copy(x)
    x.block_until_ready()
    return 20 * 2 * x.nbytes / (time.perf_counter() - start)


def page(found: dict[str, Any]) -> str:
    """What was found on CPUs."""
    about = (
        f"Prompt {PROMPT} ids, {NEW} new ones, greedy, fp32, {CORES} cores, torch {found['torch']}, transformers "
        f"{found['transformers']}. Tokens/s of the median run; GB/s are the weights times the steps a second.\n\n"
    )
    columns = ["model", "batch", "cm3jax", "transformers (cache)", "ratio", "spread", "GB/s", "equal ids"]
    return about + table(columns, [_row(line) for line in found["lines"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="7B and 760M shapes on the first accelerator")
    parser.add_argument("--images", nargs="+", type=int, default=[64, 128, 192], help="at a time, with --gpu")
    options = parser.parse_args()
    if options.gpu:
        run_under_flags("gpu")
        found = on_gpu(options.images)
        write("decode_gpu", "Decoding", header() | found, "\n".join(found["lines"]) + "\n")
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        found = on_cpus(options.sizes, options.batches, options.repeats)
        write("decode", "Decoding", header() | found, page(found))


if __name__ == "__main__":
    main()
