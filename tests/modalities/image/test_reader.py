"""Every picture is read as it is meant to be seen, or refused in one sentence."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.modalities.image.reader import probe, read
from mmssl.types import BadClip

COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 0], [102, 51, 204]]], np.uint8)


def save(image: Image.Image, path: Path, **settings: object) -> Path:
    image.save(path, **settings)
    return path


def seen(path: Path) -> np.ndarray:
    """(H, W, 3) as 8-bit numbers."""
    return (read(path) * 255).round().byte().permute(1, 2, 0).numpy()


def test_color_is_channels_first_from_0_to_1(tmp_path: Path) -> None:
    got = read(save(Image.fromarray(COLORS), tmp_path / "a.png"))
    assert got.dtype == torch.float32
    assert got.shape == (3, 2, 3)
    assert got.is_contiguous()
    assert torch.equal(got[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(got[:, 1, 2], torch.tensor([0.4, 0.2, 0.8]))


def test_color_becomes_luma_where_one_channel_is_asked_for(tmp_path: Path) -> None:
    got = read(save(Image.fromarray(COLORS), tmp_path / "a.png"), channels=1)
    assert got.shape == (1, 2, 3)
    assert got[0].numpy() == pytest.approx(
        np.array([[0.299, 0.587, 0.114], [1, 0, 0.299 * 0.4 + 0.587 * 0.2 + 0.114 * 0.8]]), abs=1e-6
    )
    assert got.max() <= 1


def test_gray_is_repeated_where_three_channels_are_asked_for(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[0, 51, 255]], np.uint8)), tmp_path / "a.png")
    assert torch.allclose(read(path, channels=1), torch.tensor([[[0.0, 0.2, 1.0]]]))
    assert torch.allclose(read(path), torch.tensor([[[0.0, 0.2, 1.0]]]).expand(3, 1, 3))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_gray_keeps_its_depth(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 1, 256, 32768, 65535]], np.uint16)
    got = read(save(Image.fromarray(values), tmp_path / f"a.{suffix}"), channels=1)
    assert got[0].numpy() == pytest.approx(values / 65535, abs=1e-7)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    colors = np.concatenate([COLORS, np.full((2, 3, 1), 255, np.uint8)], axis=-1)
    colors[0, 0, 3], colors[0, 1, 3] = 0, 51
    got = read(save(Image.fromarray(colors), tmp_path / "a.png"))
    assert torch.equal(got[:, 0, 0], torch.ones(3))
    assert torch.allclose(got[:, 0, 1], torch.tensor([0.8, 1.0, 0.8]))
    assert torch.equal(got[:, 0, 2], torch.tensor([0.0, 0.0, 1.0]))
    gray = Image.fromarray(np.array([[0, 0]], np.uint8)).convert("LA")
    gray.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert read(save(gray, tmp_path / "la.png"), channels=1).tolist() == [[[1.0, 0.0]]]


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert seen(save(image, tmp_path / "a.png")).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    path = save(image, tmp_path / "b.png", transparency=1)
    assert seen(path).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    path = save(image, tmp_path / "c.gif", transparency=2)
    assert seen(path).tolist() == [[[10, 20, 30], [40, 50, 60], [255, 255, 255]]]


def test_a_transparent_color_is_white(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLORS), tmp_path / "a.png", transparency=(0, 0, 0))
    assert seen(path)[1].tolist() == [[255, 255, 255], [255, 255, 255], [102, 51, 204]]


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[True, False]])), tmp_path / "a.png")
    assert read(path, channels=1).tolist() == [[[1.0, 0.0]]]


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    cyan, black = Image.new("CMYK", (16, 16), (255, 0, 0, 0)), Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    assert np.abs(seen(save(cyan, tmp_path / "c.jpg", quality=95))[8, 8].astype(int) - [0, 255, 255]).max() < 6
    assert seen(save(black, tmp_path / "k.jpg", quality=95))[8, 8].max() < 6


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, 5] = (255, 0, 0), (0, 255, 0)  # red top left, green top right
    stored = {  # what a camera held that way writes; EXIF 2.32, "Orientation"
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / f"a.{suffix}", exif=exif, lossless=True)
    assert np.array_equal(seen(path), upright)
    assert probe(path) == {"height": 4, "width": 6}


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    path = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert seen(path)[0, 0].tolist() == [255, 0, 0]


def test_a_picture_of_one_pixel_is_a_picture(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (1, 1), (255, 0, 51)), tmp_path / "a.png")
    assert read(path).flatten().tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert probe(path) == {"height": 1, "width": 1}


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLORS), tmp_path / "a.png")
    path.rename(tmp_path / "a.jpg")
    assert np.array_equal(seen(tmp_path / "a.jpg"), COLORS)


def test_a_file_in_memory_gives_the_same_as_on_disk(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLORS), tmp_path / "a.png")
    assert torch.equal(read(io.BytesIO(path.read_bytes())), read(path))


def test_samples_without_a_range_are_refused(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.25, 1.0]], np.float32)
    assert read(save(Image.fromarray(values), tmp_path / "a.tiff"), channels=1).flatten().tolist() == [0.0, 0.25, 1.0]
    with pytest.raises(BadClip, match="floating point samples from 0 to 2 have no known range"):
        read(save(Image.fromarray(values * 2), tmp_path / "b.tiff"))
    with pytest.raises(BadClip, match="floating point samples from nan to nan"):
        read(save(Image.fromarray(values * np.nan), tmp_path / "c.tiff"))
    with pytest.raises(BadClip, match="32-bit integer samples from 0 to 70000 have no known range"):
        read(save(Image.fromarray(np.array([[0, 70000]], np.int32)), tmp_path / "d.tiff"))


def test_a_picture_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("jpg", "png", "gif", "webp", "tiff", "bmp"):
        path = save(noise, tmp_path / f"a.{suffix}")
        content = path.read_bytes()
        for share in (0.9, 0.5, 0.1, 0.01):
            path.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(BadClip, match=r"damaged or cut off: .+|not a picture that Pillow can read") as caught:
                read(path)
            assert caught.value.path == str(path)
            assert "\n" not in str(caught.value)


def test_what_is_no_picture_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html><body>404 not found</body></html>" * 20)
    (tmp_path / "noise.png").write_bytes(np.random.default_rng(0).bytes(5000))
    sentences = {
        "missing.png": "no such file or directory",
        ".": "is a directory",
        "empty.png": "the file is empty",
        "page.jpg": "not a picture that Pillow can read",
        "noise.png": "not a picture that Pillow can read",
    }
    for name, sentence in sentences.items():
        for function in (read, probe):
            with pytest.raises(BadClip, match=sentence) as caught:
                function(tmp_path / name)
            assert caught.value.path == str(tmp_path / name)
    with pytest.raises(BadClip, match="picture in memory: the file is empty"):
        read(io.BytesIO())


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(BadClip, match="a.png: has more than 178956970 pixels, .*; make it smaller"):
        read(tmp_path / "a.png")


def test_other_numbers_of_channels_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        read(tmp_path / "a.png", channels=4)
