"""Decoding and cropping: every kind of file becomes the RGB that a viewer shows, or is rejected with a reason."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ig_dist.data import images
from ig_dist.data.images import RejectedImage, center_crop, decode_image, load_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(file: Path) -> NDArray[np.uint8]:
    image = load_rgb(file)
    assert image.mode == "RGB"
    return np.asarray(image)


def png16(file: Path, values: NDArray[np.uint16], color_type: int, transparent: bytes = b"") -> Path:
    """A 16-bit PNG written by hand: Pillow writes grey ones only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    trns = chunk(b"tRNS", transparent) if transparent else b""
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return file


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(8, 8, 0, 0), (8, 13, 0, 2), (13, 8, 2, 0), (8, 12, 0, 2), (15, 8, 3, 0)]
)
def test_a_picture_with_the_right_smaller_side_is_only_cut(height: int, width: int, top: int, left: int) -> None:
    picture = noise(height, width)
    assert np.array_equal(center_crop(Image.fromarray(picture), 8), picture[top : top + 8, left : left + 8])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (32, 48)])
def test_halving_is_the_mean_of_2_by_2_pixels(height: int, width: int) -> None:
    picture = noise(height, width)
    expected = picture.astype(int)
    while min(expected.shape[:2]) > 8:  # Pillow rounds after each direction, halves up
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
        expected = (expected[::2] + expected[1::2] + 1) // 2
    left = (expected.shape[1] - 8) // 2
    assert np.array_equal(center_crop(Image.fromarray(picture), 8), expected[:, left : left + 8])


def test_bicubic_between_the_halvings() -> None:
    # 20 x 30 with size 8: one halving to 10 x 15, then bicubic to 8 x 12, then columns 2 to 9
    picture = Image.fromarray(noise(20, 30))
    half = picture.resize((15, 10), Image.Resampling.BOX)
    expected = np.asarray(half.resize((12, 8), Image.Resampling.BICUBIC))[:, 2:10]
    assert np.array_equal(center_crop(picture, 8), expected)
    # 15 is less than 2 x 8: no halving
    picture = Image.fromarray(noise(15, 15))
    assert np.array_equal(center_crop(picture, 8), np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    "shape", [(500, 375), (333, 500), (401, 300), (301, 301), (256, 700), (90, 64), (64, 91), (40, 33), (130, 600)]
)
def test_columns_are_resized_before_rows_whatever_pillow_would_do(shape: tuple[int, int]) -> None:
    """Of tall pictures Pillow resizes the rows first since 13, and rounds between; references are made the old way."""
    picture = Image.fromarray(noise(shape[1], shape[0]))

    def resized(image: Image.Image, width: int, height: int, by: Image.Resampling) -> Image.Image:
        return image.resize((width, image.height), by).resize((width, height), by)

    for side in (256, 200, 64):
        image = picture
        while min(image.size) >= 2 * side:
            image = resized(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
        scale = side / min(image.size)
        image = resized(image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC)
        top, left = (image.height - side) // 2, (image.width - side) // 2
        assert np.array_equal(center_crop(picture, side), np.asarray(image)[top : top + side, left : left + side])


def test_a_small_picture_is_enlarged() -> None:
    assert center_crop(Image.fromarray(noise(3, 5)), 8).shape == (8, 8, 3)


def test_a_very_narrow_picture_is_rejected_before_it_fills_the_memory() -> None:
    with pytest.raises(RejectedImage, match="too narrow"):
        center_crop(Image.new("RGB", (1_000_000, 1)), 256)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_exif_rotation_is_applied(kind: str, orientation: int, tmp_path: Path) -> None:
    shown = np.zeros((16, 32, 3), np.uint8)
    shown[:, :16], shown[:8, 16:] = RED, GREEN  # no symmetry: left red, right above green, right below black
    turns: dict[int, Any] = {  # from what is shown to what is stored
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"jpg": {"quality": 100, "subsampling": 0}, "png": {}, "webp": {"lossless": True}}[kind]
    file = tmp_path / f"turned.{kind}"
    Image.fromarray(np.ascontiguousarray(turns[orientation](shown))).save(file, exif=exif, **options)
    found = pixels(file)
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).max() <= 3


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    file = tmp_path / "cmyk.jpg"
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(file, quality=100)
    assert np.abs(pixels(file).astype(int) - (200, 40, 90)).max() <= 4


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    values = noise(8, 8, 1)[..., 0]
    for mode in ("L", "1"):
        file = tmp_path / f"{mode}.png"
        Image.fromarray(values).convert(mode).save(file)
        expected = np.asarray(Image.fromarray(values).convert(mode).convert("L"))
        assert np.array_equal(pixels(file), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_alpha_lies_on_white(kind: str, tmp_path: Path) -> None:
    colour = noise(8, 8)
    alpha = np.tile(np.array([0, 51, 128, 255], np.uint8), (8, 2))
    file = tmp_path / f"alpha.{kind}"
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    Image.fromarray(np.dstack([colour, alpha])).save(file, **options)
    share = alpha[..., None] / 255
    assert np.abs(pixels(file) - (share * colour + (1 - share) * 255)).max() <= 1
    assert (pixels(file)[:, 0] == 255).all()  # what is transparent is white, whatever colour lies under it


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    file = tmp_path / "la.png"
    Image.merge("LA", (Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 128))).save(file)
    assert np.abs(pixels(file) - (100 * 128 / 255 + 255 * 127 / 255)).max() <= 1


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 0]], np.uint8).repeat(4, 0).repeat(4, 1)
    image = Image.fromarray(indices, "P")
    image.putpalette([*RED, *GREEN, *BLUE])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "one.png", transparency=1)  # one transparent entry
    image.save(tmp_path / "table.png", transparency=bytes([255, 0, 127]))  # an alpha for each entry
    colours = {name: pixels(tmp_path / f"{name}.png")[::4, ::4] for name in ("plain", "one", "table")}
    assert colours["plain"].tolist() == [[list(RED), list(GREEN)], [list(BLUE), list(RED)]]
    assert colours["one"].tolist() == [[list(RED), list(WHITE)], [list(BLUE), list(RED)]]
    assert np.abs(colours["table"].astype(int) - [[RED, WHITE], [(128, 128, 255), RED]]).max() <= 1


def test_16_bit_pictures_keep_the_high_byte(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000 + 7
    grey = pixels(png16(tmp_path / "grey.png", values, color_type=0))
    assert np.array_equal(grey, np.repeat((values >> 8)[..., None], 3, axis=2))
    colour = np.dstack([values, values[::-1], values[:, ::-1]])
    assert np.array_equal(pixels(png16(tmp_path / "rgb.png", colour, color_type=2)), colour >> 8)
    opaque = np.dstack([colour, np.full((8, 8), 65535, np.uint16)])
    assert np.array_equal(pixels(png16(tmp_path / "rgba.png", opaque, color_type=6)), colour >> 8)
    keyed = pixels(png16(tmp_path / "key.png", values, color_type=0, transparent=struct.pack(">H", values[2, 3])))
    assert keyed[2, 3].tolist() == list(WHITE) and keyed[2, 4].tolist() == grey[2, 4].tolist()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_of_an_animation_the_first_frame(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"moving.{kind}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=100, **options)
    assert (pixels(file) == RED).all()


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    file = tmp_path / "really_a_png.jpg"
    Image.fromarray(noise(8, 8)).save(file, format="PNG")
    assert np.array_equal(decode_image(file, 8), noise(8, 8))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_rejected(kind: str, kept: float, tmp_path: Path) -> None:
    file = tmp_path / f"cut.{kind}"
    Image.fromarray(noise(64, 64)).save(file)
    load_rgb(file)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(RejectedImage) as rejection:
        load_rgb(file)
    assert str(rejection.value) and "\n" not in str(rejection.value) and str(tmp_path) not in str(rejection.value)


def test_a_flipped_byte_in_a_png_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "flipped.png"
    Image.fromarray(noise(64, 64)).save(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(RejectedImage, match="cannot be decoded"):
        load_rgb(file)


def test_gif_and_bmp_are_pictures(tmp_path: Path) -> None:
    picture = noise(9, 7)
    Image.fromarray(picture).save(tmp_path / "colour.bmp")
    assert np.array_equal(pixels(tmp_path / "colour.bmp"), picture)
    first, second = (Image.new("P", (7, 9), index) for index in (0, 1))
    for frame in (first, second):
        frame.putpalette([*RED, *BLUE, *GREEN])
    first.putpixel((3, 4), 2)
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second], transparency=2)
    shown = np.full((9, 7, 3), RED)
    shown[4, 3] = WHITE
    assert np.array_equal(pixels(tmp_path / "moving.gif"), shown)


def test_what_is_no_picture_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("buy milk")
    Image.fromarray(noise(8, 8)).save(tmp_path / "other.tiff")
    for name in ("notes.png", "other.tiff"):
        with pytest.raises(RejectedImage, match="not a PNG, JPEG, WebP, GIF or BMP picture"):
            load_rgb(tmp_path / name)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(RejectedImage, match="not a regular file"):
        load_rgb(tmp_path / "link.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (60_000, 60_000)])  # Pillow warns of one, refuses one
def test_a_decompression_bomb_is_rejected_unopened(width: int, height: int, tmp_path: Path) -> None:
    tiny = png16(tmp_path / "bomb.png", np.zeros((1, 1), np.uint16), color_type=0).read_bytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(tiny[:16] + header + crc + tiny[33:])
    with pytest.raises(RejectedImage, match=f"more than {images.MAX_PIXELS}"):
        load_rgb(tmp_path / "bomb.png")
