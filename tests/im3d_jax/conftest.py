"""What tests share: tiny random models in public layouts, small configs, and a fit without a worker."""

import json
import math
import secrets
import socket
import string
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from jax.extend.random import define_prng_impl

from im3d_jax import backbones, checkpoint, config_flags, pipeline
from im3d_jax.backbones import emu_video, svd, unet3d
from recon_torch import hosting
from recon_torch.fit import quality
from recon_torch.fit.export import export_beside
from recon_torch.fit.optimization import Fit
from recon_torch.views import axes

hosting.declare()  # before anything imports transformers

ROOT = Path(__file__).parents[2]
SHRUNK = """
import importlib.util
spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

def get_config():
    config = tiny.get_config()
    config.update(size=32, num_views=4, weights={weights!r})
    config.backbone.kwargs.update(latent_shape=(8, 8, 64), model_channels=8, channel_mult=(1,), ff_mult=1,
        num_res_blocks=(0,), attention_levels=(), head_dim=8, temporal_span=("pixel",), text_dims=(8,))
    config.text_to_image.num_steps = 2
{changes}
    return config
"""
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(directory, pad=EOS):
    """A CLIP tokeniser of single letters and the word "cat"; others read as the end token. Its vocabulary."""
    letters = list(string.ascii_lowercase)
    words = ["!", *letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", BOS, EOS]
    vocabulary = {word: index for index, word in enumerate(words)}
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=16, pad_token=pad)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def clip_text_config(**kwargs):
    from transformers import CLIPTextConfig

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3)
    ids = dict(vocab_size=57, bos_token_id=55, eos_token_id=56, pad_token_id=56)
    return CLIPTextConfig(max_position_embeddings=16, projection_dim=24, **(sizes | ids | kwargs))


def perturb(model):
    """Moves every parameter, also norms at one and biases at zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def hashed(key, bit_width, shape):
    """Random enough for weights, and compiled in a third of the time that JAX's own generators take."""
    bits = (jnp.arange(math.prod(shape), dtype=jnp.uint32) + key[0]) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ bits >> 15) * jnp.uint32(0x85EBCA77) + key[1]
    return (bits ^ bits >> 13).reshape(shape).astype(f"uint{bit_width}")


HASH = define_prng_impl(
    name="hash",
    key_shape=(2,),
    seed=lambda seed: jnp.stack([seed, seed]).astype(jnp.uint32),
    split=lambda key, shape: hashed(key, 32, (*shape, 2)),
    random_bits=hashed,
    fold_in=lambda key, number: hashed(key ^ number.astype(jnp.uint32), 32, (2,)),
)


@pytest.fixture
def quick_draws(monkeypatch):
    """Initial weights by the models' own initialisers, zeros included, from numbers that compile fast."""
    for model in (emu_video.Model, svd.Model, unet3d.Model):
        init = model.init

        def quick(self, key, init=init):
            return init(self, jax.random.key(0, impl=HASH))

        monkeypatch.setattr(model, "init", quick)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a package of a user's with one module and returns the module's name."""

    def write(source, name="part"):
        package = tmp_path / "user_pkg"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        for module in [each for each in sys.modules if each.split(".")[0] == "user_pkg"]:
            monkeypatch.delitem(sys.modules, module)
        return f"user_pkg.{name}"

    return write


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A directory with a text encoder as in SD 1.5 and one as in SDXL, each with its tokeniser beside."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    root = tmp_path_factory.mktemp("clip")
    perturb(CLIPTextModel(clip_text_config())).save_pretrained(root / "text_encoder")
    perturb(CLIPTextModelWithProjection(clip_text_config())).save_pretrained(root / "text_encoder_2")
    write_clip_tokenizer(root / "tokenizer")
    write_clip_tokenizer(root / "tokenizer_2", pad="!")
    return root


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A directory with a whole T5, decoder included, and its tokeniser."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    root = tmp_path_factory.mktemp("t5")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581cat", -1.0)]
    words += [(letter, -3.0) for letter in string.ascii_lowercase]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(root)
    config = T5Config(vocab_size=31, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    perturb(T5ForConditionalGeneration(config)).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def clip_vision(tmp_path_factory):
    """Directories of a CLIP image encoder, by the width of its embedding."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    def make(width):
        path = tmp_path_factory.mktemp("vision")
        sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
        config = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=width, **sizes)
        perturb(CLIPVisionModelWithProjection(config)).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def picture_parts():
    """Sizes of tiny vision and text transformers, and what saves an image processor and a tokeniser."""
    from transformers import BlipImageProcessor, CLIPImageProcessor

    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    text = vision | dict(vocab_size=57, bos_token_id=55, eos_token_id=56, pad_token_id=0)

    def save(path, kind):
        write_clip_tokenizer(path, pad="!")
        if kind == "clip":
            size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
            CLIPImageProcessor(**size).save_pretrained(path)
        else:
            BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)

    return vision | dict(image_size=16, patch_size=8), text, save


@pytest.fixture(scope="session")
def blip(tmp_path_factory, picture_parts):
    """A directory of a BLIP with random weights, which says letters."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    vision, text, save = picture_parts
    path = tmp_path_factory.mktemp("blip") / "blip"
    save(path, "blip")
    text = text | dict(encoder_hidden_size=16, sep_token_id=56, max_position_embeddings=32)
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    perturb(BlipForConditionalGeneration(config)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def whole_clip(tmp_path_factory, picture_parts):
    """A directory of a CLIP with both halves and random weights, which reads 16 tokens."""
    from transformers import CLIPConfig, CLIPModel

    vision, _, save = picture_parts
    path = tmp_path_factory.mktemp("clip") / "clip"
    save(path, "clip")
    text = clip_text_config().to_dict()
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision | dict(projection_dim=24), projection_dim=24)
    perturb(CLIPModel(config)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A directory of an autoencoder that halves the sides twice, to latents of 4 channels."""
    from diffusers import AutoencoderKL

    path, levels = tmp_path_factory.mktemp("vae"), 3
    model = AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
    )
    perturb(model).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def diffusers_svd():
    """Width of the vector that it is told -> diffusers' network in the size of `svd.SMALL`."""
    from diffusers import UNetSpatioTemporalConditionModel

    def make(vector_size=3 * 16):
        torch.manual_seed(0)
        model = UNetSpatioTemporalConditionModel(
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            cross_attention_dim=24,
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=vector_size,
        )
        return perturb(model).requires_grad_()

    return make


@pytest.fixture(scope="module")
def quick_init():
    """Random weights drawn by NumPy, because compiling JAX's generators for each parameter takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return (rng.standard_normal(leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))).astype(
                leaf.dtype
            )
        return np.full(leaf.shape, path[-1].key == "scale", leaf.dtype)

    def init(model, key):
        return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, key))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "init", init)
        yield


class LocalClient:
    """A `ReconstructionClient` without the process: the fit runs here."""

    started = 0

    def __init__(self, cameras, settings):
        type(self).started += 1
        self._settings = settings
        self.reset(cameras)
        self.renders, self.alphas = self.views, self.masks

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def reset(self, cameras=None, settings=None):
        self._settings = settings or self._settings
        self._fit = Fit(cameras or self._fit.cameras, self._settings, "cpu")
        cameras = self._fit.cameras
        shape = (len(cameras), cameras.height, cameras.width)
        self.views, self.masks = torch.zeros(*shape, 3), torch.zeros(*shape, 1)

    def set_targets(self, weights=None):
        self._fit.set_targets(self.views, self.masks, weights)

    def fit(self, until_step, on_progress=None):
        def as_numbers(step, losses):
            on_progress(step, {name: float(value) for name, value in losses.items()})

        self._fit.run(until_step, on_progress and as_numbers)
        return self._fit.metrics()

    def render(self, cameras=None):
        render = self._fit.render(cameras or self._fit.cameras)
        # Aligned as shared memory is.
        self.renders, self.alphas = (tensor.contiguous().clone() for tensor in (render.rgb, render.alpha))
        return self.renders, self.alphas

    def inspect(self, settings, around=None, excursions=None):
        around = around or self._fit.cameras
        return quality.inspect(self._fit, around, settings=settings, excursions=excursions)

    def export(self, path, settings, mesh):
        written = self._fit.scene.save(path, file_axes=axes.chosen(settings.axes), mesh=mesh)
        self.exported = export_beside(written, settings.formats, axes.UPRIGHT)

    def close(self):
        pass

    step = property(lambda self: self._fit.step)
    num_gaussians = property(lambda self: self._fit.num_gaussians)
    notes = property(lambda self: [*self._fit.notes, *self.exported])
    exported: tuple = ()


@pytest.fixture(scope="module")
def local_client(quick_init):
    """Pipelines without a worker process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ReconClient", LocalClient)
        yield LocalClient


@pytest.fixture(scope="session")
def one_level():
    """The sizes of an `emu_video` that has a single level, of 8 channels."""
    layers = dict(num_res_blocks=(1,), attention_levels=(), temporal_span=("pixel",))
    return dict(model_channels=8, channel_mult=(1,), **layers)


@pytest.fixture(scope="session")
def shrunk(one_level):
    """A shipped training config with views of 8 px, a tiny network, no warm-up and no decay."""

    def make(name="tiny_turntable.py", **settings):
        config = config_flags.load(ROOT / "configs" / name)
        config.size = 8
        other_sizes = dict(
            latent_shape=(2, 2, 64), num_res_blocks=(0,), head_dim=8, text_dims=(8,), ff_mult=1
        )
        config.backbone.kwargs.update(one_level | other_sizes)
        shared = dict(init_from="", num_steps=4, warmup_steps=0, decay_steps=0, learning_rate=1e-3)
        kept = dict(every=4, keep=2, keep_every=0, weights_every=0)
        config.train.update(shared | dict(log_every=1, checkpoint=kept) | settings)
        for stream_name, stream in config.train.streams.items():
            image = stream_name == "image" and len(config.train.streams) > 1
            stream.update(batch_size=8, num_views=min(stream.num_views, 3), every=2 if image else 1)
        return config

    return make


@pytest.fixture(scope="session")
def random_params(shrunk):
    """Parameters of `shrunk` by path, random also where they start at zero, so that every gradient flows."""
    model = backbones.build("emu_video", shrunk().backbone.kwargs.to_dict())
    rng = np.random.default_rng(0)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    flat = {
        path: (path.endswith("scale") + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float16)
        for path, leaf in shapes.items()
    }
    return {path: np.float32(value) for path, value in flat.items()}


@pytest.fixture(scope="session")
def random_weights(random_params, tmp_path_factory):
    """A file of `random_params`."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save_weights(path, traverse_util.unflatten_dict(random_params, sep="/"), {})
    return str(path)


@pytest.fixture(scope="session")
def write_shrunk():
    """Writes a small copy of the shipped config with changes (indented lines) and names its weights."""

    def write(directory: Path, changes: str) -> tuple[Path, Path]:
        path, weights = directory / "shrunk.py", directory / "w.safetensors"
        tiny = str(ROOT / "configs" / "tiny.py")
        path.write_text(SHRUNK.format(tiny=tiny, weights=str(weights), changes=changes))
        return path, weights

    return write


@pytest.fixture(scope="session")
def write_runnable(write_shrunk):
    """Writes a small copy of the shipped config together with random weights for its network."""

    def write(directory: Path, changes: str = "") -> Path:
        path, weights = write_shrunk(directory, changes)
        config = config_flags.load(path)
        model = backbones.build("emu_video", config.backbone.kwargs.to_dict())
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
        checkpoint.save_weights(weights, params, {"words": list(config.text.kwargs.words)})
        return path

    return write


# ---- An object store ----


@pytest.fixture(scope="session")
def s3_server():
    """The address of a process that speaks S3, and keeps everything in memory."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/moto-api/data.json").close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """The URL of a new bucket; the environment says where its store is."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{secrets.token_hex(6)}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"
