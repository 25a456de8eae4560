"""The image tokenizer against an independent PyTorch one: same random weights, forward, every loss term, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.models.discriminator import Discriminator, DiscriminatorConfig
from cm3jax.models.perceptual import STAGES, LPIPSWeights, load_lpips, lpips
from cm3jax.models.vqgan import VQGAN, VQGANConfig
from cm3jax.state import fresh_state
from cm3jax.tasks.vqgan import ImageDataConfig, VQGANLossConfig, VQGANTask, VQGANTaskConfig

torch = pytest.importorskip("torch")
F = torch.nn.functional

torch.set_num_threads(1)  # the arrays are tiny

TOLERANCE = 1e-5  # of the largest magnitude in the array; fp32 on both sides

CONFIG = VQGANConfig(
    resolution=16,
    channels=8,
    channel_multipliers=(1, 2),
    codes=12,
    res_blocks=1,
    attention_resolutions=(8,),
    z_channels=6,
    embed_dim=4,
    norm_groups=4,
)
DISCRIMINATOR = DiscriminatorConfig(channels=4, layers=2)


# --- the PyTorch side: modules named as in the released checkpoints -------------------------------------------------


def conv(features_in, features_out, kernel, stride=1, padding=None):
    return torch.nn.Conv2d(features_in, features_out, kernel, stride, kernel // 2 if padding is None else padding)


def norm(features):
    return torch.nn.GroupNorm(CONFIG.norm_groups, features, eps=1e-6)


class TorchResBlock(torch.nn.Module):
    def __init__(self, features_in, features_out):
        super().__init__()
        self.norm1, self.conv1 = norm(features_in), conv(features_in, features_out, 3)
        self.norm2, self.conv2 = norm(features_out), conv(features_out, features_out, 3)
        if features_in != features_out:
            self.nin_shortcut = conv(features_in, features_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class TorchAttention(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.norm = norm(features)
        self.q, self.k, self.v, self.proj_out = (conv(features, features, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class TorchMid(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.block_1, self.block_2 = TorchResBlock(features, features), TorchResBlock(features, features)
        self.attn_1 = TorchAttention(features)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class TorchResample(torch.nn.Module):
    def __init__(self, features, down):
        super().__init__()
        self.down = down
        self.conv = conv(features, features, 3, 2, 0) if down else conv(features, features, 3)

    def forward(self, x):
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class TorchLevel(torch.nn.Module):
    def __init__(self, width, width_out, blocks, attention):
        super().__init__()
        self.block = torch.nn.ModuleList(
            TorchResBlock(width if i == 0 else width_out, width_out) for i in range(blocks)
        )
        self.attn = torch.nn.ModuleList(TorchAttention(width_out) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class TorchEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = conv(3, 8, 3)
        self.down = torch.nn.ModuleList([TorchLevel(8, 8, 1, False), TorchLevel(8, 16, 1, True)])
        self.down[0].downsample = TorchResample(8, down=True)
        self.mid, self.norm_out, self.conv_out = TorchMid(16), norm(16), conv(16, CONFIG.z_channels, 3)

    def forward(self, x):
        x = self.down[1](self.down[0].downsample(self.down[0](self.conv_in(x))))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class TorchDecoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.mid = conv(CONFIG.z_channels, 16, 3), TorchMid(16)
        self.up = torch.nn.ModuleList([TorchLevel(16, 8, 2, False), TorchLevel(16, 16, 2, True)])
        self.up[1].upsample = TorchResample(16, down=False)
        self.norm_out, self.conv_out = norm(8), conv(8, 3, 3)

    def forward(self, z):
        x = self.up[0](self.up[1].upsample(self.up[1](self.mid(self.conv_in(z)))))
        return self.conv_out(F.silu(self.norm_out(x)))


class TorchQuantizer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.embedding = config, torch.nn.Embedding(config.codes, config.embed_dim)

    def forward(self, z):
        z, codebook = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.config.l2_normalized:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        codes = torch.cdist(z.reshape(-1, z.shape[-1]), codebook).argmin(1).reshape(z.shape[:-1])
        z_q = codebook[codes]
        toward_codes, toward_latents = F.mse_loss(z, z_q.detach()), F.mse_loss(z_q, z.detach())
        on_codes, on_latents = (1.0, self.config.beta) if self.config.legacy_beta else (self.config.beta, 1.0)
        loss = on_codes * toward_codes + on_latents * toward_latents
        return (z + (z_q - z).detach()).permute(0, 3, 1, 2), codes, loss


class TorchVQGAN(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder, self.quantize = TorchEncoder(), TorchDecoder(), TorchQuantizer(config)
        self.quant_conv = conv(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = conv(config.embed_dim, config.z_channels, 1)

    def forward(self, x):
        z_q, codes, loss = self.quantize(self.quant_conv(self.encoder(x)))
        return self.decoder(self.post_quant_conv(z_q)), codes, loss


class TorchDiscriminator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 4, 4, 2, 1)
        self.convs = torch.nn.ModuleList(
            [torch.nn.Conv2d(4, 8, 4, 2, 1, bias=False), torch.nn.Conv2d(8, 16, 4, 1, 1, bias=False)]
        )
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(16)])
        self.conv_out = torch.nn.Conv2d(16, 1, 4, 1, 1)

    def forward(self, x):
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for layer, batch_norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(batch_norm(layer(x)), 0.2)
        return self.conv_out(x)


# --- from one side to the other -------------------------------------------------------------------------------------


def randomize(module, seed):
    """Weights of a size that makes every path matter, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return module


def to_tree(named):
    """Our nested dict from (torch name, tensor) pairs."""
    tree = {}
    for name, tensor in named:
        *path, leaf = [int(part) if part.isdigit() else part for part in name.split(".")]
        value = tensor.detach().numpy()
        if path[-1] == "embedding":
            *path, leaf = path
        elif value.ndim == 4:
            value, leaf = value.transpose(2, 3, 1, 0), "kernel"
        elif leaf == "weight":
            leaf = "scale"
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(value)
    return tree


def gradients_tree(module):
    return to_tree((name, parameter.grad) for name, parameter in module.named_parameters())


def assert_close(ours, theirs, name="", least_scale=0.0):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    scale = max(np.abs(theirs).max(), least_scale)
    worst = np.abs(ours - theirs).max()
    assert scale > 0 and worst <= TOLERANCE * scale, f"{name}: {worst} of {scale}"


def assert_trees_close(ours, theirs):
    """Every leaf; a leaf a hundred times smaller than the largest (attention's key bias has gradient 0) as if it were
    only that much smaller."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    least_scale = 0.01 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b, jax.tree_util.keystr(path), least_scale)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [{}, {"legacy_beta": True}, {"l2_normalized": True}], ids=["plain", "legacy", "normalized"]
)
def test_generator_and_quantizer_loss(images, variant):
    config = dataclasses.replace(CONFIG, **variant)
    theirs = randomize(TorchVQGAN(config), 1)
    reconstruction, codes, loss = theirs(nchw(images))
    (reconstruction.abs().mean() + loss).backward()

    graph = nnx.graphdef(nnx.eval_shape(lambda: VQGAN(config, nnx.Rngs(0))))

    def objective(params):
        ours, quantized = nnx.merge(graph, params)(images)
        return jnp.mean(jnp.abs(ours)) + quantized.loss, (ours, quantized)

    params = to_tree(theirs.named_parameters())
    gradients, (ours, quantized) = jax.jit(jax.grad(objective, has_aux=True))(params)
    assert np.array_equal(quantized.codes, codes.numpy())
    assert len(np.unique(codes)) > 3
    assert_close(ours, nhwc(reconstruction), "reconstruction")
    assert_close(quantized.loss, loss.detach(), "loss")
    assert_trees_close(gradients, gradients_tree(theirs))


def test_discriminator(images):
    theirs = randomize(TorchDiscriminator(), 2)
    logits = theirs(nchw(images))
    logits.square().mean().backward()
    graph = nnx.graphdef(nnx.eval_shape(lambda: Discriminator(DISCRIMINATOR, nnx.Rngs(0))))
    params = to_tree(theirs.named_parameters())
    judge = lambda params: nnx.merge(graph, params)(images)  # noqa: E731
    assert_close(judge(params), nhwc(logits), "logits")
    assert_trees_close(jax.grad(lambda p: jnp.mean(jnp.square(judge(p))))(params), gradients_tree(theirs))


def test_gradients_of_one_training_step(images):
    """Both networks' gradients, with the adaptive weight between reconstruction and adversary; and none before it."""
    loss = VQGANLossConfig(l2_weight=0.5, discriminator=DISCRIMINATOR, disc_weight=0.8, disc_start=10)
    config = VQGANTaskConfig(CONFIG, ImageDataConfig("scenes:count=4,size=16"), loss, batch_size=3)
    task = VQGANTask(config, seed=0, steps=1)
    generator, discriminator = randomize(TorchVQGAN(CONFIG), 3), randomize(TorchDiscriminator(), 4)
    params = {
        "generator": to_tree(generator.named_parameters()),
        "discriminator": to_tree(discriminator.named_parameters()),
    }
    state = fresh_state(params, {}, {})

    @jax.jit
    def ours(step):
        found = task.gradients(state.replace(step=step), jnp.asarray(images))
        return found.gradients, found.metrics

    real = nchw(images)
    fake, _, codebook_loss = generator(real)
    reconstruction = F.l1_loss(fake, real) + 0.5 * F.mse_loss(fake, real)
    adversarial = -discriminator(fake).mean()
    last = generator.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (reconstruction, adversarial)]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach() * 0.8
    (reconstruction + codebook_loss).backward(retain_graph=True)
    gradients, metrics = ours(9)
    assert_trees_close(gradients["generator"], gradients_tree(generator))
    assert_close(metrics["reconstruction_loss"], reconstruction.detach())
    assert_close(metrics["codebook_loss"], codebook_loss.detach())
    assert all(not np.any(gradient) for gradient in jax.tree.leaves(gradients["discriminator"]))
    assert metrics["adversarial_weight"] == 0

    (weight * adversarial).backward()
    discriminator.zero_grad()
    judged = [discriminator(x) for x in (real, fake.detach())]
    telling = 0.5 * (F.relu(1 - judged[0]).mean() + F.relu(1 + judged[1]).mean())
    telling.backward()

    gradients, metrics = ours(10)
    assert_trees_close(gradients["generator"], gradients_tree(generator))
    assert_trees_close(gradients["discriminator"], gradients_tree(discriminator))
    assert_close(metrics["generator_loss"], adversarial.detach())
    assert_close(metrics["discriminator_loss"], telling.detach())
    assert_close(metrics["adversarial_weight"], weight)


def torch_lpips(tensors, heads, x, y):
    """LPIPS v0.1 written out: scale, VGG16, unit channels, weighted squares, mean over positions."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    pair = [(x - shift) / scale, (y - shift) / scale]
    total = 0.0
    for i, stage in enumerate(STAGES):
        pair = [F.max_pool2d(h, 2) for h in pair] if i else pair
        for index, _, _ in stage:
            weight, bias = tensors[f"features.{index}.weight"], tensors[f"features.{index}.bias"]
            pair = [F.relu(F.conv2d(h, weight, bias, padding=1)) for h in pair]
        unit = [h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10) for h in pair]
        total = total + F.conv2d((unit[0] - unit[1]).square(), heads[f"lin{i}.model.1.weight"]).mean((2, 3))
    return total[:, 0]


def test_lpips_from_files(tmp_path, images):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(5)
    tensors, heads = {}, {}
    for i, stage in enumerate(STAGES):
        for index, width_in, width_out in stage:
            spread = (2 / (9 * width_in)) ** 0.5
            kernel = rng.standard_normal((width_out, width_in, 3, 3), np.float32) * np.float32(spread)
            tensors[f"features.{index}.weight"] = kernel
            tensors[f"features.{index}.bias"] = rng.standard_normal(width_out).astype(np.float32) * np.float32(0.1)
        heads[f"lin{i}.model.1.weight"] = rng.uniform(0, 1, (1, stage[-1][2], 1, 1)).astype(np.float32)
    save_file(tensors, tmp_path / "vgg16.safetensors")
    np.savez(tmp_path / "heads.npz", **heads)

    weights = load_lpips(tmp_path / "vgg16.safetensors", tmp_path / "heads.npz")
    others = np.clip(images + 0.3 * rng.standard_normal(images.shape), -1, 1).astype(np.float32)
    x = nchw(images).requires_grad_()
    theirs = torch_lpips(*({k: torch.from_numpy(v) for k, v in d.items()} for d in (tensors, heads)), x, nchw(others))
    theirs.sum().backward()

    def total(weights: LPIPSWeights, a):
        distances = lpips(weights, a, others)
        return distances.sum(), distances

    gradient, ours = jax.jit(jax.grad(total, argnums=1, has_aux=True))(weights, images)
    assert_close(ours, theirs.detach())
    assert_close(gradient, nhwc(x.grad))
    assert np.array_equal(lpips(weights, images, images), np.zeros(3))
