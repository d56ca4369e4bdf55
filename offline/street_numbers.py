"""Rendered street numbers: the stand-in for SVHN where that cannot be had.

The idea is that of Synthetic Digits -> SVHN (Ganin and Lempitsky 2015, section 4): font glyphs
with the disturbances of a street photograph. Glyphs are kept as signed distance fields, so that
stroke weight and outlines are one addition each, and a whole batch of crops is composed at once:
geometry -> plate -> digits -> light -> camera. `render_street_numbers` is the way in.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A face is a font file of matplotlib's mpl-data/fonts/ttf and its glyphs for 0..9, a bare "1" (I)
# and a flat-topped "3" (the letter ezh, where the font has one).
_PLAIN = "0123456789I3"
_EZH = "0123456789I\u01b7"
_STIX_SANS = "".join(chr(0x1D7E2 + i) for i in range(10)) + chr(0x1D5A8) + chr(0x1D7E5)
_STIX_SANS_BOLD = "".join(chr(0x1D7EC + i) for i in range(10)) + chr(0x1D5DC) + chr(0x1D7EF)
_STIX_MONO = "".join(chr(0x1D7F6 + i) for i in range(10)) + chr(0x1D678) + chr(0x1D7F9)
_MONO_O = "O" + _EZH[1:]  # DejaVu Sans Mono dots its zero, house numbers do not

FONT_FAMILIES = {
    "DejaVu Sans": (
        ("DejaVuSans.ttf", _EZH),
        ("DejaVuSans-Bold.ttf", _EZH),
        ("DejaVuSans-Oblique.ttf", _EZH),
        ("DejaVuSans-BoldOblique.ttf", _EZH),
        ("DejaVuSansMono.ttf", _MONO_O),
        ("DejaVuSansMono-Bold.ttf", _MONO_O),
    ),
    "STIX": (
        ("STIXGeneral.ttf", _PLAIN),
        ("STIXGeneralBol.ttf", _PLAIN),
        ("STIXGeneralItalic.ttf", _PLAIN),
        ("STIXGeneralBolIta.ttf", _PLAIN),
    ),
    "STIX Sans": (("STIXGeneral.ttf", _STIX_SANS), ("STIXGeneral.ttf", _STIX_SANS_BOLD)),
    "STIX Mono": (("STIXGeneral.ttf", _STIX_MONO),),
    "Computer Modern": (("cmr10.ttf", _PLAIN), ("cmb10.ttf", _PLAIN)),
    "Computer Modern Typewriter": (("cmtt10.ttf", _PLAIN),),
}

_LENGTH_SHARES = (0.08, 0.42, 0.34, 0.16)  # shares of the digits in numbers of length 1, 2, 3, 4

_SIZE = 32  # pixels of a crop's side
_FIELD_SAMPLES = 64  # along each side of a glyph's distance field
_FIELD_REACH = 0.8  # digit heights from a field's center to its sides
_CHUNK = 250  # crops rendered at once
_THICK_HALF_STROKE = 0.105  # digit heights; strokes thinner than this may grow, thicker ones hardly


@functools.cache
def _glyph_fields(filename: str, characters: str) -> tuple[Tensor, Tensor, float]:
    """Signed distance fields of one face: K x 64 x 64, half widths K, and half stroke width.

    Lengths are in digit heights; the field is positive inside the ink. Every glyph is scaled to
    height 1 and centered on its ink, so that old-style figures come out even too.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / filename
    font = ImageFont.truetype(str(path), 200)
    side = 2 * _FIELD_SAMPLES  # draw at twice the field's resolution
    height = side / 2 / _FIELD_REACH  # of a digit, in drawn pixels
    fields, half_widths, half_strokes = [], [], []
    for character in characters:
        left, top, right, bottom = font.getbbox(character)
        ink = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=font)
        ink = ink.crop(ink.getbbox())
        width = max(1, round(ink.width * height / ink.height))
        canvas = Image.new("L", (side, side), 0)
        corner = ((side - width) // 2, round((side - height) / 2))
        canvas.paste(ink.resize((width, round(height)), Image.Resampling.LANCZOS), corner)

        inside = np.asarray(canvas) > 127
        distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
        field = torch.from_numpy(distance / height).float()
        fields.append(F.avg_pool2d(field[None, None], 2)[0, 0])
        half_widths.append(width / 2 / height)
        # A stroke's area is length x width; its two edges have 2 x length pixels. So area over edge
        # pixels is half the width.
        edges = inside & (distance < 1.5)
        half_strokes.append(inside.sum() / edges.sum() / height)
    return torch.stack(fields), torch.tensor(half_widths), float(np.median(half_strokes))


def _uniform(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Numbers drawn evenly from low to high."""
    return torch.empty(shape).uniform_(low, high, generator=rng)


def _normal(rng: torch.Generator, std: float, *shape: int) -> Tensor:
    """Normal numbers around 0 with the standard deviation `std`."""
    return torch.empty(shape).normal_(0.0, std, generator=rng)


def _chance(rng: torch.Generator, probability: float, *shape: int) -> Tensor:
    """1.0 with the given probability, else 0.0."""
    return (torch.rand(shape, generator=rng) < probability).float()


def _smooth_noise(rng: torch.Generator, n: int, channels: int, cells: int) -> Tensor:
    """n x channels x 32 x 32 of smooth noise, of a variance near 0.8, with `cells` bumps a side."""
    coarse = _normal(rng, 1.0, n, channels, cells, cells)
    return F.interpolate(coarse, size=_SIZE, mode="bicubic", align_corners=False)


def _pixel_grid() -> tuple[Tensor, Tensor]:
    """x and y of the pixel centers, 1 x 32 x 32 each, in -1..1."""
    line = (torch.arange(_SIZE) + 0.5) * 2 / _SIZE - 1
    return line.view(1, 1, -1).expand(1, _SIZE, -1), line.view(1, -1, 1).expand(1, -1, _SIZE)


class _Signboard(NamedTuple):
    """Where the pixels of each crop fall on the sign that carries the number."""

    u: Tensor  # n x 32 x 32, along the number, in digit heights
    v: Tensor  # n x 32 x 32, downwards, in digit heights
    scale: Tensor  # n x 1 x 1, pixels in a digit height


def _random_signboard(rng: torch.Generator, n: int) -> _Signboard:
    """Signs of random size, seen at random angles, slanted and warped a little."""
    x, y = _pixel_grid()
    digit_share = _uniform(rng, 0.52, 0.94, n, 1, 1)  # a digit's height over the crop's side
    # Perspective: how near a place on the sign is, 1 in the middle of the crop; near is large.
    nearness = 1 + _normal(rng, 0.07, n, 1, 1) * x + _normal(rng, 0.05, n, 1, 1) * y
    # The digit stands a little beside the crop's middle.
    x = x / nearness - _normal(rng, 0.07, n, 1, 1)
    y = y / nearness - _normal(rng, 0.06, n, 1, 1)
    turn = _normal(rng, 0.10, n, 1, 1)  # radians
    u = turn.cos() * x + turn.sin() * y
    v = turn.cos() * y - turn.sin() * x
    u = u + _normal(rng, 0.16, n, 1, 1) * v  # slant
    v = v + _normal(rng, 0.06, n, 1, 1) * u  # the baseline climbs
    u = u / (2 * digit_share)  # a crop's side is 2 in x and y
    v = v / (2 * digit_share)
    wobble = _smooth_noise(rng, n, 2, 5) * _uniform(rng, 0.0, 0.035, n, 1, 1, 1)
    return _Signboard(u + wobble[:, 0], v + wobble[:, 1], digit_share * _SIZE)


def _choose_glyphs(rng: torch.Generator, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Glyphs in the five places around the target (n x 5) and which of them exist (n x 5).

    A digit three places away is left out: it would seldom lie within the crop.
    """
    n = len(labels)
    share = torch.tensor(_LENGTH_SHARES)
    length = torch.multinomial(share, n, replacement=True, generator=rng) + 1
    # Positions in the number, from 0: of the target, and of the digit in each place around it.
    target_position = (torch.rand(n, generator=rng) * length).long()
    position = target_position[:, None] + torch.arange(-2, 3)
    glyphs = torch.randint(0, 10, (n, 5), generator=rng)
    glyphs[:, 2] = labels
    glyphs[(glyphs == 1) & (torch.rand(n, 5, generator=rng) < 0.25)] = 10  # a bare stroke
    glyphs[(glyphs == 3) & (torch.rand(n, 5, generator=rng) < 0.15)] = 11  # a flat top
    exists = (position >= 0) & (position < length[:, None])
    return glyphs, exists


class _Faces(NamedTuple):
    """The glyphs of all faces, and the face of each crop."""

    fields: Tensor  # faces x 12 x 64 x 64, as of _glyph_fields
    half_widths: Tensor  # faces x 12, in digit heights
    half_strokes: Tensor  # faces, half of a stroke's width, in digit heights
    chosen: Tensor  # n, the face of each crop


def _choose_faces(rng: torch.Generator, n: int) -> _Faces:
    """All faces, and one for each crop.

    A face weighs 1 / sqrt(faces of its family): a family with four faces is chosen twice as often
    as a family with a single one.
    """
    family_of, measured_faces = [], []
    for number, family in enumerate(FONT_FAMILIES.values()):
        for face in family:
            family_of.append(number)
            measured_faces.append(_glyph_fields(*face))
    fields, half_widths, half_strokes = zip(*measured_faces, strict=True)
    family_size = torch.bincount(torch.tensor(family_of))[family_of]
    share = 1.0 / family_size.float().sqrt()
    chosen = torch.multinomial(share, n, replacement=True, generator=rng)
    return _Faces(torch.stack(fields), torch.stack(half_widths), torch.tensor(half_strokes), chosen)


class _Places(NamedTuple):
    """Where the five digits of each crop stand on the sign, in digit heights."""

    center: Tensor  # n x 5, on u
    drop: Tensor  # n x 5, on v: how much lower than the target
    left: Tensor  # n x 1 x 1, where the number begins on u
    right: Tensor  # n x 1 x 1, where it ends


def _place_digits(rng: torch.Generator, half_widths: Tensor, exists: Tensor) -> _Places:
    """The five places around the target, for digits of given half widths (n x 5)."""
    n = len(half_widths)
    gap = _uniform(rng, -0.02, 0.2, n, 1) + 0.1 * _normal(rng, 1.0, n, 1).clamp(min=0)
    step = half_widths[:, :-1] + half_widths[:, 1:] + gap  # between neighboring centers
    far_left, near_left, near_right, far_right = step.split(1, dim=1)
    target = torch.zeros(n, 1)
    center = torch.cat(
        [-near_left - far_left, -near_left, target, near_right, near_right + far_right], dim=1
    )
    stairs = torch.arange(-2, 3) * _normal(rng, 0.15, n, 1) * _chance(rng, 0.1, n, 1)
    drop = _normal(rng, 0.02, n, 5) + stairs
    drop[:, 2] = 0
    far = 9.0  # digit heights: beyond any digit
    begin = torch.where(exists, center - half_widths, far).amin(1)
    end = torch.where(exists, center + half_widths, -far).amax(1)
    return _Places(center, drop, begin.view(n, 1, 1), end.view(n, 1, 1))


class _HouseNumber(NamedTuple):
    """The ink of the number in each crop, in digit heights."""

    field: Tensor  # n x 32 x 32, distance to the ink's edge, positive inside
    left: Tensor  # n x 1 x 1, where the number begins on u
    right: Tensor  # n x 1 x 1, where it ends


class _Warp(NamedTuple):
    """How the glyphs of a crop differ from their font: n x 1 x 1 each."""

    waist_shift: Tensor  # moves the waist up or down
    taper: Tensor  # the head wider than the foot, or the reverse
    bowl: Tensor  # the waist narrower, head and foot wider, or the reverse


def _random_warp(rng: torch.Generator, n: int) -> _Warp:
    """A warp for each crop."""
    waist_shift = _uniform(rng, -0.35, 0.35, n, 1, 1)
    taper = _normal(rng, 0.10, n, 1, 1)
    return _Warp(waist_shift, taper, bowl=_normal(rng, 0.25, n, 1, 1))


def _warped(u: Tensor, v: Tensor, warp: _Warp) -> tuple[Tensor, Tensor]:
    """Where in its glyph each pixel looks, n x 32 x 32 each, in digit heights from the middle.

    A factor above 1 on u makes the digit narrower.
    """
    inner = (0.25 - v * v).clamp(min=0)  # 0 at head and foot, 0.25 at the waist
    narrower = 1 + warp.taper * v.clamp(-0.6, 0.6) + warp.bowl * (inner - 0.125)
    return u * narrower, v + warp.waist_shift * inner


def _look_up(glyph_fields: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Distances to the ink's edge at places of a glyph, n x 32 x 32, positive inside."""
    grid = torch.stack([u, v], dim=-1) / _FIELD_REACH  # the fields reach from -1 to 1
    fields = glyph_fields.unsqueeze(1)
    distance = F.grid_sample(fields, grid, padding_mode="border", align_corners=False)[:, 0]
    beyond_field = (grid.abs().amax(-1) - 1).clamp(min=0)
    return distance - beyond_field  # beyond the field any falling number will do


def _random_house_number(rng: torch.Generator, labels: Tensor, sign: _Signboard) -> _HouseNumber:
    """Numbers of one to four digits in random faces, with the digit `labels` in the middle."""
    n = len(labels)
    faces = _choose_faces(rng, n)
    glyphs, exists = _choose_glyphs(rng, labels)
    stretch = 0.85 * _normal(rng, 0.25, n, 1).exp().clamp(0.5, 1.5)
    half = faces.half_widths[faces.chosen[:, None], glyphs] * stretch
    places = _place_digits(rng, half, exists)

    warp = _random_warp(rng, n)  # few fonts, many shapes
    field = torch.full((n, _SIZE, _SIZE), -1.0)
    for place in range(5):
        glyph_u = (sign.u - places.center[:, place].view(n, 1, 1)) / stretch.view(n, 1, 1)
        glyph_v = sign.v - places.drop[:, place].view(n, 1, 1)
        glyph_field = faces.fields[faces.chosen, glyphs[:, place]]
        distance = _look_up(glyph_field, *_warped(glyph_u, glyph_v, warp))
        nearest_ink = torch.maximum(field, distance)
        field = torch.where(exists[:, place].view(n, 1, 1), nearest_ink, field)

    # A field that is raised everywhere has thicker strokes, one that is lowered has thinner ones.
    half_stroke = faces.half_strokes[faces.chosen].view(n, 1, 1)
    most_lowered = 0.25 * half_stroke
    most_raised = (_THICK_HALF_STROKE - half_stroke).clamp(min=0.005, max=0.05)
    raised = _uniform(rng, 0, 1, n, 1, 1) * (most_lowered + most_raised) - most_lowered
    return _HouseNumber(field + raised, places.left, places.right)


def _colors(rng: torch.Generator, n: int, luminance: Tensor) -> Tensor:
    """n x 3 x 1 x 1 colors of the given luminance (n): mostly dull, often blue or brown."""
    pick = torch.rand(n, generator=rng)
    is_blue = pick < 0.45
    is_brown = pick > 0.65
    is_any_hue = (pick > 0.45) & (pick < 0.65)  # pink and green too
    # A hue is an angle in the plane of (cb, cr): blue is about -0.6, brown about 2.4.
    spread = _uniform(rng, -1, 1, n)  # each color needs one hue only
    any_hue = np.pi * spread
    bluish = -0.6 + 0.3 * spread  # -0.9 to -0.3
    brownish = 2.4 + 0.35 * spread  # 2.05 to 2.75
    hue = torch.where(is_blue, bluish, any_hue)
    hue = torch.where(is_brown, brownish, hue)
    vivid = torch.rand(n, generator=rng)
    chroma = 0.07 * vivid + 0.7 * (vivid - 0.75).clamp(min=0)
    chroma = torch.where(is_any_hue, chroma / 2, chroma)  # seldom a strong pink or green
    cb, cr = chroma * hue.cos(), chroma * hue.sin()
    rgb = torch.stack(
        [luminance + 1.402 * cr, luminance - 0.344 * cb - 0.714 * cr, luminance + 1.772 * cb], 1
    )
    return rgb.clamp(0, 1).view(n, 3, 1, 1)


def _mix(below: Tensor, above: Tensor, cover: Tensor) -> Tensor:
    """Paint `above` over `below` (n x 3 x ...), with `cover` (n x 32 x 32) in 0..1."""
    return torch.lerp(below.expand(-1, -1, _SIZE, _SIZE), above, cover.unsqueeze(1))


def _shift(field: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """The field moved by (dx, dy) in half images (n x 1 x 1 each)."""
    x, y = _pixel_grid()
    grid = torch.stack([x - dx, y - dy], dim=-1)
    return F.grid_sample(field.unsqueeze(1), grid, padding_mode="border", align_corners=False)[:, 0]


def _coverage(depth: Tensor) -> Tensor:
    """From 0 to 1 over a width of one around an edge: 0.5 there, 1 where `depth` is 0.5 and more.

    With a depth in pixels, how much of a pixel is covered.
    """
    return (depth + 0.5).clamp(0, 1)


def _levels(rng: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast of the digits, luminance of the ground, luminance of the ink (n each, 0 to 1)."""
    contrast = torch.exp(_uniform(rng, np.log(0.15), np.log(0.85), n))
    middle = _uniform(rng, 0.0, 1.0, n) * (1 - contrast) + contrast / 2
    light_ink = torch.rand(n, generator=rng) < 0.45
    polarity = torch.where(light_ink, -1.0, 1.0)  # 1: dark digits on light ground
    ground_level = middle + polarity * contrast / 2
    ink_level = middle - polarity * contrast / 2
    return contrast, ground_level, ink_level


def _depth_in_plate(rng: torch.Generator, sign: _Signboard, number: _HouseNumber) -> Tensor:
    """Distance to the edge of a rectangle around the number, positive inside (n x 32 x 32).

    In six of ten crops that edge lies beyond the picture.
    """
    n = len(sign.u)
    margin_u = _uniform(rng, 0.08, 0.6, n, 1, 1)
    margin_v = _uniform(rng, 0.08, 0.5, n, 1, 1)
    from_ends = torch.minimum(sign.u - number.left, number.right - sign.u) + margin_u
    depth = torch.minimum(from_ends, 0.5 + margin_v - sign.v.abs())
    ends_in_crop = torch.rand(n, 1, 1, generator=rng) < 0.4
    depth_if_plate_fills_crop = depth + 4.0  # digit heights: no edge is near the crop
    return torch.where(ends_in_crop, depth, depth_if_plate_fills_crop)


def _frame(rng: torch.Generator, depth: Tensor, scale: Tensor) -> Tensor:
    """Cover (n x 32 x 32) of a line along the plate's edge, on four plates in ten.

    Where the edge lies beyond the picture, so does the line.
    """
    n = len(depth)
    inset = _uniform(rng, 0.0, 0.08, n, 1, 1)
    half_width = _uniform(rng, 0.02, 0.06, n, 1, 1)
    line = _coverage((half_width - (depth - inset).abs()) * scale)
    return line * _chance(rng, 0.4, n, 1, 1)


def _texture(rng: torch.Generator, contrast: Tensor) -> Tensor:
    """Grain of the wall, on some crops waves too (n x 32 x 32, added to the luminance)."""
    n = len(contrast)
    x, y = _pixel_grid()
    grain = _smooth_noise(rng, n, 1, 4) * 0.12 + _smooth_noise(rng, n, 1, 11) * 0.06
    angle = _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    across = angle.cos() * x + angle.sin() * y
    phase = 2 * angle  # any phase will do
    wave = (across * _uniform(rng, 4, 22, n, 1, 1) + phase).sin() * 0.12
    wave = wave * _chance(rng, 0.2, n, 1, 1)
    return (grain[:, 0] + wave) * torch.rand(n, 1, 1, generator=rng) * contrast.view(n, 1, 1)


def _add_relief(
    rng: torch.Generator, paint: Tensor, field: Tensor, scale: Tensor, ground_level: Tensor
) -> Tensor:
    """The paint with the sides of raised digits.

    On a third of the crops a soft shadow, on one in seven a bright copy on the opposite side.
    """
    n = len(field)
    reach = _uniform(rng, 0.04, 0.22, n, 1, 1)  # in half images, as `_shift` takes it
    towards = _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    dx, dy = reach * towards.cos(), reach * towards.sin()
    sharpness = _uniform(rng, 0.3, 1.0, n, 1, 1)
    shadow = torch.maximum(_shift(field, dx, dy), _shift(field, dx / 2, dy / 2))
    shadow = _coverage(shadow * scale * sharpness) * _uniform(rng, 0.2, 0.9, n, 1, 1)
    shade = _colors(rng, n, (ground_level * _uniform(rng, 0.1, 0.8, n)).clamp(0, 1))
    paint = _mix(paint, shade, shadow * _chance(rng, 0.35, n, 1, 1))

    glint = _coverage(_shift(field, -dx / 2, -dy / 2) * scale) * _chance(rng, 0.15, n, 1, 1)
    lit = _colors(rng, n, 1 - (1 - ground_level) * _uniform(rng, 0.2, 0.9, n))
    return _mix(paint, lit, glint * _uniform(rng, 0.2, 0.9, n, 1, 1))


def _paint(rng: torch.Generator, sign: _Signboard, number: _HouseNumber) -> tuple[Tensor, Tensor]:
    """Wall, plate, shadow, outline and digits (n x 3 x 32 x 32, about 0..1), and contrast (n)."""
    field, scale = number.field, sign.scale
    n = len(field)
    contrast, ground_level, ink_level = _levels(rng, n)
    ground = _colors(rng, n, ground_level)
    ink = _colors(rng, n, ink_level)
    wall = _colors(rng, n, 0.5 * torch.rand(n, generator=rng) + 0.5 * ground_level)

    depth = _depth_in_plate(rng, sign, number)
    paint = _mix(wall, ground, _coverage(depth * scale))
    paint = _mix(paint, ink, _frame(rng, depth, scale))
    paint = paint + _texture(rng, contrast).unsqueeze(1)
    paint = _add_relief(rng, paint, field, scale, ground_level)

    outline = _coverage((field + _uniform(rng, 0.02, 0.07, n, 1, 1)) * scale)
    # The rim is as bright as the ground, or the opposite of the ink.
    like_ground = torch.rand(n, generator=rng) < 0.5
    rim_level = torch.where(like_ground, ground_level, 1 - ink_level)
    rim = _colors(rng, n, (rim_level + _normal(rng, 0.15, n)).clamp(0, 1))
    paint = _mix(paint, rim, outline * _chance(rng, 0.15, n, 1, 1))

    sheen = sign.v * _normal(rng, 0.25, n, 1, 1) + sign.u * _normal(rng, 0.12, n, 1, 1)
    sheen = sheen.unsqueeze(1) * contrast.view(n, 1, 1, 1)
    wear = (1 + _smooth_noise(rng, n, 1, 6)[:, 0] * _uniform(rng, 0, 0.15, n, 1, 1)).clamp(0, 1)
    return _mix(paint, ink + sheen, _coverage(field * scale) * wear), contrast


def _light(rng: torch.Generator, image: Tensor, contrast: Tensor) -> Tensor:
    """Uneven light: a slope, a cast shadow with an edge, a vignette; weaker on faint digits."""
    n = len(image)
    amount = contrast.view(n, 1, 1)
    x, y = _pixel_grid()
    slope = (_normal(rng, 0.25, n, 1, 1) * x + _normal(rng, 0.25, n, 1, 1) * y) * amount
    angle = _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    side = angle.cos() * x + angle.sin() * y - _uniform(rng, -0.9, 0.9, n, 1, 1)
    steepness = _uniform(rng, 1, 10, n, 1, 1)  # the edge is 1 / steepness half images wide
    edge = _coverage(side * steepness)
    cast = edge * _uniform(rng, 0.2, 0.7, n, 1, 1) * amount * _chance(rng, 0.15, n, 1, 1)
    vignette = (x * x + y * y) * _uniform(rng, 0, 0.25, n, 1, 1) * amount
    return image * ((1 + slope) * (1 - cast) * (1 - vignette)).unsqueeze(1)


# The camera's steps take images of n x rows x 3 x columns. There a matrix along the rows and one
# along the columns are one product each for the whole batch, without a copy.


def _rows_of_sum_one(weight: Tensor) -> Tensor:
    """Each row scaled to sum 1: a resampling matrix."""
    return weight / weight.sum(-1, keepdim=True)


def _along_both_axes(left: Tensor, image: Tensor, right: Tensor) -> Tensor:
    """left @ image @ right in each color; left and right: n x 32 x 32, or 32 x 32."""
    n = len(image)
    # As a matrix of rows x (3 * columns): `left` mixes its rows.
    rows_mixed = left @ image.reshape(n, _SIZE, 3 * _SIZE)
    # The same numbers as a matrix of (rows * 3) x columns: `right` mixes its columns.
    both_mixed = rows_mixed.view(n, 3 * _SIZE, _SIZE) @ right
    return both_mixed.view(n, _SIZE, 3, _SIZE)


def _shrinking(photo_side: Tensor, blur: Tensor) -> Tensor:
    """The matrix (n x 32 x 32) that turns the rows of a scene into the rows of a photograph.

    A photograph's row averages the scene around its place there with a Gaussian of the deviation
    sqrt(blur^2 + alias^2): the lens's blur, and 0.35 of a photograph pixel against aliasing.
    """
    row = torch.arange(_SIZE, dtype=torch.float32)
    scene_per_photo = _SIZE / photo_side
    last_row = photo_side.ceil() - 1
    photo_row = torch.minimum(row.view(1, -1, 1), last_row)  # beyond the photograph: its last row
    center_in_scene = (photo_row + 0.5) * scene_per_photo - 0.5
    distance = row.view(1, 1, -1) - center_in_scene
    deviation = (blur**2 + (0.35 * scene_per_photo) ** 2).sqrt()
    return _rows_of_sum_one(torch.exp(-0.5 * (distance / deviation) ** 2))


def _photograph(rng: torch.Generator, image: Tensor, scale: Tensor, photo_side: Tensor) -> Tensor:
    """Photographs of the scenes `image`, `photo_side` a side (n x 1 x 1, not whole numbers).

    A photograph lies in the top left corner of 32 x 32 pixels, as those of a batch differ in size.
    The rows and columns beyond it repeat its last one; `_enlarge` gives them no weight.
    """
    n = len(image)
    blur = _uniform(rng, 0.004, 0.055, n, 1, 1) * scale
    smear = torch.exp(_normal(rng, 0.25, n, 1, 1))  # blurs differ along the two axes
    vertical = _shrinking(photo_side, blur * smear)
    horizontal = _shrinking(photo_side, blur / smear)
    return _along_both_axes(vertical, image, horizontal.mT)


def _add_noise(rng: torch.Generator, image: Tensor, amount: Tensor) -> Tensor:
    """Sensor noise: some in all colors alike, some in each by itself."""
    n = len(image)
    gray = _normal(rng, 1.0, n, _SIZE, 1, _SIZE) * _uniform(rng, 0, 0.05, n, 1, 1, 1)
    image = image + gray * amount
    color = _normal(rng, 1.0, n, _SIZE, 3, _SIZE) * _uniform(rng, 0, 0.04, n, 1, 1, 1)
    return image + color * amount


def _dct_matrix() -> Tensor:
    """Orthonormal 8-point DCT-II in each of the four 8-pixel blocks: 32 x 32."""
    k, t = torch.arange(8.0).view(-1, 1), torch.arange(8.0).view(1, -1)
    block = torch.cos(np.pi * (2 * t + 1) * k / 16) / 2
    block[0] /= 2**0.5
    blocks = [block] * (_SIZE // 8)
    return torch.block_diag(*blocks)


def _compress(rng: torch.Generator, image: Tensor, amount: Tensor) -> Tensor:
    """JPEG's way: the frequencies of 8 x 8 blocks are rounded, those of color more."""
    n = len(image)
    to_ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    dct = _dct_matrix()
    frequency = torch.arange(_SIZE) % 8
    steps = 1 + 0.6 * (frequency.view(-1, 1, 1) + frequency)
    strength = torch.exp(_uniform(rng, np.log(0.01), np.log(0.1), n, 1, 1, 1)) * amount
    table = strength * steps * torch.tensor([1.0, 1.8, 1.8]).view(1, 1, 3, 1)
    # A row of the image is a matrix of 3 x columns: `to_ycc @` mixes the colors of each pixel.
    coded = _along_both_axes(dct, to_ycc @ image, dct.mT)
    coded = (coded / table).round_().mul_(table)
    return torch.linalg.inv(to_ycc) @ _along_both_axes(dct.mT, coded, dct)


def _keys_kernel(distance: Tensor, a: Tensor) -> Tensor:
    """Keys' cubic kernel (1981): pieces below 1 and below 2, 0 beyond; `a` is its slope at 1."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    beyond_one = torch.where(distance < 2, far, 0.0)
    return torch.where(distance < 1, near, beyond_one)


def _enlarge(rng: torch.Generator, image: Tensor, photo_side: Tensor) -> Tensor:
    """From `photo_side` a side back to 32, by Keys' cubic kernel.

    It also gives the halos of a sharpened photograph.
    """
    row = torch.arange(_SIZE, dtype=torch.float32)
    position_in_photo = (row.view(1, -1, 1) + 0.5) * photo_side / _SIZE - 0.5
    distance = (row.view(1, 1, -1) - position_in_photo).abs()
    kernel = _keys_kernel(distance, a=-_uniform(rng, 0.0, 0.9, len(image), 1, 1))
    is_in_photo = row.view(1, 1, -1) < photo_side.ceil()
    matrix = _rows_of_sum_one(torch.where(is_in_photo, kernel, 0.0))
    return _along_both_axes(matrix, image, matrix.mT)


def _camera(rng: torch.Generator, image: Tensor, scale: Tensor, contrast: Tensor) -> Tensor:
    """Blur, a photograph of few pixels, sensor noise, JPEG blocks, enlargement with sharpening.

    image: n x 3 x 32 x 32; scale: pixels in a digit height, n x 1 x 1; contrast: n. Every linear
    step along one axis is a 32 x 32 matrix, so that the whole batch is a few matrix products.
    """
    n = len(image)
    amount = contrast.view(n, 1, 1, 1)
    # In pixels of the photograph: the height of a digit, and from it the photograph's side.
    height_in_photo = torch.exp(_uniform(rng, np.log(9.5), np.log(36), n, 1, 1))
    photo_side = (_SIZE * height_in_photo / scale).clamp(max=_SIZE)
    by_rows = image.permute(0, 2, 1, 3)  # n x rows x 3 x columns
    by_rows = _photograph(rng, by_rows, scale, photo_side)
    by_rows = _add_noise(rng, by_rows, amount)
    by_rows = _compress(rng, by_rows, amount)
    by_rows = _enlarge(rng, by_rows, photo_side)
    return by_rows.permute(0, 2, 1, 3).contiguous()


def _render_chunk(rng: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """n crops (uint8, n x 3 x 32 x 32) and their labels."""
    labels = torch.randint(0, 10, (n,), generator=rng)
    sign = _random_signboard(rng, n)
    number = _random_house_number(rng, labels, sign)
    image, contrast = _paint(rng, sign, number)
    image = _light(rng, image, contrast)
    image = _camera(rng, image, sign.scale, contrast)
    return (image * 255).round().clamp(0, 255).to(torch.uint8), labels


def render_street_numbers(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rendered crops of house numbers in SVHN's cropped-digit format.

    Returns `count` x 3 x 32 x 32 uint8 images and int64 labels 0 to 9, drawn uniformly. The label
    is the digit in the middle; most of its neighbors are cut by the crop. Same seed, same bytes,
    whatever the number of threads: the work is done in one. Torch's own random state is left
    alone. About 0.65 s a thousand crops. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
        chunks = [_render_chunk(rng, n) for n in sizes]
    finally:
        torch.set_num_threads(threads)
    images, labels = zip(*chunks, strict=True)
    return torch.cat(images), torch.cat(labels)


def cache_key() -> list[str]:
    """What decides how a crop looks: this file's text, comments too, and versions of libraries."""
    import matplotlib
    import PIL
    import scipy

    code = Path(__file__).read_text(encoding="utf-8")
    libraries = (matplotlib, PIL, scipy, torch)
    return [code, *(library.__version__ for library in libraries)]
