"""VRT, the Video Restoration Transformer (Liang et al., arXiv 2201.12288).

Axes: B clips, D frames, C channels, H height, W width; R reach, the neighbours on one side of a frame. Clips are (B, D, C, H, W); between
`conv_first` and the head features are channels last, (B, D, H, W, C), as LayerNorm, Linear and the windows want them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrt.model.deformable import ParallelAlignment
from vrt.model.head import FrameConv, UpsampleBy4
from vrt.model.linear import Linear
from vrt.model.spynet import SpyNet
from vrt.model.stage import ReconstructionGroup, Reshape, Stage, depth_to_space, space_to_depth, unchanged
from vrt.model.warp import back_in_time, both_ways, extend_reach, gather_nearest4, pad_frames
from vrt.model.windows import Size

BODY = 7
"""Stages of the U-shaped body; the entries of `depths` beyond it are reconstruction groups."""
HEAD_CHANNELS = 64
MULTIPLE = 8
"""The body halves the sides three times."""


class VRT(nn.Module):
    """Restores the frames of a clip with the help of their neighbours: super-resolution, deblurring, denoising, frame interpolation.

    The arguments carry the names of the published training files. A stage is a part of the body or a reconstruction group; lists have an
    entry for each.

    upscale: side of the output by that of the input: 1 or 4, with `pa_frames` 0 only 1.
    in_chans, out_chans: channels of a frame that goes in, without the noise level, and of all that comes out: 3 and 3; with `pa_frames` 0
    3 for each frame in between.
    img_size: (frames, height, width) of the training input. With `pa_frames` 0 a clip must have as many frames; nothing else depends on it.
    window_size: (frames, height, width) of the windows of self attention, in pixels of a stage's scale. Those of mutual attention have two
    frames.
    depths: blocks of each stage: seven for the body, at scales 1, 1/2, 1/4, 1/8, 1/4, 1/2, 1, then one or more reconstruction groups.
    indep_reconsts: the reconstruction groups, counted over all of `depths` from 0, whose windows span one frame.
    embed_dims: channels of each stage, multiples of its heads and, in the body, of 4 and of `pa_frames` / 2. Stages of the body that have one
    scale are equally wide, and so are all reconstruction groups.
    num_heads: attention heads of each stage.
    mul_attn_ratio: share, in [0, 1], of the blocks of a stage of the body that have mutual attention beside self attention, rounded down.
    mlp_ratio: hidden channels of a block's MLP by the block's own.
    qkv_bias: whether the projections to queries, keys and values have a bias.
    drop_path_rate: in [0, 1), how likely in training a sample skips a residual branch of the last block; linear over all of `depths`, from 0.
    pa_frames: neighbours aligned to each frame, on both sides together: 2, 4 or 6. 0: nothing is aligned, and what is made are the frames in
    between.
    deformable_groups: groups of channels that the alignment moves independently; a multiple of `pa_frames` / 2 that divides the channels of
    the neighbours on one side. Without a meaning for `pa_frames` 0.
    nonblind_denoising: whether the input has the noise level as a further channel; not with `pa_frames` 0.
    use_checkpoint: keep the inputs of blocks and alignments alone, and compute the rest anew for their gradients: less memory, the same result.

    Raises ValueError where the arguments don't fit one another.
    """

    def __init__(
        self,
        upscale: int = 4,
        in_chans: int = 3,
        out_chans: int = 3,
        img_size: Sequence[int] = (6, 64, 64),
        window_size: Sequence[int] = (6, 8, 8),
        depths: Sequence[int] = (8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4),
        indep_reconsts: Sequence[int] = (11, 12),
        embed_dims: Sequence[int] = (120, 120, 120, 120, 120, 120, 120, 180, 180, 180, 180, 180, 180),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6),
        mul_attn_ratio: float = 0.75,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.2,
        pa_frames: int = 2,
        deformable_groups: int = 16,
        nonblind_denoising: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_kind(pa_frames, upscale, in_chans, out_chans, nonblind_denoising)
        _check_stages(depths, embed_dims, num_heads, indep_reconsts)
        _check_alignment(embed_dims, pa_frames, deformable_groups)
        _check_shares(mul_attn_ratio, drop_path_rate)
        self.upscale, self.in_chans, self.out_chans, self.frames = upscale, in_chans, out_chans, img_size[0]
        self.reach, self.nonblind_denoising = pa_frames // 2, nonblind_denoising
        # Four pixels around the point a flow leads to, from both sides, beside the frame itself.
        aligned_chans = 9 * in_chans if pa_frames else in_chans
        self.conv_first = FrameConv(aligned_chans + nonblind_denoising, embed_dims[0])
        if pa_frames:
            self.spynet = SpyNet()

        window: Size = tuple(window_size)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        shared = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "use_checkpoint": use_checkpoint}
        for i, (depth, dim, heads) in enumerate(zip(depths[:BODY], embed_dims, num_heads)):
            farthest = 10 / 2 ** _halvings(i)
            alignment = ParallelAlignment(dim, self.reach, deformable_groups, farthest, keep=use_checkpoint) if pa_frames else None
            mutual_blocks = int(depth * mul_attn_ratio)
            stage = Stage(_reshape(i, embed_dims), dim, heads, window, mutual_blocks, rates[i].tolist(), alignment=alignment, **shared)
            self.add_module(f"stage{i + 1}", stage)
        self.stage8 = nn.ModuleList([Reshape(unchanged, embed_dims[BODY - 1], embed_dims[BODY])])
        for i in range(BODY, len(depths)):
            own_window = (1, *window[1:]) if i in indep_reconsts else window
            self.stage8.append(ReconstructionGroup(embed_dims[i], num_heads[i], own_window, rates[i].tolist(), **shared))
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.conv_after_body = Linear(embed_dims[-1], embed_dims[0])
        self._add_head(embed_dims[0])
        self.apply(_reset_linear)

    def _add_head(self, dim: int) -> None:
        if not self.reach:
            self.linear_fuse = nn.Conv2d(dim * self.frames, HEAD_CHANNELS, 1)
            self.conv_last = nn.Conv2d(HEAD_CHANNELS, self.out_chans, 7)
        elif self.upscale == 1:
            self.conv_last = FrameConv(dim, self.out_chans)
        else:
            self.conv_before_upsample = nn.Sequential(FrameConv(dim, HEAD_CHANNELS), nn.LeakyReLU())
            self.upsample = UpsampleBy4(HEAD_CHANNELS)
            self.conv_last = FrameConv(HEAD_CHANNELS, self.out_chans)

    def forward(self, clip: Tensor) -> Tensor:
        """Restore a clip.

        clip: (B, D, C, H, W), RGB in [0, 1], float32 or float64; with `nonblind_denoising` a fourth channel holds the noise level,
        in the same units. Returns (B, D, 3, H * upscale, W * upscale), not clamped; with pa_frames 0 the frames in between,
        (B, out_chans // 3, 3, H, W).

        Raises ValueError for other numbers of dimensions or channels, and for sides that are no multiples of 8.
        """
        self._check_clip(clip)
        frames = clip[:, :, : self.in_chans]
        if not self.reach:
            return self._interpolate(frames)
        flows = self.flows(frames)
        x = torch.cat((frames, *self._gather_neighbours(frames, flows[0] if flows else None), clip[:, :, self.in_chans :]), dim=2)
        return self._restore(self._features(x, flows), frames)

    def flows(self, frames: Tensor) -> list[Tensor]:
        """The flows to the R frames on either side, at the scales s = 1, 2, 4, 8; none for a clip of one frame.

        frames: (B, D, 3, H, W). Returns tensors (2B, D-1, R, 2, H/s, W/s) as `both_ways` orders them: in the first half entry (t, r) warps
        frame t+1+r to frame t, in the second the same holds for the clip played backwards; zeros beyond the clip.
        """
        if frames.shape[1] == 1:
            return []
        return [extend_reach(adjacent, self.reach) for adjacent in self.spynet(both_ways(frames))]

    def _gather_neighbours(self, frames: Tensor, flows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two of (B, D, 4C, H, W): what the right and the left neighbour of each frame show where the frame's pixels went."""
        batch, depth, channels, height, width = frames.shape
        if flows is None:
            missing = frames.new_zeros(batch, depth, 4 * channels, height, width)
            return missing, missing
        gathered = gather_nearest4(both_ways(frames)[:, 1:].flatten(0, 1), flows[:, :, 0].flatten(0, 1))
        return back_in_time(pad_frames(gathered.view(2 * batch, depth - 1, 4 * channels, height, width), depth))

    def _features(self, x: Tensor, flows: list[Tensor]) -> Tensor:
        """(B, D, C, H, W) -> (B * D, embed_dims[0], H, W): first convolution, body, reconstruction groups, residual."""
        batch, depth = x.shape[:2]
        first = self.conv_first(x.flatten(0, 1))
        x = first.unflatten(0, (batch, depth)).permute(0, 1, 3, 4, 2)
        x = self._body(x, flows or [None] * 4)
        for group in self.stage8:
            x = group(x)
        x = self.conv_after_body(self.norm(x))
        return first + x.permute(0, 1, 4, 2, 3).flatten(0, 1)

    def _body(self, x: Tensor, flows: list[Tensor | None]) -> Tensor:
        """(B, D, H, W, C) -> the same, by way of the scales 1/2, 1/4 and 1/8."""
        full, half, quarter, eighth = flows
        x1 = self.stage1(x, full)
        x2 = self.stage2(x1, half)
        x3 = self.stage3(x2, quarter)
        x4 = self.stage4(x3, eighth)
        x = self.stage5(x4, quarter)
        x = self.stage6(x + x3, half)
        x = self.stage7(x + x2, full)
        return x + x1

    def _restore(self, features: Tensor, frames: Tensor) -> Tensor:
        """features (B * D, C, H, W), frames (B, D, 3, H, W) -> (B, D, 3, H * upscale, W * upscale): the correction plus the input."""
        base = frames.flatten(0, 1)
        if self.upscale > 1:
            features = self.upsample(self.conv_before_upsample(features))
            base = F.interpolate(base, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        return (self.conv_last(features) + base).unflatten(0, frames.shape[:2])

    def _interpolate(self, frames: Tensor) -> Tensor:
        """(B, D, 3, H, W) -> the frames in between, (B, out_chans // 3, 3, H, W)."""
        mean = frames.mean(dim=(1, 3, 4), keepdim=True)
        features = self._features(frames - mean, [])
        features = features.unflatten(0, frames.shape[:2]).flatten(1, 2)
        fused = F.leaky_relu(self.linear_fuse(features), 0.2)
        between = self.conv_last(_reflected(_reflected(fused, 3, -1), 3, -2))
        return between.unflatten(1, (-1, self.in_chans)) + mean

    def _check_clip(self, clip: Tensor) -> None:
        channels = self.in_chans + self.nonblind_denoising
        if clip.dim() != 5:
            raise ValueError(f"clip: expected 5 dimensions (B, D, C, H, W), found {clip.dim()}, {tuple(clip.shape)}; add the missing with unsqueeze")
        if not clip.is_floating_point():
            raise ValueError(f"clip: expected floating point in [0, 1], found {clip.dtype}; divide 8-bit frames by 255")
        _, depth, found, height, width = clip.shape
        if found != channels:
            meaning = "RGB and the noise level" if self.nonblind_denoising else "RGB"
            raise ValueError(f"clip: expected {channels} channels ({meaning}), found {found} in {tuple(clip.shape)}; order it as (B, D, C, H, W)")
        if depth < 1 or (not self.reach and depth != self.frames):
            expected = "at least 1 frame" if self.reach else f"{self.frames} frames, as the network was built for"
            raise ValueError(f"clip: expected {expected}, found {depth}; cut the video into such clips")
        if height < MULTIPLE or width < MULTIPLE or height % MULTIPLE or width % MULTIPLE:
            larger = " x ".join(str(max(-(-side // MULTIPLE), 1) * MULTIPLE) for side in (height, width))
            raise ValueError(
                f"clip: expected height and width as multiples of {MULTIPLE}, {MULTIPLE} x {MULTIPLE} or more, found {height} x {width}; "
                f"pad it to {larger} and crop the result"
            )


def _reflected(x: Tensor, width: int, axis: int) -> Tensor:
    """`x`, longer by `width` at both ends of an axis, mirrored without the edge. PyTorch's own padding has no deterministic gradient on a GPU."""
    length = x.shape[axis]
    before, after = x.narrow(axis, 1, width), x.narrow(axis, length - 1 - width, width)
    return torch.cat([before.flip(axis), x, after.flip(axis)], axis)


def _halvings(stage: int) -> int:
    """How often the sides are halved in a stage of the body, counted from 0: 0 1 2 3 2 1 0."""
    return min(stage, BODY - 1 - stage)


def _reshape(stage: int, dims: Sequence[int]) -> Reshape:
    """The entry of a stage of the body, counted from 0."""
    if stage == 0:
        return Reshape(unchanged, dims[0], None)
    before, dim = dims[stage - 1], dims[stage]
    if stage <= BODY // 2:
        return Reshape(space_to_depth, 4 * before, dim)
    return Reshape(depth_to_space, before // 4, dim)


def _reset_linear(module: nn.Module) -> None:
    """The start of training: small weights, so that every residual branch begins near the identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_kind(pa_frames: int, upscale: int, in_chans: int, out_chans: int, nonblind_denoising: bool) -> None:
    if pa_frames not in (0, 2, 4, 6):
        raise ValueError(f"pa_frames: expected 0, 2, 4 or 6, found {pa_frames}; it counts the neighbours on both sides")
    if upscale not in ((1, 4) if pa_frames else (1,)):
        raise ValueError(f"upscale: expected 1 or 4 (1 with pa_frames 0), found {upscale}")
    if in_chans != 3:
        raise ValueError(f"in_chans: expected 3, found {in_chans}; a noise level is asked for by nonblind_denoising")
    if out_chans < 3 or out_chans % 3 or (pa_frames and out_chans != 3):
        raise ValueError(f"out_chans: expected 3 (with pa_frames 0, 3 per frame in between), found {out_chans}")
    if nonblind_denoising and not pa_frames:
        raise ValueError(f"nonblind_denoising: expected False with pa_frames 0, which takes RGB alone, found {nonblind_denoising}")


def _check_stages(depths: Sequence[int], embed_dims: Sequence[int], num_heads: Sequence[int], indep_reconsts: Sequence[int]) -> None:
    if len(depths) <= BODY:
        raise ValueError(f"depths: expected {BODY} entries for the body and at least 1 more, found {len(depths)}")
    for name, values in (("embed_dims", embed_dims), ("num_heads", num_heads)):
        if len(values) != len(depths):
            raise ValueError(f"{name}: expected {len(depths)} entries, one per entry of depths, found {len(values)}")
        for i, value in enumerate(values):
            if value < 1:
                raise ValueError(f"{name}[{i}]: expected 1 or more, found {value}")
    for i, (dim, heads) in enumerate(zip(embed_dims, num_heads)):
        if dim % heads:
            raise ValueError(f"embed_dims[{i}]: expected a multiple of num_heads[{i}] = {heads}, found {dim}")
        if i < BODY and dim % 4:
            raise ValueError(f"embed_dims[{i}]: expected a multiple of 4 (position encoding, changes of scale), found {dim}")
        # What a scale has on the way down is added where it is reached again.
        same, why = (_halvings(i), "whose features are added to it") if i < BODY else (BODY, "since all reconstruction groups are equally wide")
        if dim != embed_dims[same]:
            raise ValueError(f"embed_dims[{i}]: expected {embed_dims[same]}, as embed_dims[{same}], {why}, found {dim}")
    if any(not BODY <= i < len(depths) for i in indep_reconsts):
        raise ValueError(f"indep_reconsts: expected entries from {BODY} to {len(depths) - 1}, found {list(indep_reconsts)}")


def _check_alignment(embed_dims: Sequence[int], pa_frames: int, deformable_groups: int) -> None:
    reach = pa_frames // 2
    for i, dim in enumerate(embed_dims[:BODY] if reach else ()):
        if dim % reach:
            raise ValueError(f"embed_dims[{i}]: expected a multiple of {reach} (pa_frames / 2), found {dim}")
        if deformable_groups < 1 or dim * reach % deformable_groups or deformable_groups % reach:
            raise ValueError(
                f"deformable_groups: expected a multiple of {reach} (pa_frames / 2) that divides "
                f"embed_dims[{i}] * {reach} = {dim * reach}, found {deformable_groups}"
            )


def _check_shares(mul_attn_ratio: float, drop_path_rate: float) -> None:
    if not 0 <= mul_attn_ratio <= 1:
        raise ValueError(f"mul_attn_ratio: expected a number in [0, 1], found {mul_attn_ratio}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate: expected a number in [0, 1), found {drop_path_rate}")
