"""The CM3Leon decoder and its training step in plain PyTorch: what `train_step.py` compares with."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cm3jax.models.config import TransformerConfig
from cm3jax.optim import OptimConfig


class Block(nn.Module):
    """Attention and feed-forward, each a residual branch; one product for queries, keys and values."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, width = config, config.n_heads * config.head_dim
        self.qkv = nn.Linear(config.d_model, 3 * width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(_norm(x, self.config)).view(batch, length, 3, self.config.n_heads, self.config.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.relu(self.up(_norm(x, self.config))))


class Decoder(nn.Module):
    """`cm3jax.models.config.cm3leon` at any size: no biases, norms without parameters, learned positions, tied."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Parameter(torch.zeros(config.max_len, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(_norm(x, self.config), self.embedding.weight)

    @torch.no_grad()
    def load(self, params: Any) -> None:
        """Copies the weights of the JAX model (a nested dict of arrays, layers stacked)."""

        def put(target: torch.Tensor, value: np.ndarray) -> None:
            target.copy_(torch.from_numpy(np.array(value)))

        put(self.embedding.weight, params["embedding"])
        put(self.positions, params["position_table"])
        attention, mlp, d_model = params["blocks"]["attention"], params["blocks"]["mlp"], self.config.d_model
        for i, block in enumerate(self.blocks):
            parts = [np.asarray(attention[name][i]).reshape(d_model, -1).T for name in ("query", "key", "value")]
            put(block.qkv.weight, np.concatenate(parts))
            put(block.out.weight, np.asarray(attention["out"][i]).reshape(-1, d_model).T)
            put(block.up.weight, np.asarray(mlp["up"][i]).T)
            put(block.down.weight, np.asarray(mlp["down"][i]).T)


class Trainer:
    """AdamW (PyTorch's fused one) with clipping, as the JAX task has it; the learning rate is constant."""

    def __init__(self, config: TransformerConfig, optim: OptimConfig, threads: int):
        torch.set_num_threads(threads)
        self.model, self.clip = Decoder(config), optim.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            optim.learning_rate,
            (optim.b1, optim.b2),
            optim.eps,
            optim.weight_decay,
            fused=True,
        )

    def loss(self, tokens: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy in nats of tokens [B, L + 1]."""
        ids = torch.from_numpy(tokens).long()
        return F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def step(self, tokens: np.ndarray) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()


def _norm(x: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    return F.layer_norm(x, (config.d_model,), eps=config.norm_eps)
