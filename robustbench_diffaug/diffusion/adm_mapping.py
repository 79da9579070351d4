"""Networks of guided-diffusion and improved-diffusion (ADM, IDDPM) as diffusers' UNet2DModel, weight by weight.

The two libraries agree on all formulas: group norm with eps 1e-5, `norm(h) (1 + scale) + shift` with the scale first,
cos before sin in the time embedding, attention with `softmax(q k / sqrt(width of a head))`, average pooling and nearest
neighbours in residual blocks that change the resolution, and the order of the skip connections. Adapted is this:

- UNet2DModel takes one width of heads; where their number is fixed instead, it is set in each attention module.
- UNet2DModel embeds times in as many numbers as its first level is wide. ADM embeds them in `num_channels`, which
  differ where the first of `channel_mult` is not 1 (512 pixels); time embedding modules of that width are put in place.
- improved-diffusion tells its networks `1000 t / steps` instead of t (`rescale_timesteps`), which `Told` does.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), https://arxiv.org/abs/2105.05233
    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
"""

import re
from collections.abc import Iterator, Mapping
from math import gcd
from typing import Annotated, Any, Literal

from jaxtyping import Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from robustbench_diffaug.component import Value
from robustbench_diffaug.diffusion.base import Schedule

__all__ = ["PUBLISHED", "Flags", "Told", "mapped", "unet"]

GROUPS = 32
"""Of every group norm."""
MULTIPLES = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
"""The `channel_mult` of an `image_size` for which none is given."""


class Flags(Value):
    """The flags that a network was trained with, named and preset as in guided-diffusion's scripts.

    Arguments:
        image_size: Height and width of the training images; other sizes can be denoised too.
        num_channels: The base width.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        num_heads: Attention heads in each attention block.
        num_head_channels: The width of a head, instead of their number.
        attention_resolutions: The sides of feature maps, at training size, at which there is attention.
        channel_mult: The width of each level over the base width; left out, that of the image size.
        resblock_updown: Whether residual blocks change the resolution, not a convolution.
        use_scale_shift_norm: Whether the time scales and shifts the second normalisation, or is added before it.
        use_new_attention_order: Whether queries, keys and values are split before the heads are.
        class_cond: Whether it is told a class.
        num_classes: The number of these.
        learn_sigma: Whether it has six outputs, three of them for the variance.
        noise_schedule: Of the training.
        diffusion_steps: The number of times.
        rescale_timesteps: Whether it is told `1000 t / steps` instead of t; preset to true in improved-diffusion.
    """

    image_size: PositiveInt
    num_channels: PositiveInt
    num_res_blocks: PositiveInt = 2
    num_heads: PositiveInt = 4
    num_head_channels: PositiveInt | None = None
    attention_resolutions: tuple[PositiveInt, ...] = (16, 8)
    channel_mult: tuple[Annotated[float, Field(gt=0)], ...] = ()
    resblock_updown: bool = False
    use_scale_shift_norm: bool = True
    use_new_attention_order: bool = False
    class_cond: bool = False
    num_classes: PositiveInt = 1000
    learn_sigma: bool = False
    noise_schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: Annotated[int, Field(ge=25, le=100_000)] = 1000
    rescale_timesteps: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "Flags":
        if not self.channel_mult and self.image_size not in MULTIPLES:
            raise ValueError(f"image_size {self.image_size} has no usual channel_mult; give one, such as [1, 2, 2, 2]")
        if self.image_size % self.divisor:
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(self.widths) - 1} times")
        sides = [self.image_size >> level for level in range(len(self.widths))]
        if odd := sorted(set(self.attention_resolutions) - set(sides)):
            raise ValueError(f"attention_resolutions has {odd[0]}; the levels have sides {', '.join(map(str, sides))}")
        if odd := [width for width in self.widths if width % GROUPS or not width]:
            raise ValueError(
                f"a level is {odd[0]} channels wide; num_channels x channel_mult must be multiples of {GROUPS}"
            )
        if odd := [width for width in self.attended if not self.heads(width)]:
            raise ValueError(f"a level with attention is {odd[0]} channels wide, which its heads do not divide")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(int(multiple * self.num_channels) for multiple in self.channel_mult or MULTIPLES[self.image_size])

    @property
    def divisor(self) -> int:
        """What heights and widths of images must be multiples of: all but the last level halve them."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether each level has attention; the middle always has."""
        return tuple(self.image_size >> level in self.attention_resolutions for level in range(len(self.widths)))

    def heads(self, width: int) -> int:
        """The number of heads of an attention block of so many channels; 0 where they do not divide it."""
        heads = self.num_heads if self.num_head_channels is None else width // self.num_head_channels
        return heads if width % (self.num_head_channels or heads) == 0 else 0

    @property
    def attended(self) -> tuple[int, ...]:
        """Channels of the blocks with attention, the middle last."""
        levels = zip(self.widths, self.attention, strict=True)
        return tuple(width for width, attended in levels if attended) + self.widths[-1:]

    def schedule(self) -> Schedule:
        """The noise levels of the training."""
        return Schedule(betas=self.noise_schedule, steps=self.diffusion_steps)


_GUIDED: Mapping[str, Any] = {"learn_sigma": True, "attention_resolutions": (32, 16, 8), "resblock_updown": True}
_HEADS_OF_64: Mapping[str, Any] = {**_GUIDED, "num_channels": 256, "num_head_channels": 64}
_IMPROVED: Mapping[str, Any] = {
    "num_channels": 128,
    "num_res_blocks": 3,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "diffusion_steps": 4000,
    "rescale_timesteps": True,
}
PUBLISHED: Mapping[str, Flags] = {
    "imagenet-64-class": Flags(
        **_GUIDED,
        image_size=64,
        num_channels=192,
        num_res_blocks=3,
        num_head_channels=64,
        use_new_attention_order=True,
        class_cond=True,
        noise_schedule="cosine",
    ),
    "imagenet-128-class": Flags(**_GUIDED, image_size=128, num_channels=256, num_heads=4, class_cond=True),
    "imagenet-256-class": Flags(**_HEADS_OF_64, image_size=256, class_cond=True),
    "imagenet-256": Flags(**_HEADS_OF_64, image_size=256),
    "imagenet-512-class": Flags(**_HEADS_OF_64, image_size=512, class_cond=True),
    "imagenet-64": Flags(**_IMPROVED, image_size=64),
    "cifar10": Flags(**_IMPROVED, image_size=32),
}
"""The flags of published weights, from the READMEs of openai/guided-diffusion and openai/improved-diffusion."""


class Told(nn.Module):
    """A UNet2DModel that is called with times of the schedule and told them as in training.

    Arguments:
        network: The UNet2DModel.
        flags: What it was trained with.
    """

    def __init__(self, network: nn.Module, flags: Flags) -> None:
        super().__init__()
        self.network = network
        self.flags = flags

    def forward(
        self, images: Float[Tensor, "n 3 h w"], times: Int[Tensor, " n"], class_labels: Int[Tensor, " n"] | None = None
    ) -> Any:
        """What UNet2DModel returns.

        Raises:
            ValueError: If the images cannot be halved as often as the network does.
        """
        height, width = images.shape[-2:]
        if height % self.flags.divisor or width % self.flags.divisor:
            raise ValueError(
                f"the images are {width}x{height}; this network halves them {len(self.flags.widths) - 1} times, "
                f"so sides must be multiples of {self.flags.divisor}; resize or crop the images"
            )
        rescaled = times.float() * (1000.0 / self.flags.diffusion_steps) if self.flags.rescale_timesteps else times
        return self.network(images, rescaled, class_labels=class_labels)


def unet(flags: Flags) -> nn.Module:
    """The UNet2DModel of a network of guided-diffusion, without its weights."""
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    plain = "Resnet{}sampleBlock2D" if flags.resblock_updown else "{}Block2D"
    change = "resnet" if flags.resblock_updown else "conv"
    network: nn.Module = UNet2DModel(
        in_channels=3,
        out_channels=6 if flags.learn_sigma else 3,
        block_out_channels=flags.widths,
        layers_per_block=flags.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if here else plain.format("Down") for here in flags.attention),
        up_block_types=tuple("AttnUpBlock2D" if here else plain.format("Up") for here in flags.attention[::-1]),
        downsample_type=change,
        upsample_type=change,
        attention_head_dim=flags.num_head_channels or gcd(*flags.attended),
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,  # else the middle would attend without a norm where time scales and shifts
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if flags.use_scale_shift_norm else "default",
        time_embedding_dim=4 * flags.num_channels,
        num_class_embeds=flags.num_classes if flags.class_cond else None,
    )
    network.time_proj = Timesteps(flags.num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    network.time_embedding = TimestepEmbedding(flags.num_channels, 4 * flags.num_channels)
    for module in network.modules():
        if isinstance(module, Attention):
            module.heads = flags.heads(module.inner_dim)
            module.scale = (module.inner_dim / module.heads) ** -0.5  # read by some of diffusers' processors
    return network


def mapped(state: Mapping[str, Tensor], flags: Flags, network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network of guided-diffusion under the names and in the shapes of `unet(flags)`, as views.

    Arguments:
        state: By their names there.
        flags: What it was trained with.
        network: `unet(flags)`, on whatever device, for its shapes.

    Raises:
        ValueError: If one is missing, has no place, or has another shape.
    """
    expected = network.state_dict()
    blocks = dict(_blocks(flags))
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for name, part in _renamed(key, value, blocks, flags):
            if name not in expected or name in found:
                raise ValueError(f"{key} has no place in this architecture")
            if part.shape != expected[name].shape:
                becomes = f"which becomes {tuple(part.shape)}, not {tuple(expected[name].shape)}"
                raise ValueError(f"{key} is {tuple(value.shape)}, {becomes}")
            found[name] = part
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first what is {missing[0]} in UNet2DModel")
    return found


_KEY = re.compile(
    r"(time_embed\.\d+|label_emb|input_blocks\.\d+\.\d+|middle_block\.\d+|output_blocks\.\d+\.\d+|out\.\d+)"
    r"(?:\.(.+))?\.(weight|bias)"
)
_PARTS = {
    None: "",
    "in_layers.0": ".norm1",
    "in_layers.2": ".conv1",
    "emb_layers.1": ".time_emb_proj",
    "out_layers.0": ".norm2",
    "out_layers.3": ".conv2",
    "skip_connection": ".conv_shortcut",
    "norm": ".group_norm",
    "proj_out": ".to_out.0",
    "op": ".conv",
    "conv": ".conv",
}


def _renamed(key: str, value: Tensor, blocks: Mapping[str, str], flags: Flags) -> Iterator[tuple[str, Tensor]]:
    """The name and the value of the one weight, or of the three, that a weight becomes."""
    match = _KEY.fullmatch(key)
    block, part, kind = match.groups() if match else ("", "", "")
    if block not in blocks or (part != "qkv" and part not in _PARTS):
        raise ValueError(f"{key} has no place in this architecture")
    if part in ("qkv", "proj_out"):
        value = value.flatten(1) if value.ndim > 1 else value  # convolutions over a sequence, of one position
    if part != "qkv":
        yield f"{blocks[block]}{_PARTS[part]}.{kind}", value
        return
    width = value.shape[0] // 3 if value.ndim else 0
    heads = flags.heads(width)
    if not width or not heads or value.shape[0] != 3 * width:
        raise ValueError(f"{key} is {tuple(value.shape)}, which are not queries, keys and values of the heads")
    axes = (1, heads) if flags.use_new_attention_order else (heads, 1)
    split = value.unflatten(0, (axes[0], 3, axes[1], width // heads))
    for name, rows in zip("qkv", split.unbind(1), strict=True):
        yield f"{blocks[block]}.to_{name}.{kind}", rows.flatten(0, 2)


def _blocks(flags: Flags) -> Iterator[tuple[str, str]]:
    """The names of all blocks there, and in UNet2DModel."""
    yield from {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }.items()
    last = len(flags.widths) - 1
    position = 0
    for level, attended in enumerate(flags.attention):
        for block in range(flags.num_res_blocks):
            position += 1
            yield f"input_blocks.{position}.0", f"down_blocks.{level}.resnets.{block}"
            if attended:
                yield f"input_blocks.{position}.1", f"down_blocks.{level}.attentions.{block}"
        if level < last:
            position += 1
            yield f"input_blocks.{position}.0", f"down_blocks.{level}.downsamplers.0"
    position = 0
    for level, attended in enumerate(reversed(flags.attention)):
        for block in range(flags.num_res_blocks + 1):
            yield f"output_blocks.{position}.0", f"up_blocks.{level}.resnets.{block}"
            if attended:
                yield f"output_blocks.{position}.1", f"up_blocks.{level}.attentions.{block}"
            if level < last and block == flags.num_res_blocks:
                yield f"output_blocks.{position}.{2 if attended else 1}", f"up_blocks.{level}.upsamplers.0"
            position += 1
