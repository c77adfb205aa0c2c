"""Maps of a diffusion scan by an exported network, with onnxruntime, numpy and nibabel alone: the way a scanner would.

    python scripts/noddi_onnx.py network.onnx dwi.nii.gz dwi.bval dwi.bvec OUT [--mask mask.nii.gz] [--threads N]

Writes OUT/ndi.nii.gz and so on (the names stand in the network's metadata). The gradient table of the scan must be the
one that the network was trained for, in its order; a rotation of all directions together makes no difference.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import onnxruntime

BVAL_TOLERANCE = 0.01
COSINE_TOLERANCE = 0.01
CHUNK = 16384


class Refused(Exception):
    """Something in the input is wrong; the message is for the user."""


def main() -> int:
    """Read, check, estimate, write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("network", "dwi", "bvals", "bvecs", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except Refused as error:
        print(f"noddi_onnx: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Estimate the maps of one scan."""
    began = time.monotonic()
    session = open_network(arguments.network, arguments.threads)
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["parameters"])
    check_table(about, read_numbers(arguments.bvals).reshape(-1), read_numbers(arguments.bvecs), arguments.bvals)
    scan, magnitudes = read_image(arguments.dwi)
    images = session.get_inputs()[0].shape[1]
    if magnitudes.ndim != 4 or magnitudes.shape[3] != images:
        raise Refused(f"{arguments.dwi}: expected {images} images, found shape {magnitudes.shape}")
    mask = read_mask(arguments.mask, scan, magnitudes)
    signals = magnitudes[mask]
    if not np.isfinite(signals).all():
        raise Refused(f"{arguments.dwi}: expected finite voxels, found NaN or Inf inside the mask")
    read = time.monotonic()
    blocks = [signals[start : start + CHUNK] for start in range(0, len(signals), CHUNK)]
    values = np.concatenate([session.run(["parameters"], {"signals": block})[0] for block in blocks])
    estimated = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for column, name in enumerate(names):
        volume = np.zeros(mask.shape, np.float32)
        volume[mask] = values[:, column]
        header = scan.header.copy()
        header.set_data_dtype(np.float32)
        header.set_slope_inter(1, 0)
        nib.save(nib.Nifti1Image(volume, scan.affine, header), arguments.out / f"{name}.nii.gz")
    written = time.monotonic()
    print(
        f"{len(values):,} voxels: read {read - began:.2f} s, network {estimated - read:.2f} s, "
        f"write {written - estimated:.2f} s, in all {written - began:.2f} s"
    )


def open_network(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open the file with as many threads as asked for."""
    if not path.exists():
        raise Refused(f"{path}: expected an exported network, found no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Refused(f"{path}: expected an ONNX network, found a file that the runtime refuses ({error})") from error
    if "protocol_hash" not in session.get_modelmeta().custom_metadata_map:
        raise Refused(f"{path}: expected a network that names its protocol, found none in its metadata")
    return session


def read_numbers(path: Path) -> np.ndarray:
    """Read a text file of numbers."""
    try:
        return np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: expected a text file of numbers, found none ({error})") from error


def check_table(about: dict[str, str], bvals: np.ndarray, bvecs: np.ndarray, path: Path) -> None:
    """Refuse a gradient table that is not the network's."""
    expected, directions = np.array(json.loads(about["bvals"])), np.array(json.loads(about["bvecs"]))
    threshold = json.loads(about["b0_threshold"])
    wanted = f"{path}: expected the protocol of the network ({about['protocol_hash'][:12]})"
    bvecs = bvecs.T if bvecs.shape[0] == 3 else bvecs
    if bvals.shape != expected.shape or bvecs.shape != directions.shape:
        raise Refused(f"{wanted} with {len(expected)} images, found {len(bvals)}")
    is_b0 = expected <= threshold
    wrong = np.flatnonzero(
        (is_b0 != (bvals <= threshold)) | (~is_b0 & ~(np.abs(bvals - expected) <= BVAL_TOLERANCE * expected))
    )
    if len(wrong):
        raise Refused(
            f"{wanted} with b = {expected[wrong[0]]:g} in place {wrong[0] + 1}, found b = {bvals[wrong[0]]:g}"
        )
    found = np.where(is_b0[:, None], 0.0, bvecs)
    found = found / np.where(is_b0, 1.0, np.linalg.norm(found, axis=1))[:, None]
    if not np.abs(np.abs(found @ found.T) - np.abs(directions @ directions.T)).max() <= COSINE_TOLERANCE:
        raise Refused(f"{wanted} with its directions in its order, found other directions")


def read_image(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """Read an image as float32, with its voxels of one place side by side."""
    try:
        image = nib.load(path)
        return image, np.ascontiguousarray(np.asanyarray(image.dataobj), np.float32)
    except Exception as error:
        raise Refused(f"{path}: expected a NIfTI file, found none ({error})") from error


def read_mask(path: Path | None, scan: nib.Nifti1Image, magnitudes: np.ndarray) -> np.ndarray:
    """Read the mask, or take every voxel that has any signal."""
    if path is None:
        return magnitudes.max(axis=3) > 0
    image, mask = read_image(path)
    if mask.shape != magnitudes.shape[:3] or not np.allclose(image.affine, scan.affine, atol=1e-3):
        raise Refused(f"{path}: expected the grid of the scan, found another")
    if not mask.any():
        raise Refused(f"{path}: expected a mask with voxels inside, found zeros only")
    return mask != 0


if __name__ == "__main__":
    sys.exit(main())
