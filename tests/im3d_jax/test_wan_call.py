"""The whole image-to-video call of three steps, against diffusers' WanImageToVideoPipeline.

The picture is encoded, noise denoised with guidance by UniPC on shifted levels of flow matching, and the clip
decoded: by the generator here, by the pipeline there.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from im3d_jax import generator as generators
from im3d_jax import pretrained
from im3d_jax.autoencoders import wan as wan_autoencoder
from im3d_jax.autoencoders import wan_sizes as autoencoder_sizes
from im3d_jax.backbones import wan, wan_sizes
from im3d_jax.clips import Clip
from im3d_jax.diffusion import schedules
from im3d_jax.settings import MaskSettings, RoundSettings, TextToImageSettings, VideoSettings
from recon_torch import hosting
from recon_torch.settings import plain

hosting.declare()
from diffusers import (  # noqa: E402  (imports torchvision)
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)

pytestmark = pytest.mark.slow

WORDS, SCALE, STEPS, SHIFT, PICTURES = 512, 4.0, 3, 3.0, 5
RNG = np.random.default_rng(0)


class Told:
    """A text encoder that knows two texts: the prompt and the negative prompt."""

    words = ()

    def __init__(self, width):
        self.texts = {
            name: RNG.standard_normal((1, WORDS, width)).astype(np.float32) for name in ("yes", "no")
        }

    def encode(self, prompts):
        return (np.concatenate([self.texts[each or "no"] for each in prompts]),), (
            np.ones((len(prompts), WORDS)),
        )

    def warnings(self, prompt):
        return []

    def understands(self, prompt):
        return True


def perturbed(module):
    for parameter in module.eval().requires_grad_(False).parameters():  # also what starts at zero or one
        parameter += 0.1 * torch.randn_like(parameter)
    return module


def transformer_in_diffusers(spec):
    names = (
        "num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim ffn_dim num_layers"
    )
    sizes = {name: getattr(spec, name) for name in names.split()}
    if spec.image_dim:
        sizes |= dict(image_dim=spec.image_dim, added_kv_proj_dim=spec.width)
    return perturbed(WanTransformer3DModel(**sizes))


def autoencoder_in_diffusers(sizes):
    names = "base_dim z_dim dim_mult num_res_blocks temperal_downsample is_residual"
    kwargs = {name: getattr(sizes, name) for name in names.split()}
    kwargs |= {name: list(kwargs[name]) for name in ("dim_mult", "temperal_downsample")}
    kwargs |= dict(in_channels=sizes.out_channels, out_channels=sizes.out_channels)
    kwargs |= dict(latents_mean=[0.1] * sizes.z_dim, latents_std=[1.5] * sizes.z_dim)
    kwargs |= dict(scale_factor_temporal=sizes.frame_factor, scale_factor_spatial=sizes.side_factor)
    if sizes.is_residual:
        kwargs |= dict(decoder_base_dim=sizes.decoder_base_dim, patch_size=sizes.patch_size)
    return perturbed(AutoencoderKLWan(**kwargs))


def params_of(module, model):
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return pretrained.to_params(
        tensors, shapes, lambda path: pretrained.Source(pretrained.torch_name(path)), "the module"
    )


@pytest.mark.parametrize(
    ("first_frame", "experts", "image_dim"),
    [("clean", False, 0), ("channels", False, 20), ("channels", True, 0)],
    ids=["2.2 TI2V", "2.1 I2V", "2.2 I2V"],
)
def test_three_steps_are_those_of_the_pipeline(tmp_path, first_frame, experts, image_dim):
    torch.manual_seed(0)
    sizes = autoencoder_sizes.SMALL["wan2.1"]
    vae = autoencoder_in_diffusers(sizes)
    vae.save_pretrained(tmp_path)
    codec = wan_autoencoder.load(str(tmp_path))
    side = 4 * sizes.side_factor
    latent = codec.latent_shape(side)
    channels = latent[-1] if first_frame == "clean" else 2 * latent[-1] + 4
    spec = dataclasses.replace(
        wan_sizes.SMALL["i2v"], in_channels=channels, out_channels=latent[-1], image_dim=image_dim
    )
    model = wan.Model(
        **plain(spec), latent_shape=latent, first_frame=first_frame, experts=experts, boundary=0.9
    )
    networks = [transformer_in_diffusers(spec) for _ in range(1 + experts)]
    alone = dataclasses.replace(model, experts=False)
    params = [params_of(each, alone) for each in networks]
    params = dict(zip(("high", "low"), params, strict=True)) if experts else params[0]

    text = Told(spec.text_dim)
    tokens = RNG.standard_normal((1, 5, image_dim)).astype(np.float32) if image_dim else None
    ours = generators.Generator(
        name="wan",
        model=model,
        params=params,
        codec=codec,
        text=text,
        image_encoder=Seen(tokens) if image_dim else None,
        schedule=schedules.make_schedule("flow", 1000, shift=SHIFT),
        size=side,
        clip=Clip(PICTURES - 1, closed=True),
        image=TextToImageSettings(),
        video=VideoSettings(
            num_steps=STEPS,
            spacing="flow_unipc",
            solver="unipc",
            w_text=SCALE,
            negative_prompt="no",
            tie_first_view=first_frame == "clean",  # the pipeline holds frame 0 at the picture there alone
        ),
        rounds=RoundSettings(),
        masks=MaskSettings(),
        place=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    picture = RNG.random((1, side, side, 3)).astype(np.float32)
    key = jax.random.key(1)
    given = ours.condition(["yes"], picture, np.ones((1, side, side, 1), np.float32))
    found = ours.turntable(given, key)
    noise = jax.random.normal(jax.random.fold_in(key, 0), (1, ours.num_frames, *latent))

    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=networks[0],
        transformer_2=networks[1] if experts else None,
        boundary_ratio=0.9 if experts else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        expand_timesteps=first_frame == "clean",
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.encode_image = lambda image, device: torch.from_numpy(tokens)
    with torch.no_grad():
        theirs = pipeline(
            image=torch.from_numpy(np.moveaxis(picture, -1, 1).copy()),
            prompt_embeds=torch.from_numpy(text.texts["yes"]),
            negative_prompt_embeds=torch.from_numpy(text.texts["no"]),
            height=side,
            width=side,
            num_frames=PICTURES,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            latents=torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy()),
            output_type="latent",
        ).frames
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert np.std(theirs) > 0.1
    assert np.abs(np.asarray(found) - theirs).max() <= 1e-4 * np.abs(theirs).max()


class Seen:
    """An image encoder that has seen the picture."""

    def __init__(self, tokens):
        self.tokens = tokens

    def encode(self, rgb):
        return self.tokens
