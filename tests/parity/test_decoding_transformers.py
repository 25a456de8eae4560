"""Greedy decoding against `generate` of the transformers library: same random weights, same ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.generate.engine import Engine, EngineConfig
from cm3jax.generate.request import Request
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.models.config import TransformerConfig, llama, opt
from cm3jax.models.transformer import Transformer
from cm3jax.tokens.vocabulary import Vocabulary

torch = pytest.importorskip("torch", reason="PARITY UNCHECKED: no torch here")
transformers = pytest.importorskip("transformers", reason="PARITY UNCHECKED: no transformers here")

VOCABULARY = Vocabulary(text_size=96, image_size=8, sentinels=2, size=128)
MAX_LEN, NEW = 64, 40
PROMPTS = ((2, 10, 11), (2, 40, 9, 9, 71, 5, 60), (2,))
CONFIGS = {
    "llama": llama(32, 2, 4, 2, 48, VOCABULARY.size, MAX_LEN),
    "opt": opt(32, 2, 4, VOCABULARY.size, MAX_LEN),
}


def random_params(config: TransformerConfig):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = jax.tree.map(lambda x: rng.normal(0, 0.15, x.shape).astype(np.float32), nnx.to_pure_dict(state))
    return graphdef, draw


def linear(weight: np.ndarray) -> "torch.Tensor":
    """Ours are [in, ...out]; theirs [out, in]. Attention's output has two input axes."""
    return torch.tensor(weight.reshape(weight.shape[0], -1).T.copy())


def attention_out(weight: np.ndarray) -> "torch.Tensor":
    return torch.tensor(weight.reshape(-1, weight.shape[-1]).T.copy())


def llama_model(config: TransformerConfig, params):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )
    state = {
        "model.embed_tokens.weight": torch.tensor(params["embedding"]),
        "model.norm.weight": torch.tensor(params["norm"]["scale"]),
        "lm_head.weight": torch.tensor(params["head"]),
    }
    blocks = params["blocks"]
    for i in range(config.n_layers):
        attention, mlp = blocks["attention"], blocks["mlp"]
        state |= {
            f"model.layers.{i}.self_attn.q_proj.weight": linear(attention["query"][i]),
            f"model.layers.{i}.self_attn.k_proj.weight": linear(attention["key"][i]),
            f"model.layers.{i}.self_attn.v_proj.weight": linear(attention["value"][i]),
            f"model.layers.{i}.self_attn.o_proj.weight": attention_out(attention["out"][i]),
            f"model.layers.{i}.mlp.gate_proj.weight": linear(mlp["gate"][i]),
            f"model.layers.{i}.mlp.up_proj.weight": linear(mlp["up"][i]),
            f"model.layers.{i}.mlp.down_proj.weight": linear(mlp["down"][i]),
            f"model.layers.{i}.input_layernorm.weight": torch.tensor(blocks["attention_norm"]["scale"][i]),
            f"model.layers.{i}.post_attention_layernorm.weight": torch.tensor(blocks["mlp_norm"]["scale"][i]),
        }
    return model, state


def opt_model(config: TransformerConfig, params):
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            ffn_dim=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            max_position_embeddings=config.max_len,
            word_embed_proj_dim=config.d_model,
            dropout=0.0,
        )
    )
    unused = np.zeros((2, config.d_model), np.float32)
    decoder = "model.decoder."
    state = {
        "lm_head.weight": torch.tensor(params["embedding"]),
        decoder + "embed_tokens.weight": torch.tensor(params["embedding"]),
        decoder + "embed_positions.weight": torch.tensor(np.concatenate([unused, params["position_table"]])),
        decoder + "final_layer_norm.weight": torch.tensor(params["norm"]["scale"]),
        decoder + "final_layer_norm.bias": torch.tensor(params["norm"]["bias"]),
    }
    blocks = params["blocks"]
    for i in range(config.n_layers):
        attention, mlp, layer = blocks["attention"], blocks["mlp"], f"{decoder}layers.{i}."
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            state[f"{layer}self_attn.{theirs}.weight"] = linear(attention[ours][i])
            state[f"{layer}self_attn.{theirs}.bias"] = torch.tensor(attention[f"{ours}_bias"][i].reshape(-1))
        state |= {
            layer + "self_attn.out_proj.weight": attention_out(attention["out"][i]),
            layer + "self_attn.out_proj.bias": torch.tensor(attention["out_bias"][i]),
            layer + "fc1.weight": linear(mlp["up"][i]),
            layer + "fc1.bias": torch.tensor(mlp["up_bias"][i]),
            layer + "fc2.weight": linear(mlp["down"][i]),
            layer + "fc2.bias": torch.tensor(mlp["down_bias"][i]),
        }
        for ours, theirs in (("attention_norm", "self_attn_layer_norm"), ("mlp_norm", "final_layer_norm")):
            state[f"{layer}{theirs}.weight"] = torch.tensor(blocks[ours]["scale"][i])
            state[f"{layer}{theirs}.bias"] = torch.tensor(blocks[ours]["bias"][i])
    return model, state


@pytest.mark.parametrize(("name", "theirs"), [("llama", llama_model), ("opt", opt_model)])
def test_greedy_ids_are_those_of_transformers(name, theirs):
    config = CONFIGS[name]
    graphdef, params = random_params(config)
    model, state = theirs(config, params)
    model.load_state_dict(state)
    model.eval()
    engine = Engine(graphdef, jax.tree.map(jnp.asarray, params), VOCABULARY, 4, config=EngineConfig(chunk=16))
    endings = list(engine.grammar.marks)
    never = [i for i in range(VOCABULARY.size) if not VOCABULARY.is_text(i) and i not in endings]
    requests = [Request((prompt,), "text", max_new=NEW, text=SamplingConfig(0.0)) for prompt in PROMPTS]
    for request, ours in zip(requests, engine.run(requests), strict=True):
        prompt = torch.tensor([request.streams[0]])
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=never,
            begin_suppress_tokens=endings,
            eos_token_id=endings,
            pad_token_id=VOCABULARY.pad,
        )
        expected = whole[0, prompt.shape[1] :].tolist()
        assert ours.ids == [i for i in expected if i not in endings]
        assert len(ours.ids) > 5
