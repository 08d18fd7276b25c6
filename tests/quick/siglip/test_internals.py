"""The private interfaces of other libraries that `siglip` relies on: each test says what a new version has changed."""

from __future__ import annotations

import inspect
import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from siglip.images.opening import FORMATS
from siglip.images.pillow_internals import hide_exif, open_format, read_low_bytes, set_orientation, use_libtiff
from siglip.tensors import view_as_tensor
from siglip.torch_internals import has_vnni
from tests.support.image_files import make_png
from tests.support.images import encode, make_rgb


@pytest.mark.parametrize("name", ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"])
def test_torch_has_the_resize_operators(name: str) -> None:
    operator = getattr(torch.ops.aten, name, None)
    assert hasattr(operator, "out"), f"torch {torch.__version__} has no aten::{name}.out: see siglip/torch_internals.py"


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_torch_tells_what_the_cpu_multiplies(name: str) -> None:
    check = getattr(torch.cpu, name, None)
    assert check is not None, f"torch {torch.__version__} has no torch.cpu.{name}: see siglip/torch_internals.py"
    assert isinstance(check(), bool), f"torch.cpu.{name} no longer returns a bool"


def test_torch_has_the_freezing_setting() -> None:
    from torch._inductor import config

    wrong = f"torch {torch.__version__}: torch._inductor.config.{{}}: see siglip/torch_internals.py"
    assert hasattr(config, "freezing"), wrong.format("freezing is gone")
    before = config.freezing
    with config.patch(freezing=not before):
        assert config.freezing is not before, wrong.format("patch has no effect")


def test_pillow_turns_a_tiff_by_the_method_of_its_object() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    stored = Image.new("RGB", (8, 4))
    stored.putpixel((0, 0), (255, 0, 0))
    stored.save(buffer, "TIFF", exif=exif)
    image = Image.open(buffer)
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    set_orientation(image, 1)
    wrong = "Pillow no longer calls getexif of the object: see siglip/images/pillow_internals.py"
    assert image.getpixel((0, 0)) == (255, 0, 0), wrong


def test_pillow_has_a_function_for_each_format() -> None:
    for format in FORMATS:
        assert callable(open_format(encode(make_rgb(9, 8), format), format).load), format
    with pytest.raises(SyntaxError):
        open_format(b"no image", "PNG")


def test_pillow_reads_an_uncompressed_tiff_with_libtiff_when_it_is_told_to() -> None:
    stored = make_rgb(9, 8)
    image = open_format(encode(stored, "TIFF"), "TIFF")
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    use_libtiff(image, "RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(stored))


def test_pillow_gives_the_low_bytes_of_16_bit_rgb_when_it_is_told_to() -> None:
    samples = np.arange(60).reshape(4, 5, 3) * 1097
    data = make_png(samples, 16, 2)
    np.testing.assert_array_equal(np.asarray(read_low_bytes(data)), samples & 255)
    np.testing.assert_array_equal(np.asarray(open_format(data, "PNG")), samples >> 8)


def test_pillow_s_plugins_still_read_exif_when_they_open_a_file() -> None:
    from PIL import AvifImagePlugin

    source = inspect.getsource(AvifImagePlugin.AvifImageFile._open)
    assert "getexif" in source or "exif" in source, "AVIF no longer reads EXIF: hide_exif may be removed"
    assert hide_exif(b"....infe....Exif....mdatExif") == b"....infe....exi_....mdatExif"
    assert hide_exif(b"....mdat infe Exif") is None


def test_a_read_only_array_becomes_a_tensor_in_the_same_memory_without_a_warning() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = view_as_tensor(array)
    assert tensor.data_ptr() == array.ctypes.data
    np.testing.assert_array_equal(tensor.numpy(), array)
    expected = array.copy()
    del array
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_the_thread_safe_code_does_not_change_the_warning_filters() -> None:
    """`warnings.catch_warnings` changes the state of the whole process."""
    from siglip import encoder, tensors
    from siglip.images import color, decode, opening, resize
    from siglip.images.formats import jpeg, png, tiff

    for module in (color, decode, encoder, jpeg, opening, png, resize, tensors, tiff):
        assert "catch_warnings" not in inspect.getsource(module), module.__name__


@pytest.mark.parametrize("name", ["qlinear_prepack", "qlinear_pointwise"])
def test_torch_has_the_products_in_int8(name: str) -> None:
    wrong = f"torch {torch.__version__} has no onednn::{name}: see siglip/torch_internals.py"
    assert hasattr(torch.ops.onednn, name), wrong
    assert isinstance(has_vnni(), bool)
