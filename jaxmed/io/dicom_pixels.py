"""The stored pixels of a DICOM file: decoded, of the bits that count, through the modality's table where it has one.

Source: DICOM PS3.5, 8.1.1 (bits of a pixel); PS3.3, C.11.1 (modality transformation).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from jaxmed.errors import InputError
from jaxmed.files import DAMAGED
from jaxmed.io.dicom_files import collect_warnings, count_frames, read_file, read_numbers

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def decode(file: Path, warned: list[str]) -> Shaped[np.ndarray, "frame row column"]:
    """Return the stored values of a file, or what the modality's table makes of them.

    Args:
        file: The file.
        warned: Gets pydicom's warnings.

    Raises:
        InputError: It is damaged, or compressed in a way that cannot be decoded here.
    """
    from pydicom.pixels.processing import apply_modality_lut

    with collect_warnings(warned):
        data = read_file(file, pixels=True)
        try:
            if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
                raise EOFError("it has no pixel data")
            _require_decoder(file, data)
            shift = _unused_bits(file, data)
            pixels = data.pixel_array
            expected = (count_frames(file, data), int(data.Rows), int(data.Columns))
            if pixels.size != np.prod(expected):
                raise ValueError(f"{pixels.shape} pixels for {expected}")
            if shift:
                pixels = pixels >> shift
            if data.get("ModalityLUTSequence"):
                entries, first, bits = data.ModalityLUTSequence[0].LUTDescriptor
                # Tables of 10 to 15 bits stand in words of 16.
                data.ModalityLUTSequence[0].LUTDescriptor = [entries, first, 8 if bits == 8 else 16]
                pixels = apply_modality_lut(pixels, data)
        except InputError:
            raise
        except DAMAGED as error:
            found = f"a damaged one ({error})"
            raise InputError(file, "a whole DICOM file", found, "copy it again") from error
    return pixels.reshape(expected)


def _unused_bits(file: Path, data: "Dataset") -> int:
    """Return by how many bits the stored value of a pixel stands above the lowest, and let pydicom keep all to its top.

    pydicom takes HighBit as BitsStored - 1, and masks what is above.
    """
    if "PixelData" not in data or data.file_meta.TransferSyntaxUID.is_compressed:
        return 0
    found = [read_numbers(file, data, name, 1) for name in ("BitsAllocated", "BitsStored", "HighBit")]
    if None in found:
        return 0
    allocated, stored, high = (int(value[0]) for value in found if value is not None)
    shift = high + 1 - stored
    if not 0 <= shift <= allocated - stored:
        expected = f"a HighBit from {stored - 1} to {allocated - 1} for {stored} bits of {allocated}"
        raise InputError(file, expected, high, "export it again")
    data.BitsStored = high + 1
    return shift


def _require_decoder(file: Path, data: "Dataset") -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    advice = "decompress the series first, for example with gdcmconv --raw or dcmdjpeg"
    try:
        is_available = get_decoder(syntax).is_available
    except NotImplementedError:
        is_available = False
    if not is_available:
        raise InputError(file, "pixels that can be decoded here", f"{syntax.name}", advice)
