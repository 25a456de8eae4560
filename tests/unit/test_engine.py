import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.generate.cache import KVCache, StreamCaches
from cm3jax.generate.engine import Engine, EngineConfig
from cm3jax.generate.guidance import ContrastiveTopK, Guidance, classifier_free, two_way
from cm3jax.generate.prefill import Prompts
from cm3jax.generate.prompts import caption, text_to_image, unconditional_image
from cm3jax.generate.request import FREE, Request
from cm3jax.generate.rows import enter, no_standing, rows_of
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.sizes import slots
from cm3jax.generate.step import Plan, advance, choose, prefill, resize
from cm3jax.models.config import chameleon, cm3leon, llama, opt
from cm3jax.models.transformer import Transformer
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=64, image_size=32, sentinels=8, size=128)
IMAGE_TOKENS, MAX_LEN = 6, 96
CONFIGS = {
    "cm3leon": cm3leon(16, 2, 2, VOCABULARY.size, MAX_LEN),
    "chameleon": chameleon(16, 2, 4, 2, 32, VOCABULARY.size, MAX_LEN),
    "chameleon-swin": chameleon(16, 2, 2, 2, 32, VOCABULARY.size, MAX_LEN, norm_order="swin"),
    "llama": llama(16, 2, 2, 2, 32, VOCABULARY.size, MAX_LEN),
    "opt": opt(16, 2, 2, VOCABULARY.size, MAX_LEN),
}
TEXTS = [[10], [11, 12, 13, 14, 15], [20 + i % 40 for i in range(70)]]
PROMPTS = [tuple(text_to_image(VOCABULARY, text)) for text in TEXTS]
MASKED = tuple(unconditional_image(VOCABULARY))
PICTURE = tuple(caption(VOCABULARY, range(IMAGE_TOKENS)))
SAMPLED = SamplingConfig(temperature=0.9, top_p=0.95)
HOT = SamplingConfig(temperature=5.0)
ALL_CUTS = SamplingConfig(top_k=1, top_p=0.5, min_p=0.5).cuts
CONFIG = EngineConfig(chunk=8, prefill_chunk=32, smallest_cache=MAX_LEN)
# Every request outgrows its caches and waits for a row.
CRAMPED = EngineConfig(rows=2, chunk=7, prefill_chunk=32, smallest_cache=24)

# One request of every kind.
KINDS = {
    "image": Request((PROMPTS[0],), "image", 1, image=SAMPLED),
    "guided": Request((PROMPTS[1], MASKED), "image", 2, image=SAMPLED, guidance=classifier_free(3.0)),
    "scheduled": Request((PROMPTS[2], MASKED), "image", 3, image=SAMPLED, guidance=classifier_free((1.0, 6.0))),
    "two-way": Request((PROMPTS[1], PROMPTS[0], MASKED), "image", 4, image=SAMPLED, guidance=two_way(1.5, 4.0)),
    "cdk": Request((PROMPTS[2], MASKED), "image", 5, guidance=Guidance(contrast=ContrastiveTopK(alpha=0.3, k=4))),
    "greedy": Request((PROMPTS[1], MASKED), "image", 6, image=SamplingConfig(0.0), guidance=classifier_free(2.0)),
    "forced": Request(
        (PROMPTS[0],), "image", 7, image=SAMPLED, forced=(FREE, VOCABULARY.image_id(3), FREE, VOCABULARY.image_id(9))
    ),
    "text": Request((PICTURE,), "text", 8, 25, text=HOT),
    "penalised": Request((PICTURE,), "text", 9, 12, text=SamplingConfig(0.0, repetition_penalty=1.7)),
    "document": Request(((VOCABULARY.eos, 10), MASKED), "document", 10, 40, text=HOT, guidance=classifier_free(1.5)),
}
SIXTEEN = [
    *KINDS.values(),
    *(dataclasses.replace(KINDS["guided"], seed=20 + i) for i in range(3)),
    *(dataclasses.replace(KINDS["document"], seed=30 + i, max_new=30 + i) for i in range(3)),
]


chosen = jax.jit(choose, static_argnames="plan")


@functools.cache
def model_of(name: str):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIGS[name], nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@functools.cache
def engine_of(name: str, config: EngineConfig = CONFIG, devices: int = 1, tensor: int = 1) -> Engine:
    fsdp = 2 if devices == 8 else 1
    mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor), jax.devices()[:devices])
    return Engine(*model_of(name), VOCABULARY, IMAGE_TOKENS, config=config, mesh=mesh)


@functools.cache
def whole_forward(name: str):
    graphdef, params = model_of(name)

    def run(tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens))

    return jax.jit(run)


def whole_logits(name: str, ids) -> np.ndarray:
    """Of every position, without a cache."""
    row = np.zeros((1, MAX_LEN), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(whole_forward(name)(row))[0, : len(ids)]


def by_whole_forwards(name: str, request: Request, engine: Engine):
    """Ids and log-probabilities of a request without a cache, one whole forward for each stream and token."""
    rows = rows_of([request], engine.grammar, len(request.streams))
    at = no_standing(1, len(request.streams), VOCABULARY.size)
    enter(at, 0, request, engine.grammar)
    every = Plan(engine.grammar, (0, VOCABULARY.used), ALL_CUTS, True, request.guidance.contrast is not None, True, 1)
    drawn, log_probs, phase = [], [], at.grammar
    for number in range(request.limit(engine.grammar)):
        logits = np.stack([whole_logits(name, [*prompt, *drawn])[-1, : VOCABULARY.used] for prompt in request.streams])
        at = dataclasses.replace(at, number=np.array([number]), grammar=phase, positions=at.positions + (number > 0))
        token, log_prob = chosen(logits[None], rows, at, plan=every)
        drawn.append(int(token[0]))
        log_probs.append(float(log_prob[0]))
        at.seen[0, drawn[-1]] = True
        phase = engine.grammar.advance(phase, rows.endings, np.asarray(token))
        if phase.done[0]:
            break
    return drawn, log_probs


@functools.cache
def sixteen_together():
    return engine_of("chameleon").run(SIXTEEN)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_cached_decoding_is_that_of_whole_forwards(kind):
    request, found = KINDS[kind], sixteen_together()[list(KINDS).index(kind)]
    ids, log_probs = by_whole_forwards("chameleon", request, engine_of("chameleon"))
    assert found.error is None
    assert found.ids == (ids[:-1] if found.ended else ids)
    assert found.ended == (request.produce != "image" and ids[-1] in engine_of("chameleon").grammar.marks)
    np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-5)


SLOW_ON_MESHES = [pytest.param(8, name, marks=pytest.mark.slow) for name in sorted(CONFIGS) if name != "cm3leon"]


@pytest.mark.parametrize(
    ("devices", "name"), [(8, "cm3leon"), *((1, name) for name in sorted(CONFIGS)), *SLOW_ON_MESHES]
)
def test_every_position_of_every_stream_has_the_logits_of_a_whole_forward(devices, name):
    """With every id forced, the log-probabilities are a function of the logits that the cache led to."""
    rng = np.random.default_rng(1)
    ids = tuple(rng.integers(4, 60, 60).tolist())
    request = Request(((VOCABULARY.eos, *ids[:7]), MASKED), "text", max_new=53, forced=ids[7:])
    swapped = dataclasses.replace(request, streams=request.streams[::-1])
    engine = engine_of(name, devices=devices, tensor=2 if devices == 8 else 1)
    for asked, found in zip((request, swapped), engine.run([request, swapped]), strict=True):
        prompt = asked.streams[0]
        logits = whole_logits(name, [*prompt, *ids[7:]])[len(prompt) - 1 : -1]
        text = np.array([VOCABULARY.is_text(i) or i in engine.grammar.marks for i in range(VOCABULARY.size)])
        logits = np.where(text, logits, -np.inf)
        logits[0, list(engine.grammar.marks)] = -np.inf  # an infill does not begin with its end
        expected = jax.nn.log_softmax(logits, axis=-1)[np.arange(53), list(ids[7:])]
        np.testing.assert_allclose(found.log_probs, expected, atol=1e-5)


def ids_of(completions):
    return [found.ids for found in completions]


@pytest.mark.parametrize("kind", ["image", "cdk", "document"])
def test_a_request_gets_the_same_alone_and_among_sixteen(kind):
    i = list(KINDS).index(kind)
    assert engine_of("chameleon").run([KINDS[kind]])[0].ids == sixteen_together()[i].ids


def test_a_request_gets_the_same_in_another_order_and_after_a_refill_and_in_growing_caches():
    reordered = engine_of("chameleon", CRAMPED).run(SIXTEEN[::-1])
    assert ids_of(reordered[::-1]) == ids_of(sixteen_together())


@pytest.mark.parametrize(
    ("devices", "tensor"),
    [(8, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_a_request_gets_the_same_on_any_number_of_devices(devices, tensor):
    found = engine_of("chameleon", devices=devices, tensor=tensor).run(SIXTEEN)
    assert ids_of(found) == ids_of(sixteen_together())


def test_seeds_prompts_and_guidance_decide():
    request = Request((PROMPTS[1], MASKED), "image", image=SAMPLED)
    changes = [
        {"seed": 1},
        {"seed": 2},
        {"seed": 1, "guidance": classifier_free(1.0)},
        {"seed": 1, "guidance": classifier_free(3.0)},
        {"seed": 1, "streams": (PROMPTS[0], MASKED)},
    ]
    first, second, one, three, other = ids_of(
        engine_of("cm3leon").run([dataclasses.replace(request, **change) for change in changes])
    )
    assert first == one and second != first != three and other != first


def test_a_schedule_begins_with_its_first_weight_and_ends_with_its_last():
    greedy = dataclasses.replace(KINDS["guided"], image=SamplingConfig(0.0))
    scales = (1.0, (1.0, 6.0), 6.0)
    low, rising, high = ids_of(
        engine_of("cm3leon").run([dataclasses.replace(greedy, guidance=classifier_free(scale)) for scale in scales])
    )
    assert low[0] == rising[0] and low != rising != high


@pytest.mark.parametrize("count", [1, 4])
def test_the_cache_is_written_in_place(count):
    """The compiled step has no operation that makes another array of a cache's size, but the writes themselves."""
    engine = engine_of("cm3leon")
    rows = rows_of([KINDS["image"]] * count, engine.grammar, 1)
    at = no_standing(count, 1, 0)
    for row in range(count):
        enter(at, row, KINDS["image"], engine.grammar)
    caches = StreamCaches((KVCache.zeros(engine.decoder.config, count, 48),))
    codes = (VOCABULARY.image_start, VOCABULARY.image_end)
    plan = Plan(engine.grammar, codes, ALL_CUTS, True, False, False, 8)
    compiled = advance.lower(engine.decoder, caches, rows, at, np.int32(8), plan=plan).compile().as_text()
    made = re.findall(rf"= f32\[{count},2,48,8\]\S* ([a-z-]+)\(", compiled)
    assert "scatter" in made
    assert set(made) <= {"scatter", "fusion", "parameter", "get-tuple-element", "bitcast"}
    assert not re.findall(rf"= f32\[(?:{count},)?2,8,48\]", compiled)  # transposed


def test_forced_ids_are_untouched():
    ids = sixteen_together()[list(KINDS).index("forced")].ids
    assert (ids[1], ids[3]) == (VOCABULARY.image_id(3), VOCABULARY.image_id(9)) and len(ids) == IMAGE_TOKENS


def test_documents_hold_whole_images():
    requests = [Request(((VOCABULARY.eos, 10),), "document", seed, 80, text=HOT) for seed in range(8)]
    images = 0
    for found in engine_of("cm3leon").run(requests):
        runs = "".join("I" if VOCABULARY.is_image(i) else "b" if i == VOCABULARY.break_id else "t" for i in found.ids)
        parts = runs.split("b")
        assert all(part in ("I" * IMAGE_TOKENS, "t" * len(part)) for part in (parts if found.ended else parts[:-1]))
        images += sum(part.startswith("I") for part in parts)
    assert images > 0


def test_text_ids_that_stand_for_nothing_are_never_drawn():
    engine = Engine(*model_of("cm3leon"), VOCABULARY, IMAGE_TOKENS, text_end=20, config=CONFIG)
    found = engine.run([Request((PICTURE,), "text", seed, 25, text=HOT) for seed in range(4)])
    assert max(i for completion in found for i in completion.ids) < 20


def test_every_completion_is_told_of_once():
    told = {}
    found = engine_of("chameleon").run(SIXTEEN, lambda place, completion: told.update({place: completion}))
    assert [told[place] for place in range(16)] == found
    assert engine_of("chameleon").run([]) == []


BAD = [
    ({"streams": ()}, "no prompt"),
    ({"streams": ((),)}, "the prompt of stream 0 is empty"),
    ({"streams": ((2,) * 91,)}, "the prompt of stream 0, 91 ids, leaves no room for 6 new ones in 96"),
    ({"streams": (MASKED, (2, 128))}, "the prompt of stream 1 holds id 128, expected 0 <= id < 128"),
    ({"produce": "sound"}, "unknown modality 'sound', expected one of image, text, document"),
    ({"produce": "text"}, "text: max_new is missing"),
    ({"max_new": 0}, "max_new must be >= 1, found 0"),
    ({"max_new": 7}, "an image of 7 codes, the model's images have 6"),
    ({"guidance": classifier_free(3.0)}, r"guidance by stream 1, but the request has 1 \(counted from 0\)"),
    ({"guidance": Guidance(contrast=ContrastiveTopK())}, "guidance by stream 1, but the request has 1"),
    ({"guidance": Guidance((1.0,), (1.0, 2.0))}, "guidance: 2 weights at the last code for 1 at the first"),
    ({"forced": (3,)}, "forced id 3 at place 0, expected an image code's id"),
    ({"forced": (70,) * 7}, "7 forced ids for 6 new ones"),
    ({"seed": -1}, "seed -1, expected 0 <= seed < 2"),
]


def test_bad_requests_are_refused_each_and_the_rest_goes_on():
    good = KINDS["image"]
    requests = [good, *(dataclasses.replace(good, **values) for values, _ in BAD), good]
    first, *refused, last = engine_of("cm3leon").run(requests)
    assert first.ids == last.ids and len(first.ids) == IMAGE_TOKENS
    for found, (_, message) in zip(refused, BAD, strict=True):
        assert found.ids == [] and found.error is not None
        with pytest.raises(ValueError, match=message):
            raise ValueError(found.error)


@pytest.mark.parametrize(
    "kind", [{"weights": "int8"}, {"cache": "int8"}, {"weights": "int8", "cache": "int8"}], ids=str
)
def test_bytes_change_the_models_opinion_a_little(kind):
    ids = tuple(np.random.default_rng(1).integers(4, 60, 60).tolist())
    request = Request(((VOCABULARY.eos, *ids[:7]),), "text", max_new=53, forced=ids[7:])
    exact = engine_of("chameleon").run([request])[0].log_probs
    rounded = engine_of("chameleon", dataclasses.replace(CONFIG, **kind)).run([request])[0].log_probs
    assert np.max(np.abs(rounded - exact)) > 0
    assert abs(np.mean(rounded - exact)) < 0.02 and np.max(np.abs(rounded - exact)) < 0.4


@pytest.mark.parametrize(("limit", "sizes"), [(30, (16, 24, 32, 48)), (60, (16, 24, 32, 48, 64, 80))])
def test_caches_grow_no_further_than_the_rows_can_come(monkeypatch, limit, sizes):
    engine = engine_of("cm3leon", EngineConfig(rows=1, chunk=8, prefill_chunk=32, smallest_cache=8))
    grown = []
    monkeypatch.setattr("cm3jax.generate.engine.resize", lambda cache, size: grown.append(size) or resize(cache, size))
    request = Request((PICTURE,), "text", 8, limit, text=HOT, forced=(20,) * limit)
    assert len(engine.run([request])[0].ids) == limit
    assert tuple(grown) == sizes
    assert grown[-2] < len(PICTURE) + limit <= grown[-1]


def test_short_prompts_are_read_together(monkeypatch):
    """And long ones by themselves; each once, however many requests begin with it."""
    seen = []
    monkeypatch.setattr("cm3jax.generate.prefill.prefill", lambda *a: seen.append(a[2].shape) or prefill(*a))
    engine = engine_of("cm3leon", dataclasses.replace(CONFIG, rows=8, prefill_chunk=32))
    short = [
        Request(((VOCABULARY.eos, *range(4, 5 + n)),), "text", 8, 3, text=SamplingConfig(0.0)) for n in (3, 5, 5, 4)
    ]
    long = Request(((VOCABULARY.eos, *range(4, 4 + 40)),), "text", 8, 3, text=SamplingConfig(0.0))
    together = ids_of(engine.run([*short, long, long]))
    assert seen == [(2, 16), (2, 16), (1, 32), (1, 32)]
    assert together == [ids_of(engine.run([request]))[0] for request in (*short, long, long)]


def test_what_is_read_of_a_prompt_does_not_depend_on_the_others():
    engine, prompt, other = engine_of("cm3leon"), (VOCABULARY.eos, *range(4, 12)), (VOCABULARY.eos, *range(20, 26))
    read = []
    for together in ([prompt], [other, prompt]):
        prompts = Prompts(engine.decoder, rows=4, lanes=1, chunk=64, pad=VOCABULARY.pad, kind="compute")
        with jax.set_mesh(engine.mesh):
            prompts.read(together)
        place = prompts[prompt]
        assert place.row == len(together) - 1
        read.append(place.cache)
    for alone, beside in zip(*(jax.tree.leaves(cache) for cache in read), strict=True):
        assert alone.shape == beside.shape  # one program
        np.testing.assert_array_equal(alone[0, :, : len(prompt) - 1], beside[1, :, : len(prompt) - 1])


@pytest.mark.parametrize(
    ("needed", "at_last", "expected"),
    [(1, 300, 64), (65, 300, 128), (129, 300, 192), (257, 300, 320), (257, 9999, 384), (1025, 1100, 1280)],
)
def test_sizes_of_caches(needed, at_last, expected):
    assert slots(needed, at_last, 64) == expected


def test_a_model_with_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 256 ids for a model of 128"):
        Engine(*model_of("cm3leon"), dataclasses.replace(VOCABULARY, size=256), IMAGE_TOKENS)
